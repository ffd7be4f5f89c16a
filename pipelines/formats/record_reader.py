"""Records of a corpus to rows or items, in a task, by what the driver detected."""

from __future__ import annotations

from dataclasses import dataclass

from crem.errors import ItemError
from pipelines.formats.detection import Detection, misspelt, remedy, renamed
from pipelines.formats.format import Format, RowContext, Side
from pipelines.formats.paths import is_split, split_of
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.formats.registry import FORMATS, format_named
from pipelines.formats.sampling import place_of
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.sources.records import RawRecord, SourceRow

__all__ = ["RecordReader"]

_REMEMBERED = 4096
"""Sets of names of which it is remembered what is unknown in them."""


@dataclass(frozen=True)
class _Names:
    """What the names of a record say."""

    unknown: tuple[str, ...]
    known: bool
    """Whether any column is read besides the split."""
    misspelt: tuple[str, str] | None


class RecordReader:
    """Reads records, and counts the columns that are not read. One for each task."""

    def __init__(self, detection: Detection, source: str):
        """``source`` names the corpus in rows that do not name it."""
        self.detection = detection
        self.source = source
        self.unknown = UnknownColumns()
        self._formats = [format_named(name) for name in detection.formats] or list(FORMATS)
        self._of_file = {file: layout.format for layout in detection.layouts for file in layout.files}
        self._of_place: dict[tuple[str, str], str | None] = {}
        """Format of the sampled files of one folder and kind; None where they differ."""
        for file, name in self._of_file.items():
            agreed = self._of_place.setdefault(place_of(file), name)
            self._of_place[place_of(file)] = name if agreed == name else None
        self._side: Side | None = getattr(detection.settings, "side", None)
        self._names: dict[tuple[str, tuple[str, ...]], _Names] = {}

    def rows(self, row: SourceRow) -> list[RawRow]:
        """The rows of a record: at least one.

        Raises:
            ItemError: the record is bad; it becomes one rejected row.
        """
        record, context, known = self._opened(row)
        return known.rows(record, context)

    def item(self, row: SourceRow) -> RawItem:
        """The item of a record. Raises as ``rows`` does."""
        record, context, known = self._opened(row)
        return known.item(record, context)

    def _opened(self, row: SourceRow) -> tuple[RawRecord, RowContext, Format]:
        if row.record is None:
            raise ItemError("bad_row", row.parse_error)
        record = renamed(row.record, self.detection.settings.columns, row.name)
        known = self._format(row.file, record)
        names = self._look(known, tuple(known.names(record)))
        self.unknown.add(names.unknown)
        if names.misspelt and not self.detection.settings.allow_unknown:
            name, meant = names.misspelt
            section = self.detection.section
            raise ItemError(
                "unknown_column",
                f"{name!r} is not known to {known.name}; is it {meant!r}? "
                f"{remedy(name, meant, tuple(record), section)}",
            )
        if record and not names.known:
            raise ItemError(
                "unknown_columns", f"{known.name} knows none of the columns {list(record)[:12]}; is it another format?"
            )
        split = split_of(record, row.file, folder=self.detection.folder_split, within=row.within)
        context = RowContext(self.source, row.name, row.file, split, self._side)
        return record, context, known

    def _format(self, file: str, record: RawRecord) -> Format:
        """The format of the file, if it was sampled, or of all sampled ones beside it; else the first that fits."""
        if len(self._formats) == 1:
            return self._formats[0]
        name = self._of_file.get(file) or self._of_place.get(place_of(file))
        if name is not None:
            return format_named(name)
        names = frozenset(record)
        return next((known for known in self._formats if known.matches(names, [record])), self._formats[-1])

    def _look(self, known: Format, names: tuple[str, ...]) -> _Names:
        found = self._names.get((known.name, names))
        if found is None:
            columns = [known.column(name) for name in names]
            unknown = tuple(name for name, column in zip(names, columns, strict=True) if column is None)
            found = _Names(
                unknown,
                any(column is not None and column.used and not is_split(column.name) for column in columns),
                next(iter(misspelt(known, names).items()), None),
            )
            if len(self._names) < _REMEMBERED:
                self._names[known.name, names] = found
        return found
