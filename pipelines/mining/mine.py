"""``crem mine``: hard negatives for the rows of prepared tables, as a new version of the tables.

The queries and targets of the rows are embedded with a checkpoint, each distinct one once. For every row the nearest
targets of its task are found by exact search, in blocks, and ``negative_choice`` says which of them become negatives.
What is done is kept per shard, so a killed run goes on where it was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import ray
import ray.data
from numpy.typing import NDArray
from pydantic import JsonValue

from crem.checkpoint import CheckpointInfo
from crem.config import MineConfig, RunConfig
from crem.errors import ConfigError
from pipelines.mining.item_vectors import VECTORS_FOLDER, ItemShard, embed_items, read_vectors
from pipelines.mining.mined_items import ItemNumbers, RowKeys, number_items, row_keys
from pipelines.mining.shard_mining import MinedShard, MineTask, ShardMiner, TargetBlock, VectorStore, finished_shard
from pipelines.tables import ray_tasks, session
from pipelines.tables.json_file import JsonFile
from pipelines.tables.lease import Lease
from pipelines.tables.manifest import PrepareManifest, read_manifest
from pipelines.tables.models import describe_model
from pipelines.tables.new_version import complete_version, copy_parts
from pipelines.tables.prepared import index_images
from pipelines.tables.row_shards import RowShard, row_shards
from pipelines.tables.shared_folders import require_readable_model, require_readable_tables, require_shared
from pipelines.tables.storage import Folder, JobKind
from pipelines.tables.storage_retry import TIMEOUT_S

__all__ = ["MineSummary", "mine"]

log = logging.getLogger(__name__)

_BLOCK_TARGETS = 32_768
"""Targets of one block: 200 MB of vectors at 1,536 dimensions."""


class MinePlan(JsonFile):
    """What the parts in an output folder are of."""

    FILE: ClassVar[str] = "plan.json"

    kind: Literal[JobKind.MINE] = JobKind.MINE
    source: str
    source_id: int
    """``content_id`` of the manifest of the tables."""
    model: str
    fingerprint: str
    chorus_tokens: int
    settings: dict[str, JsonValue]


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


def mine(model: str, prepared: str, out: str, config: RunConfig) -> MineSummary:
    """Write a version of the tables at ``prepared`` whose rows have hard negatives, into ``out``.

    Raises:
        ConfigError: there are no tables or no pairs in them, ``out`` holds something else, or the work of another model
            or other settings.
        CheckpointError: ``model`` cannot be loaded.
    """
    source, target = (Folder.at(place).patient(TIMEOUT_S) for place in (prepared, out))
    if source.uri == target.uri:
        raise ConfigError(f"--out {out!r} holds the tables themselves; choose another folder")
    origin = read_manifest(source)
    shards = row_shards(source, config.mine.rows_per_shard)
    session.connect()
    require_readable_tables(source.uri)
    require_readable_model(model)
    with ray_tasks.remote_errors():
        embed = config.embed
        described = describe_model(
            model, cpus=embed.cpus_per_actor, gpus=embed.gpus_per_actor, chorus_tokens=embed.chorus_tokens
        )
        plan = MinePlan(
            source=source.uri,
            source_id=origin.content_id,
            model=model,
            fingerprint=described.fingerprint,
            chorus_tokens=described.chorus_tokens,
            settings=config.mine.model_dump(mode="json"),
        )
        target.claim(JobKind.MINE)
        require_shared(target)
        with Lease.take(target, JobKind.MINE) as lease:
            _start_or_resume(target, plan)
            return _run(source, target, origin, plan, shards, described, lease, config)


def _run(
    source: Folder,
    target: Folder,
    origin: PrepareManifest,
    plan: MinePlan,
    shards: list[RowShard],
    described: CheckpointInfo,
    lease: Lease,
    config: RunConfig,
) -> MineSummary:
    """Mine the shards that are not finished, and complete the tables."""
    finished = {s.number: mined for s in shards if (mined := finished_shard(target, s)) is not None}
    outcomes = list(finished.values())
    if len(finished) == len(shards) and PrepareManifest.read(target) is not None:
        log.info("%s is complete: nothing to mine", target.uri)
        return _summary(outcomes, plan, was_complete=True)
    missing = [shard for shard in shards if shard.number not in finished]
    if missing:
        keys = _keys(source, shards, config.mine)
        items = number_items(keys)
        images = ray.put(index_images(source.uri))
        embed_items(
            source, target, _item_shards(shards, items), images, plan.model, described.fingerprint, config.embed
        )
        store = _store(target, shards, items, config.mine)
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
        settings=plan.model_dump(mode="json", include={"model", "fingerprint", "chorus_tokens"})
        | plan.settings
        | {
            "negatives_added": summary.negatives,
            "false_negatives_dropped": summary.dropped,
            "rows_with_fewer": dict(sorted(summary.by_reason.items())),
        },
        package="numpy",
    )
    target.remove(VECTORS_FOLDER)
    return summary


def _start_or_resume(target: Folder, plan: MinePlan) -> None:
    """Write the plan into a new output folder, or see that it is the same."""
    earlier = MinePlan.read(target)
    if earlier is None:
        if target.exists(MinePlan.FILE):
            raise ConfigError(f"{target.uri}/{MinePlan.FILE} is damaged; choose another --out")
        plan.write(target)
        return
    same = {"format", "model"}  # the same model may stand at another place
    before, now = (p.model_dump(mode="json", exclude={"settings", *same}) | p.settings for p in (earlier, plan))
    if changed := [name for name in now if before.get(name) != now[name]]:
        name = changed[0]
        raise ConfigError(
            f"{target.uri} was begun with another {name}: {before.get(name)!r}, and now it is {now[name]!r}; choose "
            "another --out, or the settings of then"
        )


def _keys(source: Folder, shards: list[RowShard], config: MineConfig) -> list[RowKeys]:
    """The keys of all rows that take part, by shard."""
    run = partial(row_keys, source=source, config=config)
    dataset = ray_tasks.task_dataset(shards).map(lambda row: ray_tasks.attempt(run, row[ray_tasks.TASK]))
    keys = sorted(ray_tasks.results(dataset), key=lambda found: found.shard)
    if not any(len(found.places) for found in keys):
        raise ConfigError(f"{source.uri} has no row of a split {config.split!r} that has a target: nothing to mine for")
    return list(keys)


def _item_shards(shards: list[RowShard], items: ItemNumbers) -> list[ItemShard]:
    pieces = [slice(begin, end) for begin, end in zip(items.begins[:-1], items.begins[1:], strict=True)]
    return [ItemShard(s, items.rows[piece], items.is_target[piece]) for s, piece in zip(shards, pieces, strict=True)]


def _store(target: Folder, shards: list[RowShard], items: ItemNumbers, config: MineConfig) -> ray.ObjectRef:
    """All vectors in Ray's object store, which spills to disk: by shard, and the targets of each group in blocks."""
    read = ray.remote(num_cpus=0.5, num_returns=3)(read_vectors)
    parts = [read.remote(target, shard.name) for shard in shards]
    vectors, valid, tables = (list(references) for references in zip(*parts, strict=True))
    store = VectorStore(items, vectors, valid, tables)
    shared = ray.put(store)
    gather = ray.remote(num_cpus=0.5)(_block)
    for group, numbers in items.targets.items():
        searched = _sample(numbers, items, config.max_targets)
        if len(searched) < len(numbers):
            log.warning("%d of %d targets of a task are searched (mine.max_targets)", len(searched), len(numbers))
        store.blocks[group] = [
            gather.remote([shared], searched[start : start + _BLOCK_TARGETS])
            for start in range(0, len(searched), _BLOCK_TARGETS)
        ]
    return ray.put(store)


def _sample(numbers: NDArray[np.int64], items: ItemNumbers, most: int) -> NDArray[np.int64]:
    """At most ``most`` of the items, those with the lowest content keys, which are hashes; ascending."""
    if len(numbers) <= most:
        return numbers
    return np.sort(numbers[np.argsort(items.contents[numbers], kind="stable")[:most]])


def _block(store: list[ray.ObjectRef], numbers: NDArray[np.int64]) -> TargetBlock:
    """In a worker: the vectors of some targets; those without one are left out."""
    opened: VectorStore = ray.get(store[0])
    vectors, valid = opened.vectors_of(numbers)
    return TargetBlock(numbers[valid], opened.items.contents[numbers[valid]], vectors[valid])


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
