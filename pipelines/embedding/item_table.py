"""The items that ``crem embed`` reads: any table that a format knows, or the image table of a prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crem.config import ImageConfig
from crem.data.items import ImageSource, Item
from crem.data.sequence import PreparedSequence
from crem.errors import ItemError
from pipelines.formats.cells import parse_text
from pipelines.formats.raw_rows import RawItem
from pipelines.formats.record_reader import RecordReader
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RawRecord, SourceRow
from pipelines.tables import schema

__all__ = ["LoadedItem", "load_item"]

_NO_ITEM = RawItem(None, (), None)


@dataclass(frozen=True)
class LoadedItem:
    """An item prepared for the model, or the error that prevents it."""

    id: int
    sequence: PreparedSequence | None
    error: str | None
    """``None`` where ``sequence`` is there."""
    uri: str | None
    """The row's own ``uri``, else the name of its first image."""
    text: str | None


def load_item(
    row: SourceRow,
    records: RecordReader,
    images: ImageReader,
    limits: ImageConfig,
    prepare: Callable[[Item], PreparedSequence],
) -> LoadedItem:
    """Read the item of one row and prepare it for the model.

    The id is the row's own if it is a whole number, else the hash of its own, else of its content.
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
    return LoadedItem(_item_id(row, item), sequence, failure, uri or _name_of(item), item.text)


def _name_of(item: RawItem) -> str | None:
    """The name of the first image, if it has one."""
    first = next(iter(item.images), None)
    return first if isinstance(first, str) and len(first) < 2048 and not first.startswith("data:") else None


def _item_id(row: SourceRow, item: RawItem) -> int:
    record: RawRecord = row.record or {}
    given = record.get("id")
    if isinstance(given, int) and not isinstance(given, bool) and -(2**63) <= given < 2**63:
        return given
    if given is not None:
        return schema.content_id(str(given).encode(errors="surrogatepass"))
    named = [c for c in ("text", "images", "image", "bytes", "uri") if record.get(c)]
    content: list[object] = [record[c] for c in named]
    if not set(named) - {"text"}:
        content += item.images
    if "text" not in named and item.text is not None:
        content.append(item.text)
    if not content:
        return schema.content_id(row.name.encode(errors="surrogatepass"))
    return schema.content_id(repr(content).encode(errors="surrogatepass"))
