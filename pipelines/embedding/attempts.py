"""How often a piece or a window was begun, so that what ends its process each time is found.

Ray runs a task again when its process has died, without end, and does not tell the task how often that was. So each
attempt leaves a note in the work folder, one small file that is written only if there is none: a worker on another node
sees it, and so does the next run, if the driver died too. The first attempts go on as usual, because most processes die
for another reason (a preempted node, a kill). Later ones are *careful*: items go one by one through a process apart
(``isolated_calls``), which shows the item at fault.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from itertools import count

from crem.errors import ResourceError
from pipelines.tables.conditional_write import write_new
from pipelines.tables.storage import Folder

__all__ = ["ATTEMPTS", "Attempts"]

log = logging.getLogger(__name__)

ATTEMPTS = "attempts"
"""Folder of the notes, in the work folder; those of a shard go when it is committed."""
_MOST = 12
"""Attempts at one piece or window in one run; careful ones find an item at fault, so it is something else."""


@dataclass(frozen=True)
class Attempts:
    """The notes of a run."""

    work: Folder
    run: str
    """Names the run."""
    usual: int
    """How many attempts go on as usual; later ones are careful."""
    group_pieces: int
    """Pieces of a shard."""

    def begin(self, piece: int, window: int | None = None) -> int:
        """Note that a piece is prepared, or a window of it embedded; the number of the attempt, from 1.

        Raises:
            ResourceError: it was begun too often in this run.
        """
        note = {"run": self.run, "host": socket.gethostname(), "pid": os.getpid(), "began": time.time()}
        data = json.dumps(note).encode()
        folder = self.work.child(ATTEMPTS).child(f"{piece // self.group_pieces:06d}")
        what = f"{piece:08d}" if window is None else f"{piece:08d}-{window:04d}"
        number = next(n for n in count(1) if write_new(folder, data, f"{what}.{n}.json"))
        if number > _MOST:
            self._require_few(folder, what, number)
        if number > 1:
            log.warning("piece %s was begun %d times before, and its process ended", what, number - 1)
        return number

    def is_careful(self, attempt: int) -> bool:
        """Whether an attempt of this number goes item by item."""
        return attempt > self.usual

    def _require_few(self, folder: Folder, what: str, number: int) -> None:
        notes = [folder.read_json(f"{what}.{n}.json") for n in range(1, number + 1)]
        mine = [note for note in notes if isinstance(note, dict) and note.get("run") == self.run]
        if len(mine) > _MOST:
            raise ResourceError(
                f"the process of piece {what} ended {_MOST} times in this run, last on host {mine[-2]['host']}, and no "
                "item alone is at fault. If Ray's log (raylet.out) says that it was killed for memory, lower "
                "embed.batch_tokens, embed.rows_per_task or embed.max_actors; if nodes come and go, run the same "
                "command again: it continues"
            )
