"""Windows of prepared items: what passes from the tasks that read and decode to the actors that have the model.

A window is as many items of one piece as fit ``_WINDOW_BYTES``, and so do their results; the model sorts them by
length. It travels as one value of one row, so that Ray Data neither splits nor joins it: the windows of a piece are the
same whenever it is read again.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from crem.data.sequence import PreparedSequence
from crem.errors import CremError
from pipelines.corpus.work_plan import Piece
from pipelines.embedding.attempts import Attempts
from pipelines.embedding.item_loading import ApartLoader, ItemLoader, LoaderSettings
from pipelines.embedding.item_table import LoadedItem
from pipelines.embedding.output_columns import OutputColumns, typed
from pipelines.embedding.packed_sequences import PackedSequences
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.sources import sources
from pipelines.tables import ray_tasks

__all__ = ["ERROR", "WINDOW", "Window", "WindowMaker"]

WINDOW, ERROR = "window", "error"
"""Columns of what passes: a pickled window, or the pickled error that the user should see."""
_WINDOW_BYTES = 64 * 2**20
"""Of the items, and of their results: memories may have more bytes than pictures. Source: ours."""
_ITEM_BYTES = 1024
"""Of an item beside its pictures, about."""


@dataclass(frozen=True)
class Window:
    """Some neighbouring items of a piece."""

    piece: int
    number: int
    """From 0 on in its piece."""
    last: bool
    """Whether it is the last of its piece."""
    columns: pa.Table
    """The columns of the output beside the vectors, a row for each item."""
    sequences: list[PreparedSequence]
    """Of the items without an error, in their order."""
    unknown: UnknownColumns = field(default_factory=UnknownColumns)
    prepare_s: float = 0.0
    """Seconds in which its items were read and prepared."""
    attempt: int = 1
    """The attempt at its piece in which it was made."""

    def failing(self, reasons: dict[int, str]) -> Window:
        """This window where further items have an error, by the place of their sequence."""
        errors = self.columns["error"].to_pylist()
        places = [row for row, error in enumerate(errors) if error is None]
        for sequence, reason in reasons.items():
            errors[places[sequence]] = reason
        columns = self.columns.set_column(
            self.columns.schema.get_field_index("error"), "error", pa.array(errors, pa.string())
        )
        return replace(self, columns=columns, sequences=[s for n, s in enumerate(self.sequences) if n not in reasons])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"sequences": PackedSequences.of(self.sequences)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"sequences": state["sequences"].unpack()})


@dataclass(frozen=True)
class WindowMaker:
    """Reads and prepares the items of pieces, in tasks that need no weights."""

    loader: LoaderSettings
    attempts: Attempts
    row_bytes: int
    """Of the vector, the states and the memory of a row."""

    @property
    def columns(self) -> OutputColumns:
        return self.loader.columns

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for task in batch[ray_tasks.TASK].to_pylist():
            try:
                for window in self.windows(pickle.loads(task)):
                    yield _row(pickle.dumps(window, protocol=5), b"")
            except (CremError, OSError) as error:
                said = error if isinstance(error, CremError) else ray_tasks.disk_full(error)
                if said is None:
                    raise
                yield _row(b"", pickle.dumps(said))

    def windows(self, piece: Piece) -> Iterator[Window]:
        """The windows of a piece, at least one."""
        attempt = self.attempts.begin(piece.number)
        loader = ApartLoader if self.attempts.is_careful(attempt) else ItemLoader
        held: list[LoadedItem] = []
        size = number = 0
        began = time.perf_counter()
        with loader(self.loader) as load:
            for item in (load(row) for rows in piece.ranges for row in sources.read(rows)):
                full = size + _size(item) > _WINDOW_BYTES or (len(held) + 1) * self.row_bytes > _WINDOW_BYTES
                if held and full:
                    yield self._window(piece.number, number, held, time.perf_counter() - began, attempt)
                    held, size, number, began = [], 0, number + 1, time.perf_counter()
                held.append(item)
                size += _size(item)
            yield self._window(piece.number, number, held, time.perf_counter() - began, attempt, load.unknown)

    def _window(
        self,
        piece: int,
        number: int,
        items: list[LoadedItem],
        prepare_s: float,
        attempt: int,
        unknown: UnknownColumns | None = None,
    ) -> Window:
        """``unknown`` is given with the last window of the piece."""
        ids, faults = typed([item.id for item in items], self.columns.id, self.columns.id_text)
        kept: list[pa.Array] = []
        for place, column in enumerate(self.columns.kept):
            values, more = typed([item.kept[place] for item in items], column.type, column.name)
            kept.append(values)
            faults = more | faults
        errors = [item.error or faults.get(place) for place, item in enumerate(items)]
        columns = {
            "id": ids,
            "error": pa.array(errors, pa.string()),
            "uri": pa.array([item.uri for item in items], pa.string()),
            "text": pa.array([item.text for item in items], pa.string()),
        }
        columns |= {column.name: values for column, values in zip(self.columns.kept, kept, strict=True)}
        sequences = [
            item.sequence for item, error in zip(items, errors, strict=True) if item.sequence and error is None
        ]
        last, unknown = unknown is not None, unknown or UnknownColumns()
        return Window(piece, number, last, pa.table(columns), sequences, unknown, round(prepare_s, 4), attempt)


def _size(item: LoadedItem) -> int:
    pictures = 0 if item.sequence is None else item.sequence.patches_PCN.nbytes
    return _ITEM_BYTES + pictures + len(item.text or "")


def _row(window: bytes, error: bytes) -> pa.Table:
    return pa.table({WINDOW: pa.array([window], pa.large_binary()), ERROR: pa.array([error], pa.binary())})
