"""Prepared tables written by hand: rows of every kind over several parts, as ``crem prepare`` writes or wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tables import schema
from pipelines.tables.image_parts import ImagePartWriter
from tests.pipelines.conftest import encoded, random_image
from tests.pipelines.training.test_dry_run import write_manifest

__all__ = ["IMAGES", "ROWS", "write_tables"]

IMAGES, ROWS = 60, 300
_OLD_ITEM = pa.struct([field for field in schema.ITEM if field.name != "image_at"])
_OLD = {schema.ITEM: _OLD_ITEM, pa.list_(schema.ITEM): pa.list_(_OLD_ITEM)}


def _side(draw: np.random.Generator, ids: list[int]) -> dict[str, Any]:
    images = [int(i) for i in draw.choice(ids, draw.integers(0, 4))]
    text = f"text {draw.integers(10**6)} é漢" * int(draw.integers(1, 4))
    at = sorted(int(a) for a in draw.integers(0, len(text), len(images))) if draw.random() < 0.5 else []
    return {"text": text, "instruction": "say" if draw.random() < 0.2 else None, "images": images, "image_at": at}


def _rows(ids: list[int]) -> list[dict[str, Any]]:
    draw = np.random.default_rng(3)
    rows = []
    for i in range(ROWS):
        answered = i % 3 == 0 or i % 2 == 0
        rows.append(
            {
                "id": schema.row_id("s", str(i)),
                "source": f"s{i % 2}",
                "key": str(i),
                "task": ["retrieval", "vqa", "caption"][i * i % 3],
                "split": ["train", "train_b", "validation", "test_x"][min(i % 10, 3)],
                "query": _side(draw, ids),
                "target": _side(draw, ids) if i % 2 else None,
                "negatives": [_side(draw, ids) for _ in range(i % 3)] if i % 7 else None,
                "question": f"what is {i}?" if answered else None,
                "answer": f"it is {i}" if answered else None,
            }
        )
    return rows


def write_tables(folder: Path, *, old: bool = False, parts: int = 3) -> str:
    """The tables; ``old`` ones know neither places of images in texts nor in parts."""
    data = [encoded(random_image(i, (20 + i, 16))) for i in range(IMAGES)]
    images = pa.table(
        {
            "id": [schema.content_id(d) for d in data],
            "bytes": data,
            "width": [20 + i for i in range(IMAGES)],
            "height": [16] * IMAGES,
            "uri": [f"{i}.png" for i in range(IMAGES)],
        },
        schema=schema.IMAGES,
    )
    kind = schema.ROWS
    if old:
        kind = pa.schema([field.with_type(_OLD.get(field.type, field.type)) for field in kind])
    rows = pa.Table.from_pylist(_rows(images["id"].to_pylist()), schema=kind)
    for table, held in (("rows", rows), ("images", images)):
        (folder / table).mkdir(parents=True)
        for part in range(parts):
            chosen = held.take([i for i in range(held.num_rows) if i % parts == part])
            path = folder / table / f"part-{part:06d}.parquet"
            if table == "rows" or old:
                pq.write_table(chosen, path, compression="zstd" if table == "rows" else "none", row_group_size=16)
                continue
            with path.open("wb") as file, ImagePartWriter(file) as writer:
                for start in range(0, chosen.num_rows, 6):
                    writer.write(chosen.slice(start, 6))
    write_manifest(folder, ROWS, IMAGES)
    return str(folder)
