"""``crem evaluate``: how well a checkpoint retrieves and answers on the test rows, and how much it keeps per item.

- **Retrieval** (``retrieval.py``): Precision@1 and @10 of every task over the test splits, and their mean.
- **Answers** (``answers.py``): exact match of the questions of the test rows, natively and from the compressed context.
  A model without chorus tokens has no compressed context.
- **Cache**: bytes of keys and values kept per item in both modes.

The work is spread over a Ray Data actor pool; each actor has one model, as in ``crem embed``. ``evaluate_loaded`` does
the same in this process, without Ray. ``evaluate.chorus_tokens`` chooses K' of a nested model.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pyarrow as pa
import ray.data

from crem.config import RunConfig
from pipelines.evaluation.answers import answer_examples, answer_figures, cache_figures, chosen_questions
from pipelines.evaluation.evaluation_result import EvaluationResult, Examples
from pipelines.evaluation.retrieval import (
    mean_precision,
    precision,
    retrieval_examples,
    retrieval_set,
    target_ranks,
)
from pipelines.evaluation.workload import TaskResults, compute, evaluation_tasks
from pipelines.tables import ray_tasks, session
from pipelines.tables.models import describe_model, load_model
from pipelines.tables.prepared import PreparedRows, index_images, index_rows, load_rows
from pipelines.tables.richness import warn_of_small_images
from pipelines.tables.shared_folders import require_readable_model, require_readable_tables
from pipelines.tables.storage import Folder, JobKind

if TYPE_CHECKING:
    import crem

__all__ = ["evaluate", "evaluate_loaded"]

log = logging.getLogger(__name__)

RESULT = "evaluation.json"
_BATCHES_PER_CHUNK = 4
_LOG_EVERY_S = 5.0


def evaluate(model: str, prepared: str, out: str, config: RunConfig) -> EvaluationResult:
    """Evaluate the checkpoint ``model`` on the test splits of prepared tables, and write ``evaluation.json``.

    Raises:
        ConfigError: no test rows, or a chorus count that the model was not trained with. CheckpointError: the model
            cannot be loaded.
    """
    rows = _test_rows(prepared)
    target = Folder.at(out)
    target.claim(JobKind.EVALUATE)
    session.connect()
    require_readable_tables(prepared)
    require_readable_model(model)
    session.require(
        f"evaluating with {config.embed.min_actors} actors",
        cpus=config.embed.min_actors * config.embed.cpus_per_actor,
        gpus=config.embed.min_actors * config.embed.gpus_per_actor,
        remedy="lower embed.min_actors, embed.cpus_per_actor or embed.gpus_per_actor",
    )
    with ray_tasks.remote_errors():
        description = describe_model(  # a wrong count fails before any work
            model,
            cpus=config.embed.cpus_per_actor,
            gpus=config.embed.gpus_per_actor,
            chorus_tokens=config.evaluate.chorus_tokens,
        )
    chorus_tokens = description.chorus_tokens
    warn_of_small_images(prepared, description.max_pixels)
    tasks = evaluation_tasks(rows, config.evaluate)
    log.info("%d contents to embed and questions to answer with %d chorus tokens", len(tasks), chorus_tokens)
    results = _compute_on_actors(model, prepared, len(tasks), config)
    result = _figures(rows, config, results, model=model, chorus_tokens=chorus_tokens)
    target.write_json(result.to_json(), RESULT)
    return result


def evaluate_loaded(model: crem.Crem, rows: PreparedRows, config: RunConfig) -> EvaluationResult:
    """As ``evaluate``, of a loaded model on rows already read, in this process; nothing is written."""
    results = compute(model, rows, evaluation_tasks(rows, config.evaluate), config.evaluate)
    return _figures(rows, config, results, model=None, chorus_tokens=model.chorus_tokens)


def _figures(
    rows: PreparedRows, config: RunConfig, results: TaskResults, *, model: str | None, chorus_tokens: int
) -> EvaluationResult:
    """All figures, from the results of ``evaluation_tasks``."""
    candidates = retrieval_set(rows)
    retrieval, examples = {}, []
    for direction in candidates.directions:
        ranks = target_ranks(direction, results.embeddings)
        retrieval[direction.task] = precision(direction, ranks)
        examples += retrieval_examples(rows, candidates.contents, direction, results.embeddings, ranks)
    questions = chosen_questions(rows, config.evaluate.max_answers)
    return EvaluationResult(
        model=model,
        chorus_tokens=chorus_tokens,
        fingerprint=results.fingerprint,
        retrieval=retrieval,
        retrieval_mean=mean_precision(retrieval),
        answers=answer_figures(rows, questions, results.answers),
        cache=cache_figures(results.answers),
        examples=Examples(examples, answer_examples(rows, questions, results.answers)),
    )


def _test_rows(prepared: str) -> PreparedRows:
    """Only these and their images are read, however large the corpus is."""
    return load_rows(index_rows(prepared, split_prefix="test"), index_images(prepared))


def _compute_on_actors(model: str, prepared: str, count: int, config: RunConfig) -> TaskResults:
    """Results of all ``count`` tasks, from the actor pool."""
    settings, size = config.embed, _BATCHES_PER_CHUNK * config.evaluate.batch_size
    starts = range(0, count, size)
    actors = min(settings.max_actors, len(starts))
    dataset = ray_tasks.task_dataset(starts).map_batches(
        _Evaluator,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(settings.min_actors, actors), max_size=actors),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
        fn_constructor_args=(model, prepared, size, config),
    )
    by_start: dict[int, TaskResults] = {}
    done, logged = 0, time.monotonic()
    with ray_tasks.remote_errors():
        for start, results in ray_tasks.results(dataset):
            by_start[start] = results
            done += len(results.embeddings) + len(results.answers)
            if done == count or time.monotonic() - logged > _LOG_EVERY_S:
                logged = time.monotonic()
                log.info("%d of %d contents and questions", done, count)
    return TaskResults.joined([by_start[start] for start in sorted(by_start)])


class _Evaluator:
    """One actor: loads the model once, and computes chunks of ``size`` tasks."""

    def __init__(self, model: str, prepared: str, size: int, config: RunConfig):
        self._model = load_model(model, config.embed.threads_per_actor, config.evaluate.chorus_tokens)
        self._rows = _test_rows(prepared)
        self._tasks = evaluation_tasks(self._rows, config.evaluate)
        self._size = size
        self._config = config.evaluate

    def __call__(self, batch: pa.Table) -> pa.Table:
        starts = batch[ray_tasks.TASK].to_pylist()
        return pa.Table.from_pylist([ray_tasks.attempt(self._chunk, start) for start in starts])

    def _chunk(self, start: int) -> tuple[int, TaskResults]:
        return start, compute(self._model, self._rows, self._tasks[start : start + self._size], self._config)
