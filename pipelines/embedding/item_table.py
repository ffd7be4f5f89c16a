"""The items that ``crem embed`` reads: a table of texts and images, or the image table of a prepared folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from crem.config import ImageConfig
from crem.data.items import ImageSource, Item
from crem.data.sequence import PreparedSequence
from crem.errors import ItemError
from pipelines.corpus.image_reader import ImageReader
from pipelines.corpus.raw_rows import parse_images, parse_text
from pipelines.corpus.sources import Record
from pipelines.tables import schema

__all__ = ["COLUMNS", "Loaded", "load_item"]

COLUMNS = ("id", "text", "image", "images", "bytes", "uri", "instruction")


@dataclass(frozen=True)
class Loaded:
    """An item ready for the model, or the reason why it is not."""

    id: int
    sequence: PreparedSequence | None
    error: str | None
    uri: str | None
    text: str | None


def load_item(
    record: Record, reader: ImageReader, limits: ImageConfig, prepare: Callable[[Item], PreparedSequence]
) -> Loaded:
    """Read the item of one record and prepare it for the model.

    Images come from ``images``, ``image`` or ``bytes``, whichever is there; a row with no text and none of them is
    the image at its ``uri``. A row without a whole-number ``id`` gets the hash of its id, or else of its content.
    """
    values = record.data or {}
    uri = text = None
    identity = _identity(values, record.name)
    try:
        if record.data is None:
            raise ItemError("bad_row", record.fault)
        uri = parse_text(values, "uri")
        text = parse_text(values, "text")
        instruction = parse_text(values, "instruction")
        sources = next((s for c in ("images", "image", "bytes") if (s := parse_images(values.get(c), c))), ())
        if not sources and text is None and uri is not None:
            sources = (uri,)
        if not sources and text is None:
            raise ItemError("empty_item", "the row has neither text nor an image; fill it or drop it")
        if len(sources) > limits.max_images_per_item:
            raise ItemError("too_many_images", f"{len(sources)} images; the limit is {limits.max_images_per_item}")
        images: tuple[ImageSource, ...] = tuple(reader.read(source) for source in sources)
        sequence = prepare(Item(text=text, images=images, instruction=instruction))
    except ItemError as error:
        return Loaded(identity, None, str(error), uri, text)
    return Loaded(identity, sequence, None, uri, text)


def _identity(values: dict[str, Any], name: str) -> int:
    given = values.get("id")
    if isinstance(given, int) and not isinstance(given, bool) and -(2**63) <= given < 2**63:
        return given
    if given is not None:
        return schema.content_id(str(given).encode(errors="surrogatepass"))
    content = [values[c] for c in ("text", "images", "image", "bytes", "uri") if values.get(c)]
    if not content:
        return schema.content_id(name.encode(errors="surrogatepass"))
    return schema.content_id(repr(content).encode(errors="surrogatepass"))
