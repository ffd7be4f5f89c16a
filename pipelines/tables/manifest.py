"""The manifest of prepared tables: written last, its presence means complete."""

from __future__ import annotations

from typing import Any

from crem.errors import ConfigError
from pipelines.tables.storage import Folder

__all__ = ["read_manifest"]

KIND = "prepare"
MANIFEST = "manifest.json"


def read_manifest(prepared: Folder) -> dict[str, Any]:
    """The manifest of prepared tables.

    Raises:
        ConfigError: nothing there, or a run that was not completed.
    """
    manifest = prepared.read_json(MANIFEST)
    if isinstance(manifest, dict) and manifest.get("kind") == KIND:
        return manifest
    raise ConfigError(f"{prepared.uri} holds no completed prepared tables (no {MANIFEST}); run crem prepare into it")
