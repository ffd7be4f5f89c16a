"""``crem train`` whose workers record the rows of each step: ``python -m tests.pipelines.recorded …``.

One line per step, rank and start of the workers, into ``$CREM_RECORD/<process>.jsonl``. A step takes ``$CREM_STEP_S``
seconds longer and the upload of a file ``$CREM_UPLOAD_S``, so that a test can hit them; only the steps below the number
in the file ``$CREM_GATE`` are made.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.training.messages import WorkerSpec


def recording_worker(given: dict[str, WorkerSpec]) -> None:
    """The training worker with a recorder before its collator."""
    import ray.train

    from crem.train import loop
    from pipelines.tables.storage import Folder
    from pipelines.training import feed
    from pipelines.training.trainer import run_worker

    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    collate = feed.collate
    file = Path(os.environ["CREM_RECORD"]) / f"{os.getpid()}.jsonl"

    at: list[int] = []

    def recorded(share: bytes, *rest: Any) -> Any:
        rows: feed.StepShare = pickle.loads(share)
        seeds = [example.seed for example in rows.examples]  # run, step, row
        line = {"step": seeds[0][1], "rows": [seed[2] for seed in seeds], "rank": rank, "ranks": ranks}
        at[:] = at or [line["step"]]
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        return collate(share, *rest)

    upload, train_step = Folder.upload, loop.train_step

    def slow_upload(self: Folder, local: str, *parts: str) -> None:
        time.sleep(float(os.environ.get("CREM_UPLOAD_S", 0)))
        upload(self, local, *parts)

    def slow_step(*args: Any, **kwargs: Any) -> Any:
        time.sleep(float(os.environ.get("CREM_STEP_S", 0)))
        while (gate := os.environ.get("CREM_GATE")) and at[0] >= int(Path(gate).read_text()):
            time.sleep(0.1)
        at[0] += 1
        return train_step(*args, **kwargs)

    feed.collate, Folder.upload, loop.train_step = recorded, slow_upload, slow_step
    run_worker(given)


def main() -> int:
    from crem.cli import main as crem
    from pipelines.training import trainer

    trainer.run_worker = recording_worker
    return crem(sys.argv[1:])


if __name__ == "__main__":
    from tests.pipelines.recorded import main as imported

    sys.exit(imported())
