"""The first rows of some files of a corpus, to recognise what they are."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources import sources
from pipelines.sources.records import RawRecord, unreadable_file
from pipelines.sources.sources import SourceFiles

__all__ = ["FileSample", "chosen_files", "class_names", "sample_files"]

_FILES = 64
_ROWS = 32
_THREADS = 8


@dataclass(frozen=True)
class FileSample:
    """The first rows of a file."""

    file: str
    """Path from the folder of the corpus."""
    columns: tuple[str, ...]
    """Of its schema, or of the rows where it has none."""
    records: tuple[RawRecord, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of ``RowContext``."""


def sample_files(source: SourceFiles) -> list[FileSample]:
    """The first ``_ROWS`` rows of up to ``_FILES`` files, in the order of the corpus.

    Raises:
        ConfigError: a file cannot be read.
    """
    names = chosen_files(source.names)
    with ThreadPoolExecutor(min(_THREADS, len(names) or 1)) as threads:
        return list(threads.map(lambda name: _sample(source, name), names))


def chosen_files(names: Sequence[str], most: int = _FILES) -> list[str]:
    """Up to ``most`` files: one of each folder and kind before a second of any, spread over the corpus."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        groups.setdefault((posixpath.dirname(name), posixpath.splitext(name)[1]), []).append(name)
    firsts = _spread([group[0] for group in groups.values()], most)
    rest = sorted(set(names) - set(firsts))
    return sorted({*firsts, *_spread(rest, most - len(firsts))})


def _spread(names: list[str], most: int) -> list[str]:
    step = max(1, -(-len(names) // most)) if most > 0 else len(names) + 1
    return names[::step] if most > 0 else []


def _sample(source: SourceFiles, name: str) -> FileSample:
    if name.lower().endswith(".parquet"):
        return _sample_parquet(source, name)
    records = tuple(islice(_records(source, name), _ROWS))
    return FileSample(name, tuple(dict.fromkeys(column for record in records for column in record)), records)


def _records(source: SourceFiles, name: str) -> Iterator[RawRecord]:
    for rows in sources.split(replace(source, names=(name,)), (), _ROWS)[:1]:
        yield from (row.record for row in sources.read(rows, ()) if row.record is not None)


def _sample_parquet(source: SourceFiles, name: str) -> FileSample:
    try:
        with source.folder.open(name) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            return FileSample(name, tuple(schema.names), labels=class_names(schema.metadata or {}))
    except (pa.ArrowException, EOFError, OSError) as error:
        raise unreadable_file(source.folder.uri, name, error) from error


def class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of the classes by column, from the schema metadata that ``datasets`` writes."""
    try:
        features: dict[str, Any] = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}  # of a list of labels
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = tuple(str(name) for name in inner["names"])
    return found
