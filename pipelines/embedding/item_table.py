"""The items that ``crem embed`` reads: a table of texts and images, or the image table of a prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crem.config import ImageConfig
from crem.data.items import ImageSource, Item
from crem.data.sequence import PreparedSequence
from crem.errors import ItemError
from pipelines.formats.raw_rows import parse_images, parse_text
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RawRecord, SourceRow
from pipelines.tables import schema

__all__ = ["COLUMNS", "LoadedItem", "load_item"]

COLUMNS = ("id", "text", "image", "images", "bytes", "uri", "instruction")


@dataclass(frozen=True)
class LoadedItem:
    """An item prepared for the model, or the error that prevents it."""

    id: int
    sequence: PreparedSequence | None
    error: str | None
    """``None`` where ``sequence`` is there."""
    uri: str | None
    text: str | None


def load_item(
    row: SourceRow, reader: ImageReader, limits: ImageConfig, prepare: Callable[[Item], PreparedSequence]
) -> LoadedItem:
    """Read the item of one row and prepare it for the model.

    The images are those of the first of ``images``, ``image`` and ``bytes`` that is not empty; a row with no text and
    no image in these is the image at its ``uri``. The id is the row's own if it is a whole number, else the hash of its
    own, else of its content.
    """
    record = row.record or {}
    uri = text = None
    item_id = _item_id(record, row.name)
    try:
        if row.record is None:
            raise ItemError("bad_row", row.parse_error)
        uri = parse_text(record, "uri")
        text = parse_text(record, "text")
        instruction = parse_text(record, "instruction")
        sources = next((s for c in ("images", "image", "bytes") if (s := parse_images(record.get(c), c))), ())
        if not sources and text is None and uri is not None:
            sources = (uri,)
        if not sources and text is None:
            raise ItemError("empty_item", "the row has neither text nor an image; fill it or drop it")
        if len(sources) > limits.max_images_per_item:
            raise ItemError("too_many_images", f"{len(sources)} images; the limit is {limits.max_images_per_item}")
        images: tuple[ImageSource, ...] = tuple(reader.read(source) for source in sources)
        sequence = prepare(Item(text=text, images=images, instruction=instruction))
    except ItemError as error:
        return LoadedItem(item_id, None, str(error), uri, text)
    return LoadedItem(item_id, sequence, None, uri, text)


def _item_id(record: RawRecord, name: str) -> int:
    given = record.get("id")
    if isinstance(given, int) and not isinstance(given, bool) and -(2**63) <= given < 2**63:
        return given
    if given is not None:
        return schema.content_id(str(given).encode(errors="surrogatepass"))
    content = [record[c] for c in ("text", "images", "image", "bytes", "uri") if record.get(c)]
    if not content:
        return schema.content_id(name.encode(errors="surrogatepass"))
    return schema.content_id(repr(content).encode(errors="surrogatepass"))
