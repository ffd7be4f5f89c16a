"""Which columns stand beside a vector, and of which types: the caller's own id, and the columns of ``embed.keep``.

Their types come from the first rows of the input. A value of a later row that does not fit is that row's error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from crem.config import EmbedConfig
from crem.errors import ConfigError
from crem.model.memory import MemoryLayout
from pipelines.formats.sampling import chosen_files, sample_files
from pipelines.formats.unknown_columns import nearest_name
from pipelines.sources import sources
from pipelines.sources.records import RawRecord
from pipelines.sources.sources import SourceFiles
from pipelines.tables import schema

__all__ = ["ColumnFaults", "OutputColumns", "id_of", "typed"]

ColumnFaults = dict[int, str]
"""What is wrong with a value, by the place of its row."""
_FILES, _ROWS = 8, 64
_OF_LANCE = ("_rowid", "_rowaddr", "_rowoffset", "_distance", "_score", "_relevance_score")
_OWN = ("embedding", "scale", "error", "uri", "text", "states", "memory", "id")


@dataclass(frozen=True)
class OutputColumns:
    """Of every file of an output."""

    id_names: tuple[str, ...]
    """The columns of the input that are the id."""
    id: pa.DataType
    """int64 where the input has no such column: then the id is a hash of the content."""
    kept: tuple[pa.Field, ...]

    @classmethod
    def of(cls, source: SourceFiles, settings: EmbedConfig) -> OutputColumns:
        """By the first rows of some files.

        Raises:
            ConfigError: no file has a column of ``keep``, or the output has one of this name already.
        """
        keep = settings.keep
        mapped = next((theirs for theirs, ours in settings.columns.items() if ours == "id"), "id")
        id_names = settings.id or (mapped,)
        samples = sample_files(source)
        present = {name for sample in samples for name in sample.columns}
        for name in keep:
            if name in _OWN:
                raise ConfigError(f"embed.keep names {name!r}, which every output has; leave it out")
            if settings.output_format == "lance" and ("." in name or name in _OF_LANCE):
                raise ConfigError(
                    f"embed.keep names {name!r}, which no column of a Lance dataset may be called: "
                    + ("there a dot names a field of a struct" if "." in name else "Lance has a column of that name")
                    + "; rename it in the input, or leave embed.output_format=lance out"
                )
        for setting, names in (("id", settings.id), ("keep", keep)):
            for name in names:
                if name not in present:
                    near = nearest_name(name, present)
                    hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(present)[:12])}"
                    raise ConfigError(f"embed.{setting} names {name!r}, and no sampled file has such a column; {hint}")
        wanted = [name for name in dict.fromkeys((*id_names, *keep)) if name in present]
        records = _records(source, wanted) if wanted else []
        own = _type_of([id_of(record, id_names) for record in records]) if id_names[0] in present else pa.int64()
        return cls(
            id_names, own, tuple(pa.field(name, _type_of([record.get(name) for record in records])) for name in keep)
        )

    @property
    def id_text(self) -> str:
        """For messages."""
        return " + ".join(self.id_names)

    def schema(self, stamp: schema.EmbeddingStamp, memory: MemoryLayout | None = None) -> pa.Schema:
        """Of the output: that of ``schema.embeddings`` and the kept columns."""
        plain = schema.embeddings(stamp, memory)
        fields = [pa.field("id", self.id), *list(plain)[1:], *self.kept]
        return pa.schema(fields, metadata=plain.metadata)

    def described(self) -> dict[str, str]:
        """Names and types, for a plan."""
        return {"id": str(self.id)} | {field.name: str(field.type) for field in self.kept}


def id_of(record: RawRecord, names: Sequence[str]) -> Any:
    """The id that a row has; of several columns an object, which is there if one of them is."""
    if len(names) == 1:
        return record.get(names[0])
    found = {name: record.get(name) for name in names}
    return None if all(value is None for value in found.values()) else found


def typed(values: Sequence[Any], of: pa.DataType, name: str) -> tuple[pa.Array, ColumnFaults]:
    """The column of these values; those that do not fit are null."""
    if pa.types.is_string(of):
        return pa.array([_text(value) for value in values], of), {}
    whole = pa.types.is_integer(of)  # for which Arrow would cut the fraction of 3.5
    try:
        if not (whole and any(isinstance(value, float) for value in values)):
            return pa.array(values, of), {}
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        pass
    faults: ColumnFaults = {}
    fitting = []
    for place, value in enumerate(values):
        try:
            if whole and isinstance(value, float):
                raise TypeError(value)
            fitting += pa.array([value], of).to_pylist()
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            fitting.append(None)
            faults[place] = f"bad_value: column {name!r} holds {of} in the first rows, and here {str(value)[:100]!r}"
    return pa.array(fitting, of), faults


def _records(source: SourceFiles, names: Sequence[str]) -> list[RawRecord]:
    """Values of columns in the first rows of some files."""
    found: list[RawRecord] = []
    chosen = set(chosen_files(source.names, _FILES))
    for place, name in enumerate(source.names):
        if name in chosen:
            first = next(sources.split(source.chunk(place, place + 1), None, _ROWS), None)
            rows = () if first is None else islice(sources.read(first, names), _ROWS)
            found += [row.record for row in rows if row.record is not None]
    return found


def _type_of(values: Sequence[Any]) -> pa.DataType:
    """Of the values of some rows; text where they are of several types, or all null."""
    if any(type(value) is int and value >= 2**63 for value in values):
        values = [np.uint64(value) if type(value) is int and 0 <= value < 2**64 else value for value in values]
    try:
        found = pa.array([value for value in values if value is not None]).type
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return pa.string()
    return pa.string() if pa.types.is_null(found) else found


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
