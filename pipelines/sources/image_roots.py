"""From where the rows of a corpus may name images: a corpus comes from elsewhere, and the job has its owner's rights.

Allowed are the corpus folder, its bucket, and what ``prepare.image_roots`` (``embed.image_roots``) names. A path is
resolved first, so neither ``..`` nor a symbolic link leads out. One layout is known: in a snapshot of the Hugging Face
hub's cache every file is a link to ``blobs/`` of the same repository.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

from crem.errors import ItemError, shortened

__all__ = ["ImageRoots"]

_SAME = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "local": "file", "": "file"}


@dataclass(frozen=True)
class ImageRoots:
    """The places that may be read."""

    corpus: str
    """Path or URI of the corpus."""
    others: tuple[str, ...] = ()
    """Paths and URIs of the user's configuration."""

    def require_uri(self, uri: str) -> None:
        """Refuse a URI of an object store that is outside.

        Raises:
            ItemError: ``uri_refused``.
        """
        scheme, place = _split(uri)
        own_scheme, own = _split(self.corpus)
        bucket = own.partition("/")[0] if own_scheme != "memory" else own
        allowed = [(own_scheme, bucket), *map(_split, self.others)]
        if not any(scheme == known and _is_below(place, folder) for known, folder in allowed if known != "file"):
            raise self._refusal(uri)

    def resolve(self, path: str, name: str) -> str:
        """The path of a local file without links and ``..``; ``name`` is what the row says.

        Raises:
            ItemError: ``uri_refused`` if it is outside.
        """
        folder, file = os.path.split(path)
        real = os.path.join(_real(folder), file)
        if file in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(path)
        if not any(_is_below(real, root) for root in _local_roots(self.corpus, self.others)):
            raise self._refusal(name)
        return real

    def _refusal(self, name: str) -> ItemError:
        return ItemError(
            "uri_refused",
            f"{shortened(name, 120)!r} is outside of the corpus; copy it, or allow its folder or bucket with "
            "prepare.image_roots=[…] (crem embed: embed.image_roots)",
        )


@lru_cache(maxsize=64)
def _local_roots(corpus: str, others: tuple[str, ...]) -> tuple[str, ...]:
    roots = [os.path.realpath(path) for scheme, path in map(_split, (corpus, *others)) if scheme == "file"]
    for root in tuple(roots):
        snapshots = os.path.dirname(root)
        blobs = os.path.join(os.path.dirname(snapshots), "blobs")
        if os.path.basename(snapshots) == "snapshots" and os.path.isdir(blobs):
            roots.append(blobs)
    return tuple(roots)


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _split(uri: str) -> tuple[str, str]:
    """Scheme and place; schemes of one kind of store are one."""
    scheme, mark, place = uri.partition("://")
    if not mark:
        return "file", uri
    scheme = _SAME.get(scheme.lower(), scheme.lower())
    return scheme, place if scheme == "file" else place.strip("/")


def _is_below(place: str, folder: str) -> bool:
    folder = folder.rstrip("/")
    return place == folder or place.startswith(folder + "/")
