"""What the files of a corpus are: their formats, and what becomes of each column, before a job begins.

The driver looks at the first rows of some files (``detect_source``). A column that is unknown and nearly the name of a
known one is refused there, since its content would be lost silently; any other unknown column is said once. The result
travels to the tasks, which read records by it (``record_reader``).
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from crem.config import EmbedConfig, LayoutConfig
from crem.errors import ConfigError
from pipelines.formats.cells import is_absent
from pipelines.formats.format import Format
from pipelines.formats.paths import split_of_folder
from pipelines.formats.registry import FORMATS, format_named, matching_formats
from pipelines.formats.sampling import FileSample, sample_files
from pipelines.formats.unknown_columns import UnknownColumns, nearest_name
from pipelines.sources.records import RawRecord
from pipelines.sources.sources import SourceFiles

__all__ = ["ColumnUse", "Detection", "Layout", "detect", "detect_source", "misspelt", "remedy", "renamed"]

_SHOWN = 12
"""Names in a message."""


@dataclass(frozen=True)
class ColumnUse:
    """What becomes of a column."""

    name: str
    """As the table has it."""
    use: str
    """``used``, ``spare`` (read where another is empty), ``ignored`` (not needed by the format) or ``unknown``."""
    meaning: str
    """Of ``Column``; empty where it is unknown."""
    nearest: str | None = None
    """Of an unknown column: the known name that it may be meant to be."""


@dataclass(frozen=True)
class Layout:
    """Sampled files with the same columns."""

    format: str
    columns: tuple[ColumnUse, ...]
    files: tuple[str, ...]

    def of_use(self, use: str) -> list[ColumnUse]:
        """The columns with this use."""
        return [column for column in self.columns if column.use == use]


@dataclass(frozen=True)
class Detection:
    """How to read a corpus. It goes to every task."""

    layouts: tuple[Layout, ...]
    settings: LayoutConfig
    section: str
    """Section of the configuration that ``settings`` is: ``prepare`` or ``embed``."""
    folder_split: str | None = None
    """The split that the folder of the corpus says."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats, in the order in which they are tried."""
        found = {layout.format for layout in self.layouts}
        return tuple(known.name for known in FORMATS if known.name in found)

    def warnings(self, unknown: UnknownColumns | None = None) -> list[str]:
        """A line for each unknown column, with the number of rows that have it, where they have been counted."""
        names = {column.name: column.nearest for layout in self.layouts for column in layout.of_use("unknown")}
        strange = {
            n: {layout.format for layout in self.layouts if any(c.name == n for c in layout.of_use("unknown"))}
            for n in names
        }
        counts = unknown.counts if unknown else {}
        lines = []
        for name in [*names, *(name for name in counts if name not in names)]:
            near = names.get(name)
            found = [known for known in self.formats if known in strange.get(name, self.formats)]
            rows = f" ({counts[name]} rows)" if name in counts else ""
            hint = f"; is it {near!r}?" if near else ""
            lines.append(f"column {name!r} is not known to {' or '.join(found)} and is not read{rows}{hint}")
        if unknown and unknown.others:
            lines.append(f"and {unknown.others} more cells in columns of other unknown names")
        return lines

    def reading(self) -> dict[str, JsonValue]:
        """What decides the rows besides the files, for the plan of a job that can be continued."""
        return {
            "formats": list(self.formats),
            "columns": dict(self.settings.columns),
            "side": getattr(self.settings, "side", None),
        }

    def mapping(self) -> list[dict[str, object]]:
        """The layouts as plain values, for a manifest or a page."""
        return [
            {"format": layout.format, "files": list(layout.files), "columns": [asdict(c) for c in layout.columns]}
            for layout in self.layouts
        ]


def detect_source(source: SourceFiles, settings: LayoutConfig, *, section: str) -> Detection:
    """Recognise the formats of a corpus from the first rows of some of its files.

    Args:
        section: section of the configuration that ``settings`` is, for the remedies in messages.

    Raises:
        ConfigError: no format, or several, fit a file; a column is nearly one that is known; a setting names a format
            or a column that does not exist; or the format has two sides and ``embed.side`` does not say which.
    """
    for theirs, ours in settings.columns.items():
        _check_ours(theirs, ours, section)
    _check_twins(source)
    samples = [sample for sample in sample_files(source) if sample.columns]
    _check_theirs(samples, settings, section)
    layouts: dict[str, Layout] = {}
    for sample in samples:
        layout = detect(sample, settings, section=section)
        same = json.dumps([layout.format, sorted(c.name for c in layout.columns)])
        seen = layouts.get(same)
        files = (*(seen.files if seen else ()), sample.file)
        layouts[same] = Layout(layout.format, layout.columns, files)
    return Detection(tuple(layouts.values()), settings, section, split_of_folder(source.folder.uri))


def detect(sample: FileSample, settings: LayoutConfig, *, section: str) -> Layout:
    """The layout of one file. Raises as ``detect_source`` does."""
    columns = tuple(renamed({name: name for name in sample.columns}, settings.columns, sample.file))
    records = [renamed(record, settings.columns, sample.file) for record in sample.records]
    known = _format(sample.file, columns, records, settings, section)
    _check_side(sample.file, known, settings)
    wrong = _misspelt_in(known, columns, records)
    if wrong and not settings.allow_unknown:
        name, meant = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{sample.file} has a column {name!r}, which {known.name} does not know; did you mean {meant!r}?{more} "
            f"{remedy(name, meant, columns, section)}"
        )
    names = dict.fromkeys([*columns, *(name for record in records for name in known.names(record))])
    uses = tuple(_use(known, name, wrong.get(name), tuple(names)) for name in names)
    return Layout(known.name, uses, (sample.file,))


def renamed(record: RawRecord, columns: Mapping[str, str | None], where: str = "") -> RawRecord:
    """The record by the names of ``LayoutConfig.columns``.

    Raises:
        ConfigError: a new name is that of another column that is not empty.
    """
    if not columns:
        return record
    values: RawRecord = {}
    for name, value in record.items():
        ours = columns.get(name, name)
        if ours is None:
            continue
        if ours in record and ours != name and columns.get(ours, ours) == ours and not is_absent(record[ours]):
            raise ConfigError(f"{where} has a column {ours!r} already; {name!r} cannot be renamed to it")
        values[ours] = value
    return values


def misspelt(known: Format, names: Sequence[str]) -> dict[str, str]:
    """The columns of one record that are nearly a used column of the format, which the record lacks."""
    present = set(names)
    wanted = [column.name for column in known.columns if column.used and column.name not in present]
    near = {name: nearest_name(name, wanted) for name in names if known.column(name) is None}
    return {name: meant for name, meant in near.items() if meant is not None}


def remedy(name: str, meant: str, columns: Sequence[str], section: str) -> str:
    """What to do about a misspelt column. ``columns`` are those of the table: what is inside of one is not mapped."""
    inside = name not in columns
    mapping = "" if inside else f", or read it so with {section}.columns={{{name}: {meant}}}"
    return f"Rename it{mapping}; {section}.allow_unknown=true goes on without it"


def _misspelt_in(known: Format, columns: Sequence[str], records: Sequence[RawRecord]) -> dict[str, str]:
    """``misspelt`` over the first records, each distinct set of names once."""
    sets = {tuple(known.names(record)) for record in records} or {tuple(columns)}
    found: dict[str, str] = {}
    for names in sorted(sets):
        found |= misspelt(known, names)
    return found


def _use(known: Format, name: str, meant: str | None, names: Sequence[str]) -> ColumnUse:
    column = known.column(name)
    first = known.preferred(name, names)
    if column is not None and column.used and first is not None:
        return ColumnUse(name, "spare", f"{column.meaning}; read where {first!r} is empty")
    if column is not None:
        return ColumnUse(name, "used" if column.used else "ignored", column.meaning)
    nearest = meant or nearest_name(name, [c.name for c in known.columns])
    return ColumnUse(name, "unknown", "", nearest)


def _format(
    file: str, columns: Sequence[str], records: Sequence[RawRecord], settings: LayoutConfig, section: str
) -> Format:
    if settings.format != "auto":
        return format_named(settings.format)
    found = matching_formats(frozenset(columns), records)
    if len(found) == 1:
        if section == "prepare" and found[0].name == "texts":
            raise ConfigError(
                f"{file} has texts and no images ({', '.join(columns[:_SHOWN])}), which makes no pair; name the sides "
                "with prepare.columns={theirs: query_text, theirs: target_text}"
            )
        return found[0]
    if found:
        raise ConfigError(
            f"{file} could be {' or '.join(known.name for known in found)} by its columns "
            f"{list(columns[:_SHOWN])}; say which with {section}.format={found[0].name}"
        )
    every = [column.name for known in FORMATS for column in known.columns if column.used]
    near = {name: near for name in columns if (near := nearest_name(name, every))}
    hint = f" Did you mean {', '.join(f'{meant!r} by {name!r}' for name, meant in near.items())}?" if near else ""
    raise ConfigError(
        f"{file} has the columns {list(columns[:_SHOWN])}; none of them is known, so its rows cannot be read.{hint} "
        f"Map them with {section}.columns={{{columns[0]}: {'query_text' if section == 'prepare' else 'text'}}}, "
        f"name one of the formats {', '.join(known.name for known in FORMATS)} with {section}.format=NAME, "
        "or leave the file out with a pattern such as '.../*.parquet' in place of the folder"
    )


def _check_twins(source: SourceFiles) -> None:
    """Refuse tars with their tables beside them, as img2dataset writes them: both hold the same rows."""
    names = set(source.names)
    twin = next(
        (n for n in source.names if n.endswith(".parquet") and n.removesuffix("parquet") + "tar" in names), None
    )
    if twin is not None:
        folder = f"{source.folder.uri}/{posixpath.dirname(twin)}".rstrip("/")
        raise ConfigError(
            f"{twin} and the tar of the same name hold the same rows (img2dataset writes both), which would be read "
            f"twice; give {folder}/*.tar or {folder}/*.parquet instead of the folder"
        )


def _check_side(file: str, known: Format, settings: LayoutConfig) -> None:
    if known.pairs and isinstance(settings, EmbedConfig) and settings.side is None:
        raise ConfigError(
            f"{file} holds {known.title} ({known.name}), each with two sides; say which to embed with "
            "embed.side=query or embed.side=target"
        )


def _check_ours(theirs: str, ours: str | None, section: str) -> None:
    if ours is None or any(known.column(ours) is not None for known in FORMATS):
        return
    near = nearest_name(ours, [column.name for known in FORMATS for column in known.columns])
    raise ConfigError(
        f"{section}.columns maps {theirs!r} to {ours!r}, which no format knows; "
        + (f"did you mean {near!r}?" if near else "give a column such as query_text, query_images or target_text")
    )


def _check_theirs(samples: Sequence[FileSample], settings: LayoutConfig, section: str) -> None:
    present = [name for sample in samples for name in sample.columns]
    for theirs in settings.columns:
        if present and theirs not in present:
            near = nearest_name(theirs, present)
            raise ConfigError(
                f"{section}.columns names {theirs!r}, and no sampled file has such a column; "
                + (f"did you mean {near!r}?" if near else f"there are {sorted(set(present))[:_SHOWN]}")
            )
