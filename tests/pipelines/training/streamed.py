"""A rank that reads its stream and trains nothing: a line of JSON for each step, with a digest of its examples.

python -m tests.pipelines.training.streamed PREPARED STEPS PAUSE_S
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray

from crem.config import RunConfig, load_config
from crem.data.items import TrainingExample
from pipelines.tables import session
from pipelines.tables.prepared import index_images, index_rows
from pipelines.tables.ray_tasks import on_nodes
from pipelines.training import feed

__all__ = ["RANK", "RANKS", "PassOn", "config", "digest"]

RANK, RANKS = 1, 2


class PassOn:
    """In the place of a collator: gives the examples on."""

    def examples(self, examples: Sequence[TrainingExample], **_: Any) -> list[TrainingExample]:
        return list(examples)


def config(steps: int) -> RunConfig:
    """Of 16 rows a rank and step."""
    return load_config("micro", ["train.global_batch=32", "train.workers=2", f"train.steps={steps}"])


def digest(examples: Sequence[TrainingExample]) -> str:
    return hashlib.blake2b(repr(examples).encode(), digest_size=8).hexdigest()


def main() -> None:
    prepared, steps, pause_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    session.connect()
    images = ray.remote(index_images).remote(prepared, each=on_nodes)
    rows = index_rows(prepared, split_prefix="train", each=on_nodes)
    stream = feed.step_batches(
        rows,
        images,
        config(steps),
        PassOn(),
        start_step=0,
        rank=RANK,
        ranks=RANKS,
        window=feed.WindowSize(16, growth=1),
    )
    for step, chunks in enumerate(stream):
        sys.stdout.write(json.dumps([step, digest([example for chunk in chunks for example in chunk])]) + "\n")
        sys.stdout.flush()
        time.sleep(pause_s)


if __name__ == "__main__":
    main()
