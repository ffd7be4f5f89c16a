"""``crem mine``: hard negatives for the rows of prepared tables, as a new version of the tables.

The vectors of queries and targets are taken from earlier jobs (``given_vectors``), or embedded with a checkpoint, each
distinct item once. For every row the nearest targets of its task are found by exact search, in blocks, and
``negative_choice`` says which of them become negatives. What is done is kept per shard: a killed run continues.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray

from crem.config import EmbedConfig, MineConfig, RunConfig
from crem.errors import CheckpointError, ConfigError
from pipelines.mining.given_vectors import GivenVectors, open_vectors
from pipelines.mining.item_vectors import VECTORS_FOLDER, ItemShard, embed_items
from pipelines.mining.mine_plan import MinePlan, start_or_resume
from pipelines.mining.mined_items import ItemNumbers, RowKeys, number_items, row_keys
from pipelines.mining.shard_mining import MinedShard, MineTask, ShardMiner, finished_shard
from pipelines.mining.vector_store import fill_store, item_shards
from pipelines.tables import ray_tasks, session
from pipelines.tables.lease import Lease
from pipelines.tables.manifest import PrepareManifest, read_manifest
from pipelines.tables.models import describe_model
from pipelines.tables.new_version import complete_version, copy_parts
from pipelines.tables.prepared import index_images
from pipelines.tables.row_shards import RowShard, read_row_shard, row_shards
from pipelines.tables.schema import EmbeddingStamp
from pipelines.tables.shared_folders import require_readable_model, require_readable_tables, require_shared
from pipelines.tables.storage import Folder, JobKind
from pipelines.tables.storage_retry import TIMEOUT_S

__all__ = ["MineSummary", "mine"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MineSummary:
    """What a run came to."""

    rows: int
    negatives: int
    """That were added."""
    dropped: int
    """Candidates that counted as false negatives."""
    by_reason: dict[str, int]
    """Rows with fewer negatives than asked for."""
    fingerprint: str
    was_complete: bool
    """Whether the output was complete before, and nothing was done."""


def mine(model: str | None, prepared: str, out: str, config: RunConfig, vectors: Sequence[str] = ()) -> MineSummary:
    """Write a version of the tables at ``prepared`` whose rows have hard negatives, into ``out``.

    Args:
        model: embeds what ``vectors`` lack; ``None`` where they lack nothing.
        vectors: output folders of ``crem embed`` and ``crem index``.

    Raises:
        ConfigError: there are no tables or no pairs in them, ``out`` holds something else, or the work of another model
            or other settings; ``vectors`` are of another model, or lack items that no ``model`` embeds.
        CheckpointError: ``model`` cannot be loaded. ResourceError: there is no such device as it needs.
    """
    source, target = (Folder.at(place).patient(TIMEOUT_S) for place in (prepared, out))
    if source.uri == target.uri:
        raise ConfigError(f"--out {out!r} holds the tables themselves; choose another folder")
    if model is None and not vectors:
        raise ConfigError(
            "give --model CHECKPOINT, which embeds the rows, or --vectors DIR, what crem embed made of them"
        )
    origin = read_manifest(source)
    shards = row_shards(source, config.mine.rows_per_shard)
    session.connect()
    if model is not None:
        session.require(
            "crem mine",
            cpus=config.embed.min_actors * config.embed.cpus_per_actor,
            gpus=config.embed.min_actors * config.embed.gpus_per_actor,
            remedy="lower embed.cpus_per_actor and embed.gpus_per_actor (--preset micro needs no GPU), or give "
            "--vectors alone",
        )
    require_readable_tables(source.uri)
    with ray_tasks.remote_errors():
        given = open_vectors(vectors) if vectors else None
        stamp = _stamp(model, given, config.embed)
        plan = MinePlan(
            source=source.uri,
            source_id=origin.content_id,
            model=stamp.model,
            fingerprint=stamp.fingerprint,
            chorus_tokens=stamp.chorus_tokens,
            vectors=tuple(vectors),
            exact=given is None or given.exact,
            settings=config.mine.model_dump(mode="json", exclude={"keep_vectors"}),
        )
        target.claim(JobKind.MINE)
        require_shared(target)
        with Lease.take(target, JobKind.MINE) as lease:
            start_or_resume(target, plan)
            work = _Work(source, target, shards, plan, stamp, given, model is not None)
            return _run(work, origin, lease, config)


@dataclass(frozen=True)
class _Work:
    """What a run works on."""

    source: Folder
    target: Folder
    shards: list[RowShard]
    plan: MinePlan
    stamp: EmbeddingStamp
    given: GivenVectors | None
    can_embed: bool


def _stamp(model: str | None, given: GivenVectors | None, config: EmbedConfig) -> EmbeddingStamp:
    """The model whose vectors are compared.

    Raises:
        CheckpointError: another model made the given vectors.
    """
    wanted = config.chorus_tokens
    if given is not None:
        made_with = given.stamp.chorus_tokens
        if wanted is not None and made_with not in (None, wanted):
            raise ConfigError(
                f"embed.chorus_tokens={wanted}, and {given.places[0]} was made with {made_with}; leave the setting "
                "out, or embed again with it"
            )
        wanted = made_with if wanted is None else wanted
    if model is None:
        assert given is not None
        return given.stamp
    require_readable_model(model)
    try:
        with ray_tasks.remote_errors():
            described = describe_model(
                model, cpus=config.cpus_per_actor, gpus=config.gpus_per_actor, chorus_tokens=wanted
            )
    except ConfigError as error:
        if given is None or config.chorus_tokens is not None:
            raise
        raise _another_model(given, model, str(error)) from error  # it has no such count of chorus tokens
    if given is not None and given.stamp.fingerprint != described.fingerprint:
        raise _another_model(given, model, described.fingerprint)
    dim = described.dim if given is None else given.stamp.dim  # which may be a prefix (embed.dims)
    return EmbeddingStamp(described.fingerprint, dim, model, described.chorus_tokens)


def _another_model(given: GivenVectors, model: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{given.places[0]} was made by model {given.stamp.fingerprint} ({given.stamp.model}), and {model} is another "
        f"one ({what}); give that model, or embed again with this one"
    )


def _run(work: _Work, origin: PrepareManifest, lease: Lease, config: RunConfig) -> MineSummary:
    """Mine the shards that are not finished, and complete the tables."""
    source, target, shards, plan = work.source, work.target, work.shards, work.plan
    finished = {s.number: mined for s in shards if (mined := finished_shard(target, s)) is not None}
    outcomes = list(finished.values())
    if len(finished) == len(shards) and PrepareManifest.read(target) is not None:
        log.info("%s is complete: nothing to mine", target.uri)
        return _summary(outcomes, plan, was_complete=True)
    missing = [shard for shard in shards if shard.number not in finished]
    if missing:
        keys = _keys(source, shards, config.mine)
        store = _vectors(work, number_items(keys), config)
        outcomes += _mine(source, target, [MineTask(s, keys[s.number]) for s in missing], store, config.mine)
    copy_parts(source, target, "images")
    rows = sum(outcome.rows for outcome in outcomes)
    if rows != origin.rows_out:
        raise RuntimeError(f"{origin.rows_out} rows went in and {rows} came out")
    summary = _summary(outcomes, plan, was_complete=False)
    lease.check()
    complete_version(
        origin,
        source,
        target,
        JobKind.MINE,
        rows=rows,
        by_split_task=sum((outcome.by_split_task for outcome in outcomes), Counter()),
        settings=plan.model_dump(mode="json", include={"model", "fingerprint", "chorus_tokens", "vectors", "exact"})
        | plan.settings
        | {
            "negatives_added": summary.negatives,
            "false_negatives_dropped": summary.dropped,
            "rows_with_fewer": dict(sorted(summary.by_reason.items())),
        },
        package="numpy",
    )
    if not config.mine.keep_vectors:
        target.remove(VECTORS_FOLDER)
    return summary


def _keys(source: Folder, shards: list[RowShard], config: MineConfig) -> list[RowKeys]:
    """The keys of all rows that take part, by shard."""
    run = partial(row_keys, source=source, config=config)
    dataset = ray_tasks.task_dataset(shards).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
    keys = sorted(ray_tasks.results(dataset), key=lambda found: found.shard)
    if not any(len(found.places) for found in keys):
        raise ConfigError(f"{source.uri} has no row of a split {config.split!r} that has a target: nothing to mine for")
    return list(keys)


def _vectors(work: _Work, items: ItemNumbers, config: RunConfig) -> ray.ObjectRef:
    """The store with the vectors of all items, those that were not given embedded first."""
    keys = items.keys_by_number()
    pieces = [slice(begin, end) for begin, end in zip(items.begins[:-1], items.begins[1:], strict=True)]
    shards = [
        ItemShard(shard, items.rows[piece], items.is_target[piece], keys[piece])
        for shard, piece in zip(work.shards, pieces, strict=True)
    ]
    lacking = np.ones(len(keys), np.bool_) if work.given is None else work.given.find(keys)[0] < 0
    if work.given is not None:
        log.info("%d of %d distinct queries and targets have a given vector", (~lacking).sum(), len(keys))
        if lacking.any() and not work.can_embed:
            raise _lack(work, work.given, items, lacking)
    if lacking.any():
        images = ray.put(index_images(work.source.uri))
        chosen = item_shards(shards, items, lacking)
        embed_items(work.source, work.target, chosen, images, work.stamp, config.embed)
    return fill_store(work.source, work.target, shards, items, work.given, config.mine)


def _lack(work: _Work, given: GivenVectors, items: ItemNumbers, lacking: NDArray[np.bool_]) -> ConfigError:
    """The error that names an item without a vector, and what to do."""
    number = int(np.flatnonzero(lacking)[0])
    shard = work.shards[int(np.searchsorted(items.begins, number, side="right")) - 1]
    row = read_row_shard(work.source, shard).slice(int(items.rows[number]), 1).to_pylist()[0]
    side = "target" if items.is_target[number] else "query"
    text = (row[side]["text"] or "")[:60]
    none = "was it made of these tables? " if lacking.all() else ""
    return ConfigError(
        f"{', '.join(given.places)} lacks {lacking.sum()} of {len(lacking)} distinct queries and targets, e.g. the "
        f"{side} of row {row['key']!r}{f' ({text!r})' if text else ''}; {none}crem embed makes vectors of the images "
        "of prepared tables, and none of texts or of images with an instruction: give --model "
        f"{given.stamp.model} too, which embeds what is lacking"
    )


def _mine(
    source: Folder, target: Folder, tasks: Sequence[MineTask], store: ray.ObjectRef, config: MineConfig
) -> list[MinedShard]:
    most = max(1, min(len(tasks), int(ray.cluster_resources().get("CPU", 1))))
    dataset = ray_tasks.task_dataset(tasks).map_batches(
        ShardMiner,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=1,
        fn_constructor_args=(source, target, [store], config),
    )
    outcomes: list[MinedShard] = []
    for outcome in ray_tasks.results(dataset):
        outcomes.append(outcome)
        log.info("%d of %d parts mined, %d negatives", len(outcomes), len(tasks), sum(o.mined for o in outcomes))
    return outcomes


def _summary(outcomes: Sequence[MinedShard], plan: MinePlan, *, was_complete: bool) -> MineSummary:
    return MineSummary(
        rows=sum(outcome.rows for outcome in outcomes),
        negatives=sum(outcome.mined for outcome in outcomes),
        dropped=sum(outcome.dropped for outcome in outcomes),
        by_reason=dict(sum((outcome.by_reason for outcome in outcomes), Counter())),
        fingerprint=plan.fingerprint,
        was_complete=was_complete,
    )
