"""Tables with planted duplicates, written as ``crem prepare`` writes them, and an oracle that compares all pairs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from crem.config import PrepareConfig
from pipelines.duplicates.decide import decide
from pipelines.duplicates.decision_tables import Decisions, read_decisions
from pipelines.duplicates.parts import TablePart
from pipelines.tables import schema
from pipelines.tables.storage import Folder


def photo(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """A smooth random picture: like a photograph, its neighbouring pixels are alike."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def jpeg(image: Image.Image, quality: int = 95) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "q50": lambda image: jpeg(image, 50),
    "half": lambda image: png(image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)),
    "crop": lambda image: png(
        image.crop((image.width // 100, image.height // 100, image.width * 99 // 100, image.height * 99 // 100))
    ),
    "bright": lambda image: png(ImageEnhance.Brightness(image).enhance(1.1)),
}
"""What people do to a picture before they publish it again."""


class Tables:
    """Prepared tables in the making."""

    def __init__(self, source: str = "s") -> None:
        self.source = source
        self.rows: list[dict[str, Any]] = []
        self.images: dict[int, dict[str, Any]] = {}

    def image(self, data: bytes) -> int:
        identity = schema.content_id(data)
        width, height = Image.open(io.BytesIO(data)).size
        self.images[identity] = {"id": identity, "bytes": data, "width": width, "height": height, "uri": None}
        return identity

    def item(self, text: str | None = None, *images: bytes, instruction: str | None = None) -> dict[str, Any]:
        ids = [self.image(data) for data in images]
        return {"text": text, "instruction": instruction, "images": ids, "image_at": [0] * len(ids)}

    def add(
        self,
        query: dict[str, Any],
        target: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        split: str = "train",
        question: str | None = None,
        answer: str | None = None,
    ) -> int:
        key = str(len(self.rows)) if key is None else key
        row = {"source": self.source, "key": key, "task": "t", "split": split, "query": query, "target": target}
        row |= {"negatives": [], "question": question, "answer": answer, "id": schema.row_id(self.source, key)}
        self.rows.append(row)
        return int(row["id"])

    def parts(self, folder: Path, rows_per_part: int = 100, kind: str = "parquet") -> tuple[list[TablePart], ...]:
        """Written as files, and their parts."""
        found = []
        for name, rows, of in (
            ("rows", self.rows, schema.ROWS),
            ("images", list(self.images.values()), schema.IMAGES),
        ):
            (folder / name).mkdir(parents=True, exist_ok=True)
            parts = []
            for number, start in enumerate(range(0, len(rows), rows_per_part)):
                some = pa.Table.from_pylist(rows[start : start + rows_per_part], schema=of)
                file = f"part-{number:06d}.{kind}"
                if kind == "parquet":
                    pq.write_table(some, folder / name / file, row_group_size=40)
                else:
                    with pa.ipc.new_file(folder / name / file, of) as writer:
                        writer.write_table(some)
                parts.append(TablePart(Folder.at(folder / name), (file,), some.num_rows))
            found.append(parts)
        return tuple(found)


def decided(
    tables: Tables, folder: Path, rows_per_part: int = 100, kind: str = "parquet", **settings: Any
) -> Decisions:
    """``decide`` on these tables."""
    rows, images = tables.parts(folder / "tables", rows_per_part, kind)
    return decide(rows, images, PrepareConfig(**settings), work=Folder.at(folder / "work"))


def all_decisions(decisions: Decisions) -> pa.Table:
    """Those on the rows of all parts that are here."""
    return read_decisions(decisions.folder, range(1000))


def left_out(decisions: Decisions) -> dict[int, str]:
    """``stage/reason`` by the id of the row."""
    rows = all_decisions(decisions).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows), "one decision a row"
    return {row["id"]: f"{row['stage']}/{row['reason']}" for row in rows}


def connected(count: int, near: Callable[[int, int], bool]) -> list[int]:
    """The smallest member of each item's component, from all pairs."""
    root = list(range(count))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for i in range(count):
        for j in range(i):
            if near(i, j):
                low, high = sorted((find(i), find(j)))
                root[high] = low
    return [find(i) for i in range(count)]


def words(rng: np.random.Generator, vocabulary: Sequence[str], count: int) -> str:
    return " ".join(rng.choice(list(vocabulary), count))
