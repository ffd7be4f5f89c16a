"""The manifest of prepared tables: written last, its presence means complete."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.json_file import JsonFile
from pipelines.tables.storage import Folder, JobKind

__all__ = [
    "FILTER_STAGES",
    "READ_SPLITS",
    "TABLES",
    "PartFile",
    "PrepareManifest",
    "listed_parts",
    "read_manifest",
    "read_part_files",
    "table_parts",
    "write_part_files",
]

TABLES = {"rows": schema.ROWS, "images": schema.IMAGES, "rejected": schema.REJECTED}
"""Prepared tables by the name of their folder."""
FILTER_STAGES = ("language", "duplicates", "contamination")
"""Stages that leave out good rows by choice; at any other stage a row is left out because it is bad."""

READ_SPLITS = ("train", "validation", "test")
"""How the names of the splits begin that jobs read: training, validation while it runs, evaluation."""
_FIRST_KEYS = {
    *("kind", "rows_in", "rows_out", "rejected", "filtered", "images", "by_reason", "by_split_task"),
    *("source_uri", "created_with", "config"),
}
_BATCH = 4096
_PART_FILES = pa.schema(
    [
        ("table", pa.string()),
        ("name", pa.string()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),
        ("checksum", pa.string()),
    ]
)


class PartFile(BaseModel):
    """A part of a prepared table."""

    model_config = ConfigDict(frozen=True)

    table: str
    """Name of the table and of its folder."""
    name: str
    rows: int
    bytes: int
    checksum: str
    """BLAKE2b of 16 bytes, in hexadecimal."""


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
    images_truncated: int = 0
    """Images whose files lack their end, taken as they are by ``model.image.allow_truncated``."""
    largest_source_pixels: int = 0
    """Area of the largest of these before; 0 where none was shrunk."""
    by_reason: dict[str, int]
    """Rejected and filtered rows by reason."""
    by_stage: dict[str, dict[str, int]] = Field(default_factory=dict)
    """The same by stage and reason."""
    by_split_task: dict[str, int]
    """Rows out by ``<split>/<task>``."""
    source_uri: str
    created_with: dict[str, str]
    """Versions of Python and of the packages that decide the stored bytes."""
    config: dict[str, JsonValue]
    """The settings ``prepare`` and ``model.image`` of the run."""
    records_in: int | None = None
    """Records of the corpus; one can hold several rows."""
    unknown_columns: dict[str, int] = Field(default_factory=dict)
    """Records that have a column which is not read, by its name."""
    layouts: list[dict[str, JsonValue]] = Field(default_factory=list)
    """The formats that were recognised, with the use of each column."""
    plan: str = ""
    """Identity of the input, settings and versions from which these tables were made."""
    version: str = ""
    """Part of the names of all files of these tables."""
    files: str = ""
    """Name of the table of parts (``read_part_files``); empty in tables from before it."""
    statistics: str = ""
    """Name of the file of statistics (``pipelines.corpus.table_statistics``)."""
    tables_checksum: str = ""
    """Of the checksums of all parts."""

    @property
    def content_id(self) -> int:
        """Identifies these tables, so that a resumed run can tell whether they are still the same.

        Tables from before ``tables_checksum`` keep the id that they had.
        """
        if self.tables_checksum:
            return schema.content_id(self.tables_checksum.encode())
        return schema.content_id(json.dumps(self.model_dump(mode="json", include=_FIRST_KEYS)).encode())

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
    """File names of the parts of a prepared table (``rows``, ``images`` or ``rejected``), in order.

    The manifest says which they are: the folder may hold those of an earlier or of the next version too.

    Raises:
        ConfigError: there are no complete tables, or their list of parts is missing.
    """
    manifest = read_manifest(prepared)
    if not manifest.files:  # tables from before the list
        return prepared.child(table).files(".parquet")
    return [file.name for file in read_part_files(prepared, manifest) if file.table == table]


def read_part_files(prepared: Folder, manifest: PrepareManifest) -> Iterator[PartFile]:
    """The parts of all tables, as the manifest lists them.

    Raises:
        ConfigError: the list is missing or damaged.
    """
    try:
        return listed_parts(prepared, manifest.files)
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{prepared.uri}/{manifest.files}, the list of parts, cannot be read: {error}; run crem prepare again"
        ) from error


def listed_parts(folder: Folder, name: str) -> Iterator[PartFile]:
    """The parts in a list of ``write_part_files``; few of them are objects at a time."""
    table = pq.read_table(pa.BufferReader(folder.read_bytes(name)), schema=_PART_FILES)
    return (PartFile(**row) for batch in table.to_batches(max_chunksize=_BATCH) for row in batch.to_pylist())


def write_part_files(folder: Folder, name: str, files: Iterable[PartFile]) -> None:
    """Write a list of parts, which a manifest then names."""
    sink, waiting = pa.BufferOutputStream(), iter(files)
    with pq.ParquetWriter(sink, _PART_FILES, compression="zstd") as writer:
        while batch := list(islice(waiting, _BATCH)):
            writer.write_table(pa.Table.from_pylist([file.model_dump() for file in batch], schema=_PART_FILES))
    folder.write_bytes(sink.getvalue().to_pybytes(), name)
