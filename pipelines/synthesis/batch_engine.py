"""Questions from a model that runs inside the job: vLLM on the cluster's GPUs, by ``ray.data.llm``, with no endpoint.

The rows that have no answer stream through a processor of ``ray.data.llm``. Prompt, validation, records and journal are
those of an endpoint, and the shards are then written from the journal (``shard_asking``). What differs:

- There is no meter: own GPUs send no bill, and the engine itself bounds what is in flight.
- A row whose answer is invalid is asked again in another pass, which starts the engines anew. vLLM holds answers to the
  JSON schema, so few rows need one.
- A killed run loses the answers of the last ten seconds or so (``_FLUSH_EVERY_S``).

vLLM's part is ``VllmEngine``, three small methods written after Ray 2.60's ``vllm_engine_proc`` and
``vllm_engine_stage``. The tests run everything else with ``HttpRequestProcessorConfig`` in its place.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import ray

from crem.config import SynthesiseConfig
from crem.errors import ConfigError, ItemError
from pipelines.synthesis.answer_table import Journal
from pipelines.synthesis.asking import Asked, checked
from pipelines.synthesis.endpoint import Completion
from pipelines.synthesis.meter import Spent
from pipelines.synthesis.question_answers import answer_schema
from pipelines.synthesis.question_prompt import Message, QuestionPrompt, kinds_of_row
from pipelines.synthesis.shard_asking import row_record, skip_reason
from pipelines.tables import ray_tasks
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.row_shards import RowShard, read_row_shard
from pipelines.tables.storage import Folder

if TYPE_CHECKING:
    from ray.data.llm import ProcessorConfig

__all__ = ["BatchEngine", "VllmEngine", "ask_in_batches", "require_vllm"]

log = logging.getLogger(__name__)

_FLUSH_EVERY_S = 10.0
_ROWS_BEFORE_JUDGEMENT = 50
_FAILED = "__inference_error__"
"""Column in which ``ray.data.llm`` says that a row could not be answered."""


class BatchEngine(Protocol):
    """A model behind a processor of ``ray.data.llm``."""

    @property
    def name(self) -> str:
        """Kept with every answer, as the host of an endpoint is."""

    def processor_config(self) -> ProcessorConfig: ...
    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The columns that the processor takes."""

    def completion(self, row: Mapping[str, Any]) -> Completion:
        """The answer in the columns that the processor leaves."""


@dataclass(frozen=True)
class VllmEngine:
    """vLLM, in workers of Ray Data: ``synthesise.engines`` of them, each on GPUs of its own."""

    settings: SynthesiseConfig
    kinds: tuple[str, ...]
    name: str = "ray.data.llm"

    def processor_config(self) -> ProcessorConfig:
        from ray.data.llm import vLLMEngineProcessorConfig  # takes seconds, and needs the extras of ray[llm]

        return vLLMEngineProcessorConfig(
            model_source=self.settings.model,
            engine_kwargs=dict(self.settings.engine_kwargs),
            concurrency=self.settings.engines,
            batch_size=self.settings.concurrency,
            should_continue_on_error=True,  # a row that the engine cannot take costs the row, not the job
            prepare_multimodal_stage={"enabled": True},
        )

    def request(self, messages: Sequence[Message]) -> dict[str, Any]:
        sampling: dict[str, Any] = {
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_answer_tokens,
        }
        if self.settings.structured != "text":
            # as text: Arrow would give the schema's objects each other's fields
            sampling["structured_outputs"] = {"json": json.dumps(answer_schema(self.kinds))}
        return {"messages": list(messages), "sampling_params": sampling | self.settings.request}

    def completion(self, row: Mapping[str, Any]) -> Completion:
        answered = int(row["num_generated_tokens"])
        return Completion(
            text=row["generated_text"],
            cut=answered >= self.settings.max_answer_tokens,
            refused=False,
            prompt_tokens=int(row["num_input_tokens"]),
            answer_tokens=answered,
        )


def require_vllm() -> None:
    """Refuse to run without vLLM.

    Raises:
        ConfigError: it is not installed here.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"synthesise.engine=vllm needs vLLM on every node: pip install 'ray[llm]=={ray.__version__}'; or serve "
            "the model (vllm serve NAME) and give synthesise.base_url=http://HOST:8000/v1"
        )


def ask_in_batches(
    source: Folder,
    target: Folder,
    shards: Sequence[RowShard],
    images: ray.ObjectRef,
    prompt: QuestionPrompt,
    engine: BatchEngine,
    settings: SynthesiseConfig,
) -> None:
    """Give every row of the shards that can be asked about a record in the journal.

    Raises:
        ConfigError: too many rows get no valid answer (``synthesise.max_failed_share``).
    """
    from ray.data.llm import build_processor

    work = _Batches(source, target, [images], prompt, engine, settings)
    earlier: dict[int, Spent] = {}
    for attempt in range(1, settings.attempts + 1):
        tasks = ray_tasks.task_dataset(shards)
        counts = tasks.map(lambda row: ray_tasks.attempt(work.count, row[ray_tasks.TASK]))
        if not (waiting := sum(ray_tasks.results(counts))):
            return
        log.info("asking %s in this cluster about %d rows, pass %d", settings.model, waiting, attempt)
        processor = build_processor(
            engine.processor_config(), preprocess=work.request, postprocess=partial(_kept, engine)
        )
        answers = processor(ray_tasks.task_dataset(shards).flat_map(work.rows)).iter_rows()
        work.keep(answers, earlier, last=attempt == settings.attempts)


@dataclass(frozen=True)
class _Batches:
    """What the workers of a pass need."""

    source: Folder
    target: Folder
    images: list[ray.ObjectRef]
    prompt: QuestionPrompt
    engine: BatchEngine
    settings: SynthesiseConfig

    def count(self, shard: RowShard) -> int:
        """In a worker: how many rows of a shard wait."""
        return sum(1 for _ in self._waiting(shard))

    def rows(self, task: dict[str, bytes]) -> Iterator[dict[str, Any]]:
        """In a worker: the rows of a shard that wait."""
        shard: RowShard = pickle.loads(task[ray_tasks.TASK])
        for row in self._waiting(shard):
            yield {"shard": shard.number, "id": row["id"], "row": pickle.dumps(row)}

    def request(self, row: dict[str, Any]) -> dict[str, Any]:
        """In a worker: what the engine is asked about a row."""
        query, images = pickle.loads(row["row"])["query"], ray.get(self.images[0])
        assert isinstance(images, ImageIndex)
        found = images.fetch(np.array(query["images"] or [], np.int64))
        kinds = kinds_of_row(row["id"], self.settings.kinds, self.settings.questions)
        messages = self.prompt.messages(query, kinds, found.__getitem__, self.settings.max_image_pixels)
        return self.engine.request(messages)

    def keep(self, answers: Iterator[dict[str, Any]], earlier: dict[int, Spent], *, last: bool) -> None:
        """In the driver: store the records of a pass; ``earlier`` is what failed rows have cost in passes before."""
        journals: dict[int, Journal] = {}
        reasons: Counter[str] = Counter()
        done, flushed_at = 0, time.monotonic()
        try:
            for row in answers:
                asked = self._asked(row, earlier)
                done += 1
                if asked.reason is not None:
                    reasons[asked.reason] += 1
                    if done >= _ROWS_BEFORE_JUDGEMENT and reasons.total() > self.settings.max_failed_share * done:
                        raise ConfigError(
                            f"{reasons.total()} of {done} rows got no valid answer ({dict(reasons)}); the last said: "
                            f"{asked.detail}. Take another model or prompt, or raise synthesise.max_failed_share"
                        )
                if asked.reason is not None and not last:
                    earlier[row["id"]] = asked.spent
                    continue
                record = row_record(
                    row["id"], asked=asked, prompt=self.prompt, endpoint=self.engine.name, config=self.settings
                )
                journals.setdefault(row["shard"], Journal(self.target, row["shard"])).add(record)
                if time.monotonic() - flushed_at > _FLUSH_EVERY_S:
                    for journal in journals.values():
                        journal.flush()
                    flushed_at = time.monotonic()
                    log.info("%d rows answered, %d of them not validly", done, reasons.total())
        finally:
            for journal in journals.values():
                journal.flush()

    def _waiting(self, shard: RowShard) -> Iterator[dict[str, Any]]:
        records = Journal(self.target, shard.number).read()
        for row in read_row_shard(self.source, shard).to_pylist():
            if row["id"] not in records and skip_reason(row, self.settings) is None:
                yield row

    def _asked(self, row: Mapping[str, Any], earlier: Mapping[int, Spent]) -> Asked:
        spent = earlier.get(row["id"], Spent())
        if error := row.get(_FAILED):
            return Asked((), "request_refused", str(error)[:300], spent + Spent(1), 0.0)
        completion: Completion = pickle.loads(row["completion"])
        spent += Spent(1, completion.prompt_tokens, completion.answer_tokens)
        try:
            return Asked(checked(completion, tuple(self.prompt.kinds), self.settings.questions), None, None, spent, 0.0)
        except ItemError as error:
            return Asked((), error.reason, error.detail, spent, 0.0)


def _kept(engine: BatchEngine, row: dict[str, Any]) -> dict[str, Any]:
    """In a worker: what the driver needs of a row that was answered."""
    return {"shard": row["shard"], "id": row["id"], "completion": pickle.dumps(engine.completion(row))}
