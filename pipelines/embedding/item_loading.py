"""Rows to prepared items, here or in a process apart; a row that cannot be prepared is an item with its error.

``ItemLoader`` is the usual way. ``ApartLoader`` takes over when the process of a piece has died again and again: one
item at a time in a process apart, so that the item at fault is known and its neighbours are embedded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from types import TracebackType
from typing import Self

from crem.checkpoint import read_collator
from crem.data.collator import Collator
from crem.data.items import Item
from crem.data.sequence import PreparedSequence
from crem.errors import CremError, ItemError
from pipelines.embedding import item_table
from pipelines.embedding.deadlines import arm, deadline
from pipelines.embedding.isolated_calls import IsolatedCalls
from pipelines.embedding.item_table import LoadedItem
from pipelines.embedding.output_columns import OutputColumns
from pipelines.formats.detection import Detection
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.unknown_columns import UnknownColumns
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import SourceRow

__all__ = ["ApartLoader", "ItemLoader", "LoaderSettings"]


@dataclass(frozen=True)
class LoaderSettings:
    """What a loader needs; pickles."""

    model: str
    chorus_tokens: int | None
    reader: ImageReader
    detection: Detection
    columns: OutputColumns
    timeout_s: float
    """Longest time to decode and tokenise one item."""
    attempts: int
    """How many processes apart may die of an item."""
    read: Callable[[str], Collator] = read_collator

    @property
    def keep(self) -> list[str]:
        """Columns whose values go along."""
        return [column.name for column in self.columns.kept]


class ItemLoader:
    """Loads items in this process, which ends if one takes too long."""

    def __init__(self, settings: LoaderSettings):
        self.settings = settings
        self.collator = _collator(settings.read, settings.model)
        self.records = RecordReader(settings.detection, "items")

    @property
    def unknown(self) -> UnknownColumns:
        """The columns that were not read so far."""
        return self.records.unknown

    def __call__(self, row: SourceRow) -> LoadedItem:
        settings = self.settings
        with deadline(settings.reader.timeout_s + settings.timeout_s):  # storage that is away is not the item's fault
            try:
                return item_table.load_item(
                    row,
                    self.records,
                    settings.reader,
                    self.collator.limits,
                    self._prepare,
                    id_names=settings.columns.id_names,
                    keep=settings.keep,
                )
            except (CremError, OSError, MemoryError):
                raise
            except Exception as error:  # of a decoder or of ours: the row's, as far as anybody can know
                return _failed(row, settings, ItemError("unexpected_error", f"{type(error).__name__}: {error}"))

    def _prepare(self, item: Item) -> PreparedSequence:
        arm(self.settings.timeout_s)
        return self.collator.prepare(item, chorus_tokens=self.settings.chorus_tokens or None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class ApartLoader:
    """Loads each item in a process apart, and outlives it."""

    def __init__(self, settings: LoaderSettings):
        self.settings, self.unknown = settings, UnknownColumns()
        self._calls = IsolatedCalls(
            partial(_serve, settings),
            timeout_s=settings.timeout_s,
            attempts=settings.attempts,
            doing="reading and preparing the item",
        )

    def __call__(self, row: SourceRow) -> LoadedItem:
        try:
            item, unknown = self._calls(row)
        except ItemError as error:
            return _failed(row, self.settings, error)
        self.unknown.counts.update(unknown.counts)
        self.unknown.others += unknown.others
        loaded: LoadedItem = item
        return loaded

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.__exit__(kind, error, trace)


def _serve(settings: LoaderSettings) -> Callable[[SourceRow], tuple[LoadedItem, UnknownColumns]]:
    """In the process apart: loads a row, and says which of its columns are not read."""
    loader = ItemLoader(settings)

    def load(row: SourceRow) -> tuple[LoadedItem, UnknownColumns]:
        loader.records.unknown = UnknownColumns()
        item = loader(row)
        return item, loader.unknown

    return load


def _failed(row: SourceRow, settings: LoaderSettings, error: ItemError) -> LoadedItem:
    return item_table.failed_item(row, str(error), id_names=settings.columns.id_names, keep=settings.keep)


@lru_cache(1)
def _collator(read: Callable[[str], Collator], model: str) -> Collator:
    return read(model)
