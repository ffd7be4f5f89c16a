"""The manifest of prepared tables: written last, its presence means complete."""

from __future__ import annotations

import json
from typing import ClassVar, Literal

from pydantic import JsonValue

from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.json_file import JsonFile
from pipelines.tables.storage import Folder, JobKind

__all__ = ["PrepareManifest", "read_manifest", "table_parts"]


class PrepareManifest(JsonFile):
    """What ``crem prepare`` made of a corpus; ``rows_in == rows_out + rejected + filtered``."""

    FILE: ClassVar[str] = "manifest.json"

    kind: Literal[JobKind.PREPARE] = JobKind.PREPARE
    rows_in: int
    rows_out: int
    rejected: int
    filtered: int = 0
    images: int
    """Distinct images in the image table."""
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

        ``format`` is left out: tables from before that key keep their id.
        """
        return schema.content_id(json.dumps(self.model_dump(mode="json", exclude={"format"})).encode())


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
