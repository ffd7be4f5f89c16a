"""The items that ``crem embed`` reads: any table that a format knows, or the image table of a prepared folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from crem.config import ImageConfig
from crem.data.items import ImageSource, Item
from crem.data.sequence import PreparedSequence
from crem.errors import ConfigError, ItemError
from pipelines.embedding.output_columns import id_of
from pipelines.formats.cells import parse_text
from pipelines.formats.raw_rows import RawItem
from pipelines.formats.record_reader import RecordReader
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RawRecord, SourceRow
from pipelines.sources.sources import SourceFiles
from pipelines.tables import schema
from pipelines.tables.manifest import table_parts
from pipelines.tables.storage import Folder

__all__ = ["LoadedItem", "failed_item", "load_item"]

_NO_ITEM = RawItem(None, (), None)


def item_files(source: str) -> SourceFiles:
    """The files to embed; of prepared tables the parts of ``images/`` that the manifest lists."""
    folder = Folder.at(source)
    if not folder.exists("rejected"):
        return sources.find(source, what="item table")
    parts = table_parts(folder, "images")
    found = sources.find(folder.child("images").uri, what="image table")
    listed = found.table.filter(pc.is_in(found.table["name"], value_set=pa.array(parts, pa.string())))
    if missing := set(parts) - set(listed["name"].to_pylist()):
        raise ConfigError(f"{folder.uri}/images/{min(missing)} is missing; run crem prepare again")
    return replace(found, table=listed.combine_chunks())


@dataclass(frozen=True)
class LoadedItem:
    """An item prepared for the model, or the error that prevents it."""

    id: Any
    """The row's own, else a hash of its content."""
    sequence: PreparedSequence | None
    error: str | None
    """``None`` where ``sequence`` is there."""
    uri: str | None
    """The row's own ``uri``, else the name of its first image."""
    text: str | None
    kept: tuple[Any, ...] = ()
    """Values of the columns to keep."""


def load_item(
    row: SourceRow,
    records: RecordReader,
    images: ImageReader,
    limits: ImageConfig,
    prepare: Callable[[Item], PreparedSequence],
    *,
    id_names: Sequence[str] = ("id",),
    keep: Sequence[str] = (),
) -> LoadedItem:
    """Read the item of one row and prepare it for the model.

    Args:
        id_names: the columns that are the id; a row without has a hash of its content, or null where they are several.
        keep: columns whose values go along.
    """
    item, uri, sequence, failure = _NO_ITEM, None, None, None
    try:
        uri = parse_text(row.record or {}, "uri")
        item = records.item(row)
        if item.is_empty:
            raise ItemError("empty_item", "the row has neither text nor an image; fill it or drop it")
        if len(item.images) > limits.max_images_per_item:
            raise ItemError("too_many_images", f"{len(item.images)} images; the limit is {limits.max_images_per_item}")
        sources: tuple[ImageSource, ...] = tuple(images.read(source, near=row.folder) for source in item.images)
        sequence = prepare(Item(item.text, sources, item.instruction, item.image_at))
    except ItemError as error:
        failure = str(error)
    kept = tuple((row.record or {}).get(name) for name in keep)
    return LoadedItem(_item_id(row, item, id_names), sequence, failure, uri or _name_of(item), item.text, kept)


def failed_item(
    row: SourceRow, error: str, *, id_names: Sequence[str] = ("id",), keep: Sequence[str] = ()
) -> LoadedItem:
    """The item of a row that was given up, by what its record says without being read."""
    record: RawRecord = row.record or {}
    uri, text = (value if isinstance(value := record.get(name), str) else None for name in ("uri", "text"))
    kept = tuple(record.get(name) for name in keep)
    return LoadedItem(_item_id(row, _NO_ITEM, id_names), None, error, uri, text, kept)


def _name_of(item: RawItem) -> str | None:
    """The name of the first image, if it has one."""
    first = next(iter(item.images), None)
    return first if isinstance(first, str) and len(first) < 2048 and not first.startswith("data:") else None


def _item_id(row: SourceRow, item: RawItem, id_names: Sequence[str]) -> Any:
    record: RawRecord = row.record or {}
    given = id_of(record, id_names)
    if given is not None or len(id_names) > 1:  # a hash is no struct
        return given
    named = [c for c in ("text", "images", "image", "bytes", "uri") if record.get(c)]
    content: list[object] = [record[c] for c in named]
    if not set(named) - {"text"}:
        content += item.images
    if "text" not in named and item.text is not None:
        content.append(item.text)
    if not content:
        return schema.content_id(row.name.encode(errors="surrogatepass"))
    return schema.content_id(repr(content).encode(errors="surrogatepass"))
