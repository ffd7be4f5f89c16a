"""Where a raw corpus may lie: not in the output of a job, and not around one."""

from __future__ import annotations

from crem.errors import ConfigError
from pipelines.sources.sources import SourceFiles
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.storage import Folder

__all__ = ["require_outside", "require_raw"]

_PATIENCE_S = 20.0
"""Of a first look: storage that is not there at all is more likely a wrong address."""


def require_raw(source: str) -> None:
    """Refuse prepared tables.

    Raises:
        ConfigError: ``source`` is the output of ``crem prepare``.
    """
    folder = Folder.at(source).patient(_PATIENCE_S)
    if folder.exists("rejected") and PrepareManifest.read(folder) is not None:
        raise ConfigError(
            f"{folder.uri} holds tables that crem prepare made already: crem train reads them as they are, "
            "its card.html shows them, and crem verify checks them"
        )


def require_outside(source: str, corpus: SourceFiles, out: str) -> None:
    """Refuse an output folder that would become a part of the corpus.

    Args:
        source: as the user named the corpus; a single file or a pattern reads nothing else.

    Raises:
        ConfigError: ``out`` is the corpus, or a folder among its row files.
    """
    target = Folder.at(out).uri.rstrip("/")
    if target == corpus.root.uri.rstrip("/"):
        raise ConfigError(f"--out {out!r} is the corpus itself; choose another folder")
    is_folder = Folder.at(source).uri.rstrip("/") in (corpus.root.uri.rstrip("/"), corpus.folder.uri.rstrip("/"))
    if is_folder and target.startswith(f"{corpus.folder.uri.rstrip('/')}/"):
        raise ConfigError(
            f"--out {out!r} is inside the corpus {source!r}, of which it would be read as a part; choose a folder "
            "beside it"
        )
