"""The pictures of hits, read again from where their items came from: an index has none.

Those of prepared tables are found by their id. Any other is read by its ``uri`` as ``crem embed`` read it: in the
folder of the items, or where ``embed.image_roots`` and ``embed.url_hosts`` allow, and decoded within the model's
bounds. A picture that stood in the table itself, as bytes without a ``uri``, is not sought.

A picture that cannot be read is a reason, never an error: the hits are there without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from crem.config import ImageAccess, ImageConfig
from crem.data.images import decode_image, encode_image, load_image
from crem.data.items import ImageSource
from crem.errors import CremError, shortened
from pipelines.reports.pages import data_url
from pipelines.search.opened_index import Hit
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.tables.prepared import index_images
from pipelines.tables.storage import Folder

__all__ = ["HitPictures", "Picture", "picture_of"]

log = logging.getLogger(__name__)

_PIXELS = 240 * 240
"""Of a picture on the page."""
_TIMEOUT_S = 20.0
"""How long a picture waits for storage that does not answer."""


@dataclass(frozen=True)
class Picture:
    """A picture for a page, or why there is none."""

    url: str = ""
    """``data:`` URL"""
    size: str = ""
    missing: str = ""


def picture_of(source: ImageSource, limits: ImageConfig) -> Picture:
    """A picture of the query; the caller named it, so any place may be read."""
    image = load_image(source, limits)
    return Picture(data_url(encode_image(image, _PIXELS)[0]), f"{image.width} x {image.height}")


class HitPictures:
    """Reads the pictures of hits of one index.

    Args:
        source: where the items came from, as ``crem embed`` was told.
        limits: bounds on bytes and pixels of an image.
        access: what may be read outside of ``source``.
    """

    def __init__(self, source: str | None, limits: ImageConfig, access: ImageAccess):
        self._source, self._limits, self._access = source, limits, access
        self._read: Callable[[Hit], bytes] | None = None
        self._unreadable = "" if source is not None else "the index does not say where its items came from"

    def __call__(self, hit: Hit) -> Picture | None:
        """The picture of a hit, ``None`` for an item of text alone."""
        if hit.uri is None and hit.text is not None:
            return None
        try:
            data = self._bytes(hit)
            decoded = decode_image(data, self._limits)
            return Picture(data_url(encode_image(decoded.image, _PIXELS)[0]), f"{decoded.width} x {decoded.height}")
        except (CremError, OSError, LookupError) as error:
            return Picture(missing=str(error) or type(error).__name__)

    def _bytes(self, hit: Hit) -> bytes:
        if self._read is None and not self._unreadable:
            assert self._source is not None
            try:
                self._read = _reader(self._source, self._limits, self._access)
            except (CremError, OSError) as error:
                self._unreadable = str(error)
                log.warning("no pictures: %s", error)
        if self._read is None:
            raise LookupError(self._unreadable)
        return self._read(hit)


def _reader(source: str, limits: ImageConfig, access: ImageAccess) -> Callable[[Hit], bytes]:
    if Folder.at(source).exists("rejected"):
        places = index_images(source)
        return lambda hit: places.fetch(np.array([hit.id], np.int64))[hit.id]
    found = sources.find(source, what="item table")
    folders = {name.rpartition("/")[0] for name in found.names}
    near = folders.pop() if len(folders) == 1 else ""  # the index does not know of which file a row is
    images = replace(ImageReader.of(found.root, limits, access, found.archives), timeout_s=_TIMEOUT_S)

    def read(hit: Hit) -> bytes:
        if hit.uri is None:
            raise LookupError(f"the item has no uri; its picture stands in a table of {shortened(source)}")
        return images.read(hit.uri, near=near)

    return read
