"""Counts by name stay small, whatever users write into the columns that are counted."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from pipelines.corpus.table_statistics import MOST_NAMES, TableStatistics, is_bounded
from pipelines.tables import schema


def rows(first: int, count: int) -> pa.Table:
    """Rows of which each has a source and a task of its own, and one of a common source."""
    item = {"text": "q", "instruction": None, "images": [], "image_at": []}
    names = [str(number) for number in range(first, first + count)]
    found = [{"source": f"s{name}", "task": f"t{name}", "split": "train", "query": item} for name in names]
    return pa.Table.from_pylist([*found, {**found[0], "source": "common", "task": "common"}], schema=schema.ROWS)


def test_beyond_the_largest_names_are_counted_together() -> None:
    total = TableStatistics()
    for first in range(0, 6000, 2000):
        total += TableStatistics.of_rows(rows(first, 2000))
    assert sum(total.by_source.values()) == sum(total.by_split_task.values()) == total.rows == 6003
    assert len(total.by_source) <= MOST_NAMES + 1 and total.by_source["common"] == 3
    assert len(total.by_split_task) <= MOST_NAMES + 1 and total.by_split_task["train/common"] == 3
    assert total.by_split_task["train/(other)"] == 6003 - 3 - (len(total.by_split_task) - 2)
    assert is_bounded(total.by_split_task)


def test_few_names_are_counted_one_by_one() -> None:
    total = TableStatistics.of_rows(rows(0, 10)) + TableStatistics.of_rows(rows(0, 10))
    assert Counter(total.by_source.values()) == {2: 11} and not is_bounded(total.by_split_task)
