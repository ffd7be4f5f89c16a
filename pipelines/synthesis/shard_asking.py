"""The worker: asks about the rows of a shard, many at a time, and writes the shard's parts when all are done."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from crem.config import SynthesiseConfig
from crem.errors import ConfigError, CremError
from pipelines.synthesis.answer_table import (
    ANSWERS,
    Journal,
    ShardOutcome,
    outcome_of,
)
from pipelines.synthesis.asking import Asked, ask
from pipelines.synthesis.endpoint import Endpoint
from pipelines.synthesis.meter import BoundReachedError, MeterClient, RemoteMeter, Spent
from pipelines.synthesis.question_prompt import Message, QuestionPrompt, kinds_of_row
from pipelines.tables import ray_tasks, schema
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.new_version import parquet_bytes
from pipelines.tables.row_shards import RowShard, read_row_shard
from pipelines.tables.schema import ArrowRow
from pipelines.tables.storage import Folder

__all__ = ["ShardAsker", "parameters_of", "row_record", "rows_with_answers", "skip_reason"]

log = logging.getLogger(__name__)


class ShardAsker:
    """The actor: one connection to the endpoint, a shard per call."""

    def __init__(
        self,
        source: Folder,
        target: Folder,
        images: ray.ObjectRef,
        prompt: QuestionPrompt,
        meter: ray.actor.ActorHandle,
        config: SynthesiseConfig,
    ):
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line per request
        self.source, self.target, self.prompt, self.config = source, target, prompt, config
        self.images: ImageIndex = ray.get(images[0])
        self.meter: MeterClient = RemoteMeter(meter)
        self.runner = asyncio.Runner()  # one loop for all calls: connections are kept open between them
        # with another engine all answers are in the journal, and none is asked for
        self.endpoint = Endpoint(config, tuple(prompt.kinds)) if config.engine == "endpoint" else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [ray_tasks.attempt(self.ask_shard, shard) for shard in batch[ray_tasks.TASK].to_pylist()]
        )

    def ask_shard(self, shard: RowShard) -> ShardOutcome:
        """Ask about the rows of a shard and write its parts; or stop at a bound, with what is there in the journal."""
        rows = read_row_shard(self.source, shard)
        journal = Journal(self.target, shard.number)
        records = journal.read()
        if bound := self.runner.run(self._ask_rows(rows, records, journal)):
            if self.config.when_spent == "stop":
                return ShardOutcome(0, 0, Counter(), Counter(), Spent(), bound)
            for row_id in rows["id"].to_pylist():
                records.setdefault(row_id, row_record(row_id, reason="bound_reached", detail=bound))
        return self._write(shard, rows, records, journal)

    async def _ask_rows(self, rows: pa.Table, records: dict[int, ArrowRow], journal: Journal) -> str:
        """Add a record of every row that has none; the bound that was reached before, or an empty string."""
        waiting = _unanswered(rows, records)
        bounds: list[str] = []

        async def work() -> None:
            for row in waiting:
                try:
                    record = await self._record(row)
                except BoundReachedError as error:
                    bounds.append(str(error))
                    return
                records[row["id"]] = record
                if record["model"] is not None:
                    if journal.add(record):
                        await asyncio.to_thread(journal.flush)
                    if hopeless := await self.meter.row_done(record["reason"]):
                        raise ConfigError(
                            f"{hopeless}; the last said: {record['detail']}. Take another model or prompt, or raise "
                            "synthesise.max_failed_share"
                        )

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.config.concurrency):
                    group.create_task(work())
        except* CremError as errors:
            raise _first(errors) from None
        finally:
            journal.flush()
        return bounds[0] if bounds else ""

    async def _record(self, row: ArrowRow) -> ArrowRow:
        if reason := skip_reason(row, self.config):
            return row_record(row["id"], reason=reason)
        assert self.endpoint is not None, f"row {row['id']} has no answer in the journal"
        kinds = kinds_of_row(row["id"], self.config.kinds, self.config.questions)
        messages = await asyncio.to_thread(self._messages, row["query"], kinds)
        accepted = tuple(self.prompt.kinds)  # where the kind that is asked for does not fit, another one may stand
        asked = await ask(messages, len(kinds), accepted, endpoint=self.endpoint, meter=self.meter, config=self.config)
        return row_record(row["id"], asked=asked, prompt=self.prompt, endpoint=self.endpoint.host, config=self.config)

    def _messages(self, query: ArrowRow, kinds: Sequence[str]) -> list[Message]:
        images = self.images.fetch(np.array(query["images"] or [], np.int64))
        return self.prompt.messages(query, kinds, images.__getitem__, self.config.max_image_pixels)

    def _write(self, shard: RowShard, rows: pa.Table, records: dict[int, ArrowRow], journal: Journal) -> ShardOutcome:
        answers = pa.Table.from_pylist([records[row_id] for row_id in rows["id"].to_pylist()], schema=ANSWERS)
        made = rows_with_answers(rows, answers)
        name = shard.name
        for table, folder in ((made, "rows"), (answers, "answers")):  # answers last: they say that the shard is done
            self.target.write_bytes(parquet_bytes(table), folder, name)
        journal.remove()
        return outcome_of(answers, made)


def skip_reason(row: ArrowRow, config: SynthesiseConfig) -> str | None:
    """Why a row is not asked about, if so."""
    if not row["split"].startswith(config.split):
        return "other_split"
    if row["question"] is not None:
        return "has_question"
    if not row["query"]["images"] and not config.text_queries:
        return "no_image"
    return None


def row_record(
    row_id: int,
    *,
    reason: str | None = None,
    detail: str | None = None,
    asked: Asked | None = None,
    prompt: QuestionPrompt | None = None,
    endpoint: str | None = None,
    config: SynthesiseConfig | None = None,
) -> ArrowRow:
    """A record of ``ANSWERS``: of a row that was asked about, or of one that was not, with the reason."""
    record: ArrowRow = dict.fromkeys(ANSWERS.names) | {"id": row_id, "pairs": [], "reason": reason, "detail": detail}
    if asked is None or prompt is None or config is None:
        return record
    return record | {
        "pairs": [pair.model_dump() for pair in asked.pairs],
        "reason": asked.reason,
        "detail": asked.detail,
        "model": config.model,
        "endpoint": endpoint,
        "prompt": prompt.name,
        "prompt_hash": prompt.digest,
        "parameters": json.dumps(parameters_of(config), sort_keys=True),
        "asked_at": datetime.now(UTC),
        "seconds": asked.seconds,
        "requests": asked.spent.requests,
        "prompt_tokens": asked.spent.prompt_tokens,
        "answer_tokens": asked.spent.answer_tokens,
    }


def parameters_of(config: SynthesiseConfig) -> dict[str, Any]:
    """What, beside the model and the prompt, decides an answer."""
    names = {"kinds", "questions", "temperature", "max_answer_tokens", "max_image_pixels", "request"}
    return config.model_dump(mode="json", include=names)


def rows_with_answers(rows: pa.Table, answers: pa.Table) -> pa.Table:
    """The rows with their first pair; a row with several pairs is followed by a copy for each further one.

    A copy is the same pair of query and target with another question: its key is ``KEY/2``, ``KEY/3`` …
    """
    made = []
    for row, record in zip(rows.to_pylist(), answers.to_pylist(), strict=True):
        if not record["pairs"]:
            made.append(row)
        for number, pair in enumerate(record["pairs"], 1):
            key = row["key"] if number == 1 else f"{row['key']}/{number}"
            row_id = row["id"] if number == 1 else schema.row_id(row["source"], key)
            made.append(row | {"id": row_id, "key": key, "question": pair["question"], "answer": pair["answer"]})
    return pa.Table.from_pylist(made, schema=schema.ROWS)


def _unanswered(rows: pa.Table, records: dict[int, ArrowRow]) -> Iterator[ArrowRow]:
    return (row for row in rows.to_pylist() if row["id"] not in records)


def _first(errors: BaseExceptionGroup[CremError]) -> CremError:
    found: Iterable[BaseException] = errors.exceptions
    for error in found:
        if isinstance(error, BaseExceptionGroup):
            return _first(error)
        if isinstance(error, CremError):
            return error
    raise AssertionError("a group holds an error")
