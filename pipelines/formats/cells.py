"""What one cell of a table holds: nothing, a text, or images. Pure functions.

Null, NaN and blanks are nothing. A type that a column cannot have is an error. Only numbers and dates are accepted as
text, because answers such as 4 are often stored as numbers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from crem.errors import ItemError
from pipelines.sources.records import RawRecord

__all__ = ["is_absent", "is_blank", "listed", "parse_images", "parse_text", "parse_text_value"]


def is_absent(value: Any) -> bool:
    """Whether a cell says that nothing is there: null, NaN, pandas' NaT or NA, a blank text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return True
    if isinstance(value, float | Decimal):
        return value != value
    return type(value).__name__ in ("NaTType", "NAType")  # without pandas


def is_blank(value: Any) -> bool:
    """Whether a cell is absent, or a list or object of nothing else, or no bytes."""
    if isinstance(value, dict):
        return all(map(is_blank, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_blank, value))
    return is_absent(value) or value == b""


def parse_text(record: RawRecord, column: str) -> str | None:
    """A text column, in NFC; ``None`` where it is null, NaN or blank.

    Raises:
        ItemError: ``bad_row`` for other types.
    """
    return parse_text_value(record.get(column), column)


def parse_text_value(value: Any, column: str) -> str | None:
    """As ``parse_text``, of a cell."""
    if is_absent(value):
        return None
    if isinstance(value, bytes):  # Parquet of writers that do not mark texts as such
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise ItemError("bad_row", f"{column} is {len(value)} bytes that are no UTF-8 text") from error
    if isinstance(value, int | float | Decimal | timedelta) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, date | datetime | time):
        value = value.isoformat()
    if not isinstance(value, str):
        raise ItemError("bad_row", f"{column} is a {type(value).__name__}, {repr(value)[:60]}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ItemError("bad_row", f"{column} is not valid Unicode: {error.reason} at {error.start}") from error
    return unicodedata.normalize("NFC", value) if value.strip() else None  # here, before any place in it is counted


def parse_images(value: Any, column: str) -> tuple[str | bytes, ...]:
    """A column of images: null, one, or a list of names, bytes or objects such as hubs' ``{"bytes", "path"}``.

    Absent ones are left out: null, NaN, a blank or one of ``_NO_IMAGE``, alone or in the list. An object may name its
    image as in ``_OF_IMAGE``.

    Raises:
        ItemError: ``bad_row``.
    """
    value = listed(value)
    values = value if isinstance(value, list | tuple) else [value]
    images = (_image(v, f"{column}[{i}]" if values is value else column) for i, v in enumerate(values))
    return tuple(image for image in images if image is not None)


def listed(value: Any) -> Any:
    """A list that stands in a cell of text as JSON, as in CSV files; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if isinstance(found, list) else value
    return value


_NO_IMAGE = frozenset({"null", "NULL", "None", "none", "nan", "NaN", "NaT", "<NA>"})
"""What exports write where nothing is. No image has such a name: it would have a suffix."""
_OF_IMAGE = (
    *("bytes", "data", "imagebytes", "imagedata", "base64", "b64", "path", "filename", "filepath", "imagepath", "file"),
    *("imageurl", "imageuri", "url", "uri", "image"),
)
"""Names, without case and punctuation, under which an object holds an image: its bytes before where it is."""


def _image(value: Any, where: str) -> str | bytes | None:
    if isinstance(value, dict):
        value = _in_object(value, where)
    if is_absent(value) or (isinstance(value, str) and value.strip() in _NO_IMAGE):
        return None
    if isinstance(value, str):
        return _valid_name(value, where)
    if isinstance(value, bytes):
        return value  # decoding rejects zero bytes as a corrupt image
    raise ItemError("bad_row", f"{where} is {repr(value)[:60]}; an image is a path, a URI or bytes")


def _in_object(found: dict[Any, Any], where: str) -> Any:
    """What an object says its image is; ``None`` where all that it holds is absent.

    Raises:
        ItemError: ``bad_row`` where it holds something, and no image under a known name.
    """
    filled = {re.sub(r"[\W_]+", "", str(key)).lower(): value for key, value in found.items() if not is_blank(value)}
    for name in _OF_IMAGE:
        if name in filled:
            value = filled[name]
            return _in_object(value, f"{where}.{name}") if isinstance(value, dict) else value
    if filled:
        raise ItemError(
            "bad_row",
            f"{where} is an object with {', '.join(sorted(map(repr, found)))[:200]}, and none of them holds an image; "
            "name it bytes, data, path, file_name, url, uri or image_url",
        )
    return None


def _valid_name(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ItemError("bad_row", f"{where} is not valid Unicode: {error.reason} at {error.start}") from error
    if "\0" in value:
        raise ItemError("bad_row", f"{where} holds a zero character; it is not a path")
    return value
