"""What ``crem synthesise`` keeps of every answer, while it works and afterwards: answers cost money.

``plan.json`` is written first and says what the answers are of: the tables, the model and the prompt. A run into a
folder with another plan is refused. ``answers/`` has one part per shard, written when all rows of the shard are done,
with one record per row: its pairs or the reason why it has none, the model, endpoint and prompt that they come from,
and the tokens they took. Until then the records stand in ``_journal/``, in small files that are written about once a
second: what a killed run loses is what was in flight and the answers of that second.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import JsonValue

from crem.errors import ConfigError
from pipelines.synthesis.meter import Spent
from pipelines.tables.json_file import JsonFile
from pipelines.tables.new_version import parquet_bytes
from pipelines.tables.row_shards import RowShard
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder, JobKind

__all__ = [
    "ANSWERS",
    "JOURNAL",
    "Journal",
    "ShardOutcome",
    "SynthesisPlan",
    "finished_shard",
    "journal_spent",
    "outcome_of",
    "start_or_resume",
]

ANSWERS = pa.schema(
    [
        ("id", pa.int64()),  # of the row
        ("pairs", pa.list_(pa.struct([("kind", pa.string()), ("question", pa.string()), ("answer", pa.string())]))),
        ("reason", pa.string()),  # why there are no pairs; null where there are
        ("detail", pa.string()),
        ("model", pa.string()),  # null where the row was not asked about, and so are the following
        ("endpoint", pa.string()),
        ("prompt", pa.string()),
        ("prompt_hash", pa.string()),
        ("parameters", pa.string()),  # JSON
        ("asked_at", pa.timestamp("ms", "UTC")),
        ("seconds", pa.float32()),
        ("requests", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
    ]
)
JOURNAL = "_journal"
_FLUSH_EVERY_S = 1.0


class SynthesisPlan(JsonFile):
    """What the answers in an output folder are of."""

    FILE: ClassVar[str] = "plan.json"

    kind: Literal[JobKind.SYNTHESISE] = JobKind.SYNTHESISE
    source: str
    """URI of the tables."""
    source_id: int
    """``content_id`` of their manifest."""
    prompt: str
    prompt_hash: str
    settings: dict[str, JsonValue]
    """The settings that decide the answers."""
    shards: tuple[tuple[str, int, int], ...]
    """File of the row table, first row and number of rows of each shard."""


@dataclass(frozen=True)
class ShardOutcome:
    """What a shard's part holds, or that it had to stop."""

    rows_in: int
    rows_out: int
    """More than ``rows_in`` where rows have several questions."""
    by_reason: Counter[str]
    """Rows without a new question by reason."""
    by_split_task: Counter[str]
    """Rows out by ``<split>/<task>``."""
    spent: Spent
    bound: str = ""
    """The bound at which it stopped; its part is not written then."""


def start_or_resume(target: Folder, plan: SynthesisPlan) -> None:
    """Write the plan into a new output folder, or see that it is the same.

    Raises:
        ConfigError: the answers there are of other tables, another model or another prompt.
    """
    earlier = SynthesisPlan.read(target)
    if earlier is None:
        if target.exists(SynthesisPlan.FILE):
            raise ConfigError(f"{target.uri}/{SynthesisPlan.FILE} is damaged; choose another --out")
        plan.write(target)
        return
    before, now = (p.model_dump(mode="json", exclude={"settings"}) | p.settings for p in (earlier, plan))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise ConfigError(
            f"{target.uri} was begun with another {name}: {_short(before.get(name))}, and now it is "
            f"{_short(now[name])}; choose another --out, or the settings of then"
        )


class Journal:
    """The records of one shard that are done, stored as they come; not for several threads."""

    def __init__(self, target: Folder, shard: int):
        self._folder = target.child(JOURNAL)
        self._prefix = f"{shard:06d}-"
        self._waiting: list[ArrowRow] = []
        self._flushed_at = time.monotonic()

    def read(self) -> dict[int, ArrowRow]:
        """The stored records by row id."""
        records = [
            record
            for name in self._folder.files(".parquet")
            if name.startswith(self._prefix)
            for record in _read(self._folder, name).to_pylist()
        ]
        return {record["id"]: record for record in records}

    def add(self, record: ArrowRow) -> bool:
        """Take a record; whether it is time to ``flush``."""
        self._waiting.append(record)
        return time.monotonic() - self._flushed_at > _FLUSH_EVERY_S

    def flush(self) -> None:
        """Store the records that wait."""
        waiting, self._waiting = self._waiting, []
        self._flushed_at = time.monotonic()
        if waiting:
            table = pa.Table.from_pylist(waiting, schema=ANSWERS)
            self._folder.write_bytes(parquet_bytes(table), f"{self._prefix}{uuid.uuid4().hex}.parquet")

    def remove(self) -> None:
        """Remove the stored records; the shard's part has them."""
        for name in self._folder.files(".parquet"):
            if name.startswith(self._prefix):
                self._folder.remove(name)


def journal_spent(target: Folder) -> Spent:
    """What the records in the journal have cost."""
    folder = target.child(JOURNAL)
    return sum((spent_of(_read(folder, name)) for name in folder.files(".parquet")), Spent())


def finished_shard(target: Folder, shard: RowShard) -> ShardOutcome | None:
    """The outcome of a shard that an earlier run finished, or ``None`` where it has to be asked about."""
    if not target.exists("answers", shard.name):
        return None
    try:
        answers = _read(target.child("answers"), shard.name)
        rows = _read(target.child("rows"), shard.name, ["split", "task"])
    except (pa.ArrowException, OSError):
        return None
    return None if answers.num_rows != shard.rows else outcome_of(answers, rows)


def outcome_of(answers: pa.Table, rows: pa.Table) -> ShardOutcome:
    """Counts of a shard from its two parts."""
    pairs = zip(rows["split"].to_pylist(), rows["task"].to_pylist(), strict=True)
    return ShardOutcome(
        rows_in=answers.num_rows,
        rows_out=rows.num_rows,
        by_reason=Counter(answers["reason"].drop_null().to_pylist()),
        by_split_task=Counter(f"{split}/{task}" for split, task in pairs),
        spent=spent_of(answers),
    )


def spent_of(answers: pa.Table) -> Spent:
    """What the records have cost."""
    return Spent(*(pc.sum(answers[n]).as_py() or 0 for n in ("requests", "prompt_tokens", "answer_tokens")))


def _read(folder: Folder, name: str, columns: list[str] | None = None) -> pa.Table:
    with folder.open(name) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read(columns=columns)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + " …"
