"""The first rows of some files of a corpus, to recognise what they are."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from pipelines.sources import sources
from pipelines.sources.input_file import InputFile
from pipelines.sources.known_containers import container_named, container_of
from pipelines.sources.records import RawRecord
from pipelines.sources.sources import SourceFiles

__all__ = ["FileSample", "chosen_files", "place_of", "sample_files"]

_FILES = 64
_ROWS = 32
_THREADS = 8
_FEW_ROWS = {"tar": 4}
"""Rows that hold the bytes of images, so that few are read."""
_ONE_SCHEMA = frozenset({"parquet", "lance"})
"""Containers whose rows all have the same columns, so that none needs to be read."""


@dataclass(frozen=True)
class FileSample:
    """The first rows of a file."""

    file: str
    """Path from the folder of the corpus."""
    columns: tuple[str, ...]
    """Of its schema and of the rows."""
    records: tuple[RawRecord, ...] = ()


def sample_files(source: SourceFiles) -> list[FileSample]:
    """The first ``_ROWS`` rows of up to ``_FILES`` files, in the order of the corpus.

    Raises:
        ConfigError: a file is damaged.
        ResourceError: the storage stays away.
    """
    names = source.names
    places = {name: place for place, name in enumerate(names)}
    files = [next(source.chunk(places[name], places[name] + 1).files()) for name in chosen_files(names)]
    with ThreadPoolExecutor(min(_THREADS, len(files) or 1)) as threads:
        return list(threads.map(_sample, files))


def chosen_files(names: Sequence[str], most: int = _FILES) -> list[str]:
    """Up to ``most`` files: one of each folder and kind before a second of any, spread over the corpus."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        groups.setdefault(place_of(name), []).append(name)
    firsts = _spread([group[0] for group in groups.values()], most)
    rest = sorted(set(names) - set(firsts))
    return sorted({*firsts, *_spread(rest, most - len(firsts))})


def place_of(file: str) -> tuple[str, str]:
    """Folder and kind of a file: files that share both are likely to be of one format."""
    return posixpath.dirname(file), container_of(file) or posixpath.splitext(file)[1]


def _spread(names: list[str], most: int) -> list[str]:
    step = max(1, -(-len(names) // most)) if most > 0 else 1
    return names[::step] if most > 0 else []


def _sample(file: InputFile) -> FileSample:
    schema = sources.schema_of(file)
    records = () if file.container in _ONE_SCHEMA else _records(file)
    columns = dict.fromkeys([*schema.columns, *(column for record in records for column in record)])
    return FileSample(file.name, tuple(columns), records)


def _records(file: InputFile) -> tuple[RawRecord, ...]:
    rows = _FEW_ROWS.get(file.container, _ROWS)
    first = next(iter(container_named(file.container).split(file, rows)), None)
    if first is None:
        return ()
    return tuple(row.record for row in islice(sources.read(first), rows) if row.record is not None)
