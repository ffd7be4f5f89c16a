"""Prepared tables opened for use: the rows of some splits, and the images that they name.

``read_rows`` reads both into this process. ``share_rows`` leaves the images in Ray's object store, which spills to
disk, so that all workers of a node map one copy.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from crem.config import RunConfig
from crem.data.items import Item, TrainingExample
from crem.data.mixing import MixingPlan
from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.manifest import read_manifest, table_parts
from pipelines.tables.storage import Folder

__all__ = ["ImageTable", "PreparedRows", "item_of", "read_part", "read_rows", "read_table", "share_rows", "texts_of"]


@dataclass
class ImageTable:
    """Encoded images by id, in parts; a part is a table (id, bytes) or its reference in Ray's object store."""

    ids: NDArray[np.int64]
    """sorted"""
    places: NDArray[np.int64]
    """[N, 2] part and row of each id"""
    parts: list[Any]
    _opened: dict[int, pa.Table] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, ids_of_parts: list[NDArray[np.int64]], parts: list[Any]) -> ImageTable:
        """The table over ``parts``; ``ids_of_parts`` has the ids of each in the order of its rows."""
        counts = [len(ids) for ids in ids_of_parts]
        ids = np.concatenate([np.empty(0, np.int64), *ids_of_parts])
        places = np.stack(
            [
                np.repeat(np.arange(len(parts)), counts),
                np.concatenate([np.empty(0, np.int64), *map(np.arange, counts)]),
            ],
            axis=1,
        )
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], places[order], parts)

    def __reduce__(self) -> tuple[type[ImageTable], tuple[Any, ...]]:
        return ImageTable, (self.ids, self.places, self.parts)  # without the parts that this process has opened

    def read(self, image_id: int) -> bytes:
        """Encoded bytes of an image."""
        at = int(np.searchsorted(self.ids, image_id))
        assert at < len(self.ids) and self.ids[at] == image_id, f"image {image_id} is not in the image table"
        part, row = self.places[at].tolist()
        if part not in self._opened:
            stored = self.parts[part]
            self._opened[part] = ray.get(stored) if isinstance(stored, ray.ObjectRef) else stored  # mapped, not copied
        data: bytes = self._opened[part].column("bytes")[row].as_py()
        return data


@dataclass
class PreparedRows:
    """Rows of some splits, and the images that they name."""

    table: pa.Table
    """``schema.ROWS``"""
    image_table: ImageTable

    def image(self, image_id: int) -> bytes:
        """Encoded bytes of an image."""
        return self.image_table.read(image_id)

    def examples(
        self,
        numbers: NDArray[np.int64],
        z: NDArray[np.bool_],
        seed: tuple[int, ...] = (),
        *,
        retrieval: bool = True,
        generation: bool = True,
    ) -> list[TrainingExample]:
        """Training examples of the rows with these numbers.

        Args:
            numbers: [N] positions in ``table``.
            z: [N] compression bits.
            seed: of the run and step; the row number is appended to it.
            retrieval: whether to include targets and negatives.
            generation: whether to include questions and answers.
        """
        return [
            TrainingExample(
                query=item_of(row["query"], self.image),
                target=item_of(row["target"], self.image) if row["target"] is not None and retrieval else None,
                negatives=tuple(item_of(n, self.image) for n in row["negatives"] or ()) if retrieval else (),
                question=row["question"] if generation else None,
                answer=row["answer"] if generation else None,
                z=bool(bit),
                seed=(*seed, int(number)),
                query_key=_content_key(row["query"]),
                target_key=_content_key(row["target"]),
                negative_keys=tuple(_content_key(n) for n in row["negatives"] or ()) if retrieval else (),
            )
            for row, bit, number in zip(self.table.take(pa.array(numbers)).to_pylist(), z, numbers, strict=True)
        ]

    def plan(self, config: RunConfig) -> MixingPlan:
        """The order of a training run over these rows.

        A loss of weight 0 gets no rows of its own: without L_r, pairs count only where they have a question; without
        L_g, only pairs count.
        """
        paired = self.table.column("target").is_valid().to_numpy()
        answered = self.table.column("answer").is_valid().to_numpy()
        if config.loss.alpha_r == 0:
            paired = paired & answered
        if config.loss.alpha_g == 0:
            answered = paired
        tasks = self.table.column("task").combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
        return MixingPlan(
            retrieval=np.flatnonzero(paired),
            heterogeneous=np.flatnonzero(~paired & answered),
            tasks=np.nan_to_num(tasks.astype(np.float64)).astype(np.int64),
            global_batch=config.train.global_batch,
            seed=config.train.seed,
            compression_probability=config.loss.compression_probability,
            config=config.data,
            chorus_counts=config.model.chorus_counts,
        )


def item_of(side: schema.ArrowRow, image: Callable[[int], bytes]) -> Item:
    """The ``Item`` of one side of a row; ``image`` maps an id to encoded bytes."""
    images = tuple(image(i) for i in side["images"] or ())
    return Item(side["text"], images, side["instruction"], tuple(side["image_at"] or ()))


def texts_of(rows: PreparedRows) -> list[str]:
    """All texts of the rows, for training a tokenizer."""
    texts: list[str] = []
    for side in ("query", "target"):
        texts += [t for t in pc.struct_field(rows.table.column(side), "text").to_pylist() if t]
    for column in ("question", "answer"):
        texts += [t for t in rows.table.column(column).to_pylist() if t]
    return texts


def read_rows(prepared: str, *, split_prefix: str) -> PreparedRows:
    """Rows whose split starts with ``split_prefix``, and their images, in this process.

    Raises:
        ConfigError: no completed prepared tables there, or none of these rows.
    """
    table, wanted = read_table(prepared, split_prefix)
    images = Folder.at(prepared).child("images")
    parts = [read_part(images, name, wanted) for name in table_parts(Folder.at(prepared), "images")]
    return PreparedRows(table, ImageTable.of([ids for ids, _ in parts], [part for _, part in parts]))


def share_rows(prepared: str, *, split_prefix: str | tuple[str, ...]) -> PreparedRows:
    """``read_rows`` for one prefix or several; the images stay in Ray's object store, only their ids come here."""
    table, wanted = read_table(prepared, split_prefix)
    images = Folder.at(prepared).child("images")
    reference = ray.put(wanted)
    read = ray.remote(num_cpus=0.25, num_returns=2)(read_part)
    parts = [read.remote(images, name, reference) for name in table_parts(Folder.at(prepared), "images")]
    return PreparedRows(table, ImageTable.of(ray.get([ids for ids, _ in parts]), [part for _, part in parts]))


def read_table(prepared: str, split_prefix: str | tuple[str, ...]) -> tuple[pa.Table, pa.Array]:
    """The rows, in the order of their ids, and the ids of the images that they name."""
    folder = Folder.at(prepared)
    manifest = read_manifest(folder)
    rows = folder.child("rows")
    tables = [
        pq.read_table(rows.path(name), schema=schema.ROWS, filesystem=rows.fs) for name in table_parts(folder, "rows")
    ]
    wanted = "^(" + "|".join(map(re.escape, [split_prefix] if isinstance(split_prefix, str) else split_prefix)) + ")"
    table = pa.concat_tables([t.filter(pc.match_substring_regex(t.column("split"), wanted)) for t in tables])
    if not table.num_rows:
        raise ConfigError(
            f"{prepared!r} has no rows of a split that starts with {split_prefix!r}; it has "
            f"{sorted(manifest.by_split_task)}"
        )
    table = table.sort_by("id").combine_chunks()
    named = [pc.list_flatten(pc.struct_field(table.column(s).combine_chunks(), "images")) for s in ("query", "target")]
    return table, pa.chunked_array([*named, _negative_images(table)], type=pa.int64()).unique()


def read_part(images: Folder, name: str, wanted: pa.Array) -> tuple[NDArray[np.int64], pa.Table]:
    """Ids and encoded bytes of the wanted images in one file of the image table."""
    part = pq.read_table(images.path(name), columns=["id", "bytes"], filesystem=images.fs)
    part = part.filter(pc.is_in(part.column("id"), value_set=wanted))
    return part.column("id").to_numpy(), part


def _negative_images(table: pa.Table) -> pa.Array:
    flat = pc.list_flatten(table.column("negatives")).combine_chunks()
    return pc.list_flatten(pc.struct_field(flat, "images"))


def _content_key(side: schema.ArrowRow | None) -> int:
    """Equal for sides of equal content. Negative only for an absent side, because negative keys match nothing."""
    if side is None:
        return -1
    # without places in the text the keys are those of tables from before image_at
    places = [side["image_at"]] if any(side["image_at"] or ()) else []
    content = (side["text"], side["images"], *places)
    return schema.content_id(repr(content).encode()) & (2**63 - 1)
