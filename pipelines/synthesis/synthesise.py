"""``crem synthesise``: questions and answers about the queries of prepared tables, written by another model.

CREM trains L_r and L_g on the same sample (method.md §4): "homogeneous" generation data are questions and answers that
an off-the-shelf model writes about the very images and instructions of the retrieval rows. So the output is a new
version of the tables, in which a row has the question and answer that it lacked; ``crem train`` takes it as it is.

The rows are split into *shards* of some hundred. One worker asks about the rows of a shard, many at a time, and writes
them as one part. All that concerns money is in one place, the *meter*; each answer is stored within a second
(``answer_table``). Rows in = rows out: a row that cannot be asked about stays as it was, and its reason is kept.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import ray.data

from crem.config import RunConfig, SynthesiseConfig
from crem.errors import ConfigError, ResourceError
from pipelines.synthesis.answer_table import (
    JOURNAL,
    ShardOutcome,
    SynthesisPlan,
    finished_shard,
    journal_spent,
    start_or_resume,
)
from pipelines.synthesis.asking_progress import AskingProgress, cost_text
from pipelines.synthesis.batch_engine import VllmEngine, ask_in_batches, require_vllm
from pipelines.synthesis.endpoint import host_of
from pipelines.synthesis.meter import Spent, start_meter
from pipelines.synthesis.question_prompt import QuestionPrompt
from pipelines.synthesis.shard_asking import ShardAsker, parameters_of
from pipelines.tables import ray_tasks, session
from pipelines.tables.lease import Lease
from pipelines.tables.manifest import PrepareManifest, read_manifest
from pipelines.tables.new_version import complete_version, copy_parts
from pipelines.tables.prepared import index_images
from pipelines.tables.row_shards import RowShard, row_shards
from pipelines.tables.shared_folders import require_readable_tables, require_shared
from pipelines.tables.storage import Folder, JobKind
from pipelines.tables.storage_retry import TIMEOUT_S

__all__ = ["Synthesised", "synthesise"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Synthesised:
    """What a run came to, earlier runs into the same output included."""

    rows_in: int
    questions: int
    """Rows out with a new question."""
    by_reason: dict[str, int]
    """Rows without a new question by reason."""
    spent: Spent
    cost: float
    was_complete: bool
    """Whether the output was complete before, and nothing was asked."""


def synthesise(prepared: str, out: str, config: RunConfig) -> Synthesised:
    """Write a version of the tables at ``prepared`` whose rows have questions and answers, into ``out``.

    Raises:
        ConfigError: there are no tables, ``out`` holds something else or the answers of other settings, the endpoint is
            not set or refuses the key.
        ResourceError: the endpoint is away, or a bound was reached; run again to continue.
    """
    settings = config.synthesise
    source, target = (Folder.at(place).patient(TIMEOUT_S) for place in (prepared, out))
    if source.uri == target.uri:
        raise ConfigError(f"--out {out!r} holds the tables themselves; choose another folder")
    manifest = read_manifest(source)
    prompt = QuestionPrompt.load(settings.prompt, settings.kinds)
    if not settings.model or (settings.engine == "endpoint" and not settings.base_url):
        raise ConfigError(
            "who writes the questions? Give synthesise.model=NAME and the endpoint that serves it, "
            "synthesise.base_url=http://HOST:8000/v1, or synthesise.engine=vllm to run the model in this cluster"
        )
    if settings.engine == "vllm":
        require_vllm()
    shards = row_shards(source, settings.rows_per_shard)
    plan = _plan(source, manifest, prompt, shards, settings)
    target.claim(JobKind.SYNTHESISE)
    with Lease.take(target, JobKind.SYNTHESISE) as lease:
        return _run(source, target, manifest, plan, shards, prompt, lease, settings)


def _run(
    source: Folder,
    target: Folder,
    manifest: PrepareManifest,
    plan: SynthesisPlan,
    shards: list[RowShard],
    prompt: QuestionPrompt,
    lease: Lease,
    settings: SynthesiseConfig,
) -> Synthesised:
    """Ask about what has no answer yet, and complete the tables."""
    start_or_resume(target, plan)
    finished = {s.number: outcome for s in shards if (outcome := finished_shard(target, s)) is not None}
    if len(finished) == len(shards) and PrepareManifest.read(target) is not None:
        log.info("%s is complete: nothing to ask", target.uri)
        return _summary(list(finished.values()), settings, was_complete=True)
    session.connect()
    require_readable_tables(source.uri)
    require_shared(target)
    with ray_tasks.remote_errors():
        outcomes = _ask(source, target, [s for s in shards if s.number not in finished], finished, prompt, settings)
        copy_parts(source, target, "images")
    lease.check()
    _finish(source, target, manifest, plan, outcomes, settings)
    return _summary(outcomes, settings, was_complete=False)


def _plan(
    source: Folder,
    manifest: PrepareManifest,
    prompt: QuestionPrompt,
    shards: Sequence[RowShard],
    settings: SynthesiseConfig,
) -> SynthesisPlan:
    decisive = {"model", "attempts", "split", "text_queries", "rows_per_shard"}
    return SynthesisPlan(
        source=source.uri,
        source_id=manifest.content_id,
        prompt=prompt.name,
        prompt_hash=prompt.digest,
        settings=settings.model_dump(mode="json", include=decisive) | parameters_of(settings),
        shards=tuple((shard.part, shard.first, shard.rows) for shard in shards),
    )


def _ask(
    source: Folder,
    target: Folder,
    shards: list[RowShard],
    finished: dict[int, ShardOutcome],
    prompt: QuestionPrompt,
    settings: SynthesiseConfig,
) -> list[ShardOutcome]:
    """Ask about the shards that are not finished; the outcomes of all."""
    outcomes = list(finished.values())
    before = sum((o.spent for o in outcomes), journal_spent(target))
    total = sum(shard.rows for shard in shards)
    log.info(
        "asking %s at %s about %d rows, %d in finished parts; %d requests and %d tokens were spent before",
        settings.model,
        _place(settings),
        total,
        sum(o.rows_in for o in outcomes),
        before.requests,
        before.tokens,
    )
    if not shards:
        return outcomes
    images = ray.put(index_images(source.uri))
    if settings.engine == "vllm":
        engine = VllmEngine(settings, tuple(prompt.kinds))
        ask_in_batches(source, target, shards, images, prompt, engine, settings)
    meter = start_meter(settings, before)
    dataset = ray_tasks.task_dataset(shards).map_batches(
        ShardAsker,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(settings.actors, len(shards))),
        num_cpus=1,
        fn_constructor_args=(source, target, [images], prompt, meter, settings),
    )
    bound = ""
    with AskingProgress(meter, total, settings):
        for outcome in ray_tasks.results(dataset):
            bound = bound or outcome.bound
            outcomes += [] if outcome.bound else [outcome]
    if bound:
        spent = ray.get(meter.reading.remote()).spent
        raise ResourceError(
            f"stopped at {bound}: {spent.requests} requests, {spent.tokens} tokens{cost_text(spent, settings)}. The "
            f"answers are kept in {target.uri}: raise the bound and run again to continue, or give "
            "synthesise.when_spent=finish to complete the tables with the questions that there are"
        )
    return outcomes


def _finish(
    source: Folder,
    target: Folder,
    manifest: PrepareManifest,
    plan: SynthesisPlan,
    outcomes: Sequence[ShardOutcome],
    settings: SynthesiseConfig,
) -> None:
    """Check the counts, and write what makes the tables complete."""
    rows_in, rows_out = (sum(getattr(o, name) for o in outcomes) for name in ("rows_in", "rows_out"))
    if rows_in != manifest.rows_out:
        raise RuntimeError(f"{manifest.rows_out} rows went in and {rows_in} are accounted for")
    spent = sum((o.spent for o in outcomes), Spent())
    target.remove(JOURNAL)
    complete_version(
        manifest,
        source,
        target,
        JobKind.SYNTHESISE,
        rows=rows_out,  # a row with three questions counts as three, as a conversation of three turns does
        by_split_task=sum((o.by_split_task for o in outcomes), Counter()),
        settings=plan.settings
        | {
            "prompt": plan.prompt,
            "prompt_hash": plan.prompt_hash,
            "endpoint": _place(settings),
            "without_a_question": dict(sorted(sum((o.by_reason for o in outcomes), Counter()).items())),
            "requests": spent.requests,
            "prompt_tokens": spent.prompt_tokens,
            "answer_tokens": spent.answer_tokens,
        },
        package="openai",
    )


def _place(settings: SynthesiseConfig) -> str:
    """Where the model is."""
    return host_of(settings.base_url or "") if settings.engine == "endpoint" else "ray.data.llm"


def _summary(outcomes: Sequence[ShardOutcome], settings: SynthesiseConfig, *, was_complete: bool) -> Synthesised:
    by_reason = sum((o.by_reason for o in outcomes), Counter[str]())
    spent = sum((o.spent for o in outcomes), Spent())
    return Synthesised(
        rows_in=sum(o.rows_in for o in outcomes),
        questions=sum(o.rows_out for o in outcomes) - sum(by_reason.values()),
        by_reason=dict(by_reason),
        spent=spent,
        cost=spent.cost(settings),
        was_complete=was_complete,
    )
