"""The manifest of prepared tables: written last, its presence means complete."""

from __future__ import annotations

import json
from collections import Counter
from typing import ClassVar, Literal

from pydantic import JsonValue

from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.json_file import JsonFile
from pipelines.tables.storage import Folder, JobKind

__all__ = ["READ_SPLITS", "PrepareManifest", "read_manifest", "table_parts"]

READ_SPLITS = ("train", "validation", "test")
"""How the names of the splits begin that jobs read: training, validation while it runs, evaluation."""
_LATER_KEYS = {"format", "images_shrunk", "largest_source_pixels"}


class PrepareManifest(JsonFile):
    """What ``crem prepare`` made of a corpus; ``rows_in == rows_out + rejected + filtered``."""

    FILE: ClassVar[str] = "manifest.json"

    kind: Literal[JobKind.PREPARE, JobKind.SYNTHESISE, JobKind.MINE] = JobKind.PREPARE
    """The job that wrote this version of the tables."""
    rows_in: int
    rows_out: int
    rejected: int
    filtered: int = 0
    images: int
    """Distinct images in the image table."""
    images_shrunk: int = 0
    """Those of them that were larger than ``prepare.encode_max_pixels`` and are stored smaller."""
    largest_source_pixels: int = 0
    """Area of the largest of these before; 0 where none was shrunk."""
    by_reason: dict[str, int]
    """Rejected rows by reason."""
    by_split_task: dict[str, int]
    """Rows out by ``<split>/<task>``."""
    source_uri: str
    created_with: dict[str, str]
    """Versions of Python and of the packages that decide the stored bytes."""
    config: dict[str, JsonValue]
    """The settings ``prepare`` and ``model.image`` of the run."""

    @property
    def content_id(self) -> int:
        """Identifies these tables, so that a resumed run can tell whether they are still the same.

        Keys that came later are left out: tables from before them keep their id.
        """
        return schema.content_id(json.dumps(self.model_dump(mode="json", exclude=_LATER_KEYS)).encode())

    @property
    def unread_splits(self) -> dict[str, int]:
        """Rows out by split, of the splits that no job reads."""
        unread: Counter[str] = Counter()
        for name, count in self.by_split_task.items():
            if not name.startswith(READ_SPLITS):
                unread[name.partition("/")[0]] += count
        return dict(unread)


def read_manifest(prepared: Folder) -> PrepareManifest:
    """The manifest of prepared tables.

    Raises:
        ConfigError: there are none, or the run that makes them did not complete.
    """
    manifest = PrepareManifest.read(prepared)
    if manifest is None:
        raise ConfigError(
            f"{prepared.uri} holds no completed prepared tables (no {PrepareManifest.FILE}); run crem prepare into it"
        )
    return manifest


def table_parts(prepared: Folder, table: str) -> list[str]:
    """File names of the parts of a prepared table (``rows``, ``images`` or ``rejected``), in order."""
    return prepared.child(table).files(".parquet")
