"""Records as a task reads them: by the format that their columns are recognised as."""

from __future__ import annotations

from typing import Any

from crem.config import EmbedConfig, PrepareConfig
from crem.errors import ItemError
from pipelines.formats.detection import Detection, detect
from pipelines.formats.raw_rows import RawItem, RawRow
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.sampling import FileSample
from pipelines.sources.records import RawRecord, SourceRow

__all__ = ["item_of", "reader_of", "reason_of", "row_of", "rows_of"]


def reader_of(records: list[RawRecord], file: str = "a.jsonl", **settings: Any) -> RecordReader:
    """A reader of a corpus ``corpus`` whose one file has these records."""
    columns = tuple(dict.fromkeys(name for record in records for name in record))
    section = "embed" if "side" in settings else "prepare"
    config = (EmbedConfig if section == "embed" else PrepareConfig).model_validate(settings)
    layout = detect(FileSample(file, columns, tuple(records)), config, section=section)
    return RecordReader(Detection((layout,), config, section), "corpus")


def rows_of(record: RawRecord, file: str = "a.jsonl", **settings: Any) -> tuple[str, list[RawRow]]:
    """The format that a record is recognised as, and its rows. Its columns are all known."""
    reader = reader_of([record], file, **settings)
    rows = reader.rows(SourceRow("k", record, "", file))
    assert reader.unknown.counts == {}
    return reader.detection.formats[0], rows


def row_of(record: RawRecord, file: str = "a.jsonl", **settings: Any) -> RawRow:
    """The only row of a record."""
    _, (row,) = rows_of(record, file, **settings)
    return row


def item_of(record: RawRecord, file: str = "a.jsonl", side: str | None = None, **settings: Any) -> RawItem:
    """The item of a record, for ``crem embed``."""
    return reader_of([record], file, side=side, **settings).item(SourceRow("k", record, "", file))


def reason_of(record: RawRecord, **settings: Any) -> str:
    """Why a record is rejected."""
    try:
        rows = rows_of(record, **settings)
    except ItemError as error:
        return error.reason
    raise AssertionError(f"accepted: {rows}")
