"""The containers that are known, and which of them reads a file."""

from __future__ import annotations

from pipelines.sources.container import Container
from pipelines.sources.csv_rows import CsvRows
from pipelines.sources.image_rows import ImageRows
from pipelines.sources.json_rows import JsonRows
from pipelines.sources.jsonl_rows import JsonlRows
from pipelines.sources.lance_rows import LanceRows
from pipelines.sources.parquet_rows import ParquetRows
from pipelines.sources.tar_rows import TarRows

__all__ = ["CONTAINERS", "container_named", "container_of"]

CONTAINERS: tuple[Container, ...] = (
    ParquetRows(),
    JsonlRows(),
    JsonRows(),
    CsvRows(),
    TarRows(),
    LanceRows(),
    ImageRows(),
)

_BY_NAME = {container.name: container for container in CONTAINERS}
_BY_SUFFIX = {suffix: container.name for container in CONTAINERS for suffix in container.suffixes}


def container_named(name: str) -> Container:
    """The container that a ``RowRange`` names."""
    return _BY_NAME[name]


def container_of(file_name: str) -> str | None:
    """Name of the container that claims a file by the longest end of its name, or ``None``."""
    parts = file_name.rpartition("/")[2].lower().split(".")
    ends = (f".{'.'.join(parts[i:])}" for i in range(max(1, len(parts) - 2), len(parts)))
    return next((_BY_SUFFIX[end] for end in ends if end in _BY_SUFFIX), None)
