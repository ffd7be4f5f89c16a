"""Prepared tables opened for use: the rows of some splits, and the images that they name.

``read_rows`` reads all of them plainly, into this process. ``index_rows`` and ``index_images`` read only what is needed
to find them, and ``load_rows`` fetches the content of chosen rows by these indexes: the same rows, for a corpus of any
size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from crem.data.items import Item, TrainingExample
from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.chosen_rows import content_of
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.image_parts import BY_ROW, image_places
from pipelines.tables.manifest import read_manifest, table_parts
from pipelines.tables.part_reads import in_threads, open_part, read_part
from pipelines.tables.row_index import RowIndex, SplitPrefix, begins_with, index_of, scan_part
from pipelines.tables.storage import Folder

__all__ = [
    "PreparedRows",
    "index_images",
    "index_rows",
    "item_of",
    "load_rows",
    "named_images",
    "read_rows",
    "texts_of",
    "training_examples",
]

log = logging.getLogger(__name__)

_S = TypeVar("_S")
_T = TypeVar("_T")


class _Each(Protocol):
    """``call`` of each item, in their order: ``part_reads.in_threads``, or the same on the nodes of a cluster."""

    def __call__(self, call: Callable[[_S], _T], items: Iterable[_S], /) -> list[_T]: ...


@dataclass
class PreparedRows:
    """Rows of some splits, and the images that they name."""

    table: pa.Table
    """``schema.ROWS``"""
    images: Mapping[int, bytes]
    """encoded bytes by id"""

    def image(self, image_id: int) -> bytes:
        """Encoded bytes of an image."""
        return self.images[image_id]

    def examples(
        self,
        numbers: NDArray[np.int64],
        z: NDArray[np.bool_],
        seed: tuple[int, ...] = (),
        *,
        retrieval: bool = True,
        generation: bool = True,
    ) -> list[TrainingExample]:
        """``training_examples`` of the rows with these positions in ``table``."""
        rows = self.table.take(pa.array(numbers)).to_pylist()
        return training_examples(rows, numbers, z, self.image, seed, retrieval=retrieval, generation=generation)


def training_examples(
    rows: Sequence[schema.ArrowRow],
    numbers: NDArray[np.int64],
    z: NDArray[np.bool_],
    image: Callable[[int], bytes],
    seed: tuple[int, ...] = (),
    *,
    retrieval: bool = True,
    generation: bool = True,
) -> list[TrainingExample]:
    """Training examples of rows.

    Args:
        rows: [N] of ``schema.ROWS``.
        numbers: [N] their row numbers.
        z: [N] compression bits.
        image: encoded bytes of an id.
        seed: of the run and step; the row number is appended to it.
        retrieval: whether to include targets and negatives.
        generation: whether to include questions and answers.
    """
    return [
        TrainingExample(
            query=item_of(row["query"], image),
            target=item_of(row["target"], image) if row["target"] is not None and retrieval else None,
            negatives=tuple(item_of(n, image) for n in row["negatives"] or ()) if retrieval else (),
            question=row["question"] if generation else None,
            answer=row["answer"] if generation else None,
            z=bool(bit),
            seed=(*seed, int(number)),
            query_key=_content_key(row["query"]),
            target_key=_content_key(row["target"]),
            negative_keys=tuple(_content_key(n) for n in row["negatives"] or ()) if retrieval else (),
        )
        for row, bit, number in zip(rows, z, numbers, strict=True)
    ]


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


def read_rows(prepared: str, *, split_prefix: SplitPrefix) -> PreparedRows:
    """Rows whose split starts with ``split_prefix``, in the order of their ids, and their images, in this process.

    Reads all parts from their start to their end.

    Raises:
        ConfigError: no completed prepared tables there, none of these rows, or a part that is missing or damaged.
    """
    folder = Folder.at(prepared)
    manifest = read_manifest(folder)
    rows, images = folder.child("rows"), folder.child("images")
    tables = in_threads(lambda name: read_part(rows, name, lambda: _rows(rows, name)), table_parts(folder, "rows"))
    chosen = [table.filter(begins_with(table["split"], split_prefix)) for table in tables]
    table = pa.concat_tables([schema.ROWS.empty_table(), *chosen]).sort_by("id").combine_chunks()
    if not table.num_rows:
        raise _no_rows(prepared, split_prefix, manifest.by_split_task)
    found: dict[int, bytes] = {}
    wanted = pa.array(named_images(table))
    for name in table_parts(folder, "images"):
        found |= read_part(images, name, lambda name=name: _images(images, name, wanted))  # type: ignore[misc]
    return PreparedRows(table, found)


def index_rows(prepared: str, *, split_prefix: SplitPrefix, each: _Each = in_threads) -> RowIndex:
    """The rows that ``read_rows`` reads, without their content.

    Raises:
        ConfigError: as ``read_rows``.
    """
    folder = Folder.at(prepared)
    manifest, rows, parts = read_manifest(folder), folder.child("rows"), table_parts(folder, "rows")
    index = index_of(rows, parts, each(_RowScan(rows, split_prefix), parts))
    if not len(index):
        raise _no_rows(prepared, split_prefix, manifest.by_split_task)
    return index


def index_images(prepared: str, *, each: _Each = in_threads) -> ImageIndex:
    """The places of all images of prepared tables.

    Raises:
        ConfigError: a part is missing or damaged.
    """
    folder = Folder.at(prepared)
    images, parts = folder.child("images"), table_parts(folder, "images")
    places = each(_PlacesOf(images), parts)
    if unknown := sum(bool(len(of_part)) and of_part["length"][0] == BY_ROW for of_part in places):
        log.warning(
            "%d of %d parts of %s do not say where their images stand, so that a whole row group is read for an image; "
            "run crem prepare again to read faster",
            unknown,
            len(parts),
            images.uri,
        )
    return ImageIndex.of(images, parts, places)


def load_rows(index: RowIndex, images: ImageIndex) -> PreparedRows:
    """The content of the rows of an index, in its order, and their images.

    Raises:
        ConfigError: a part is missing or damaged. StorageError: storage did not answer.
    """
    table = content_of(index)
    return PreparedRows(table, images.fetch(named_images(table)))


def named_images(rows: pa.Table) -> NDArray[np.int64]:
    """Ids of the images that rows name, each once."""
    flat = pc.list_flatten(rows.column("negatives"))
    sides = [rows.column("query"), rows.column("target"), flat]
    named = [pc.list_flatten(pc.struct_field(side, "images")) for side in sides]
    ids = pa.chunked_array([chunk for column in named for chunk in column.chunks], type=pa.int64())
    return np.unique(ids.to_numpy())


@dataclass(frozen=True)
class _RowScan:
    """``scan_part`` of a part: a task that pickles."""

    rows: Folder
    split_prefix: SplitPrefix

    def __call__(self, name: str) -> pa.Table:
        return scan_part(self.rows, name, self.split_prefix)


@dataclass(frozen=True)
class _PlacesOf:
    images: Folder

    def __call__(self, name: str) -> NDArray[np.void]:
        return image_places(self.images, name)


def _rows(rows: Folder, name: str) -> pa.Table:
    with open_part(rows, name, whole=True) as file:
        # parts from before a field was added to items lack it; the cast fills it with nulls
        return pq.ParquetFile(file).read(use_threads=False).cast(schema.ROWS)


def _images(images: Folder, name: str, wanted: pa.Array) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    with open_part(images, name, whole=True) as file:
        for batch in pq.ParquetFile(file).iter_batches(1024, columns=["id", "bytes"], use_threads=False):
            part = pa.table(batch).filter(pc.is_in(batch.column("id"), value_set=wanted))
            found |= dict(zip(part["id"].to_pylist(), part["bytes"].to_pylist(), strict=True))
    return found


def _no_rows(prepared: str, split_prefix: SplitPrefix, splits: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{prepared!r} has no rows of a split that starts with {split_prefix!r}; it has {sorted(splits)}"
    )


def _content_key(side: schema.ArrowRow | None) -> int:
    """Equal for sides of equal content. Negative only for an absent side, because negative keys match nothing."""
    if side is None:
        return -1
    # without places in the text the keys are those of tables from before image_at
    places = [side["image_at"]] if any(side["image_at"] or ()) else []
    content = (side["text"], side["images"], *places)
    return schema.content_id(repr(content).encode()) & (2**63 - 1)
