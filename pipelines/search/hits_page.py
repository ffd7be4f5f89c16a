"""The hits of a search as one self-contained page, with their pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from crem.config import RunConfig
from crem.data.image_bytes import is_inline
from crem.errors import ConfigError, shortened
from pipelines.reports.pages import render
from pipelines.search.hit_pictures import HitPictures, picture_of
from pipelines.search.index_dataset import IndexSummary
from pipelines.search.opened_index import Hit
from pipelines.search.search import Query
from pipelines.tables.storage import Folder

__all__ = ["hits_page", "write_hits_page"]

_SHOWN = 100
"""Hits that the page shows, each with up to some 170 kB of picture."""
_TEXT = 2_000
"""Characters of a text that the page shows."""
_CELL = 200
"""Characters of the value of a column."""


def write_hits_page(file: str, index: str, query: Query, hits: Sequence[Hit], config: RunConfig) -> None:
    """Write ``hits_page`` to a file of this machine.

    Raises:
        ConfigError: it cannot be written there.
    """
    if "://" in file:
        raise ConfigError(f"--html {file!r} is a URI; give a file on this machine")
    page = hits_page(index, query, hits, config)
    try:
        Path(file).write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file!r} cannot be written: {error}; give a file in a folder that exists") from error


def hits_page(index: str, query: Query, hits: Sequence[Hit], config: RunConfig) -> str:
    """The page; what ``config.embed`` allows is read, within the bounds of ``config.model.image``."""
    summary = IndexSummary.read(Folder.at(index))
    assert summary is not None, index
    limits = config.model.image
    pictures = HitPictures(summary.source, limits, config.embed)
    return render(
        "hits.html.j2",
        q={
            "text": query.text or "",
            "images": [{"name": _name(image), "picture": picture_of(image, limits)} for image in query.images],
            "where": query.where or "",
            "order": _order(query),
            "index": index,
            "model": f"{summary.model} ({summary.fingerprint})",
            "count": summary.count,
            "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        },
        found=len(hits),
        hits=[
            {
                "rank": rank,
                "score": f"{hit.score:.4f}",
                "id": hit.id,
                "uri": hit.uri or "",
                "text": _cut(hit.text or "", _TEXT),
                "columns": [(name, _cut(str(value), _CELL)) for name, value in hit.columns.items()],
                "picture": pictures(hit),
            }
            for rank, hit in enumerate(hits[:_SHOWN], 1)
        ],
    )


def _order(query: Query) -> str:
    """What the scores are."""
    if query.rerank:
        return "MaxSim of the chorus states"
    return "reciprocal ranks of vectors and words" if query.hybrid else "cosine"


def _name(image: object) -> str:
    return "an image" if is_inline(image) else shortened(str(image))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"
