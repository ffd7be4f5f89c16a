"""Vectors of the distinct items: by a pool of actors with one model each, kept in parts so that a killed run resumes.

A part holds the items that are taken from one shard, in the order of their numbers, and looks as one of ``crem embed``,
with ``item_key`` as the id: another run of ``crem mine`` takes it, and so does ``crem index``. An item that the model
cannot read (more images than it takes) has a null vector and its error, and takes no part in the mining.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray

from crem.config import EmbedConfig
from crem.data.sequence import PreparedSequence
from crem.errors import CheckpointError, ItemError
from crem.model.encoding import default_batch_tokens
from pipelines.mining.given_vectors import ids_of_part
from pipelines.mining.mined_items import items_of_shard
from pipelines.tables import ray_tasks, schema
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.models import load_model
from pipelines.tables.new_version import parquet_bytes
from pipelines.tables.prepared import item_of
from pipelines.tables.row_shards import RowShard, read_row_shard
from pipelines.tables.storage import Folder
from pipelines.tables.vector_types import prefix_of

__all__ = ["VECTORS_FOLDER", "ItemShard", "embed_items"]

log = logging.getLogger(__name__)

VECTORS_FOLDER = "vectors"
_WINDOW = 8
"""Batches that are prepared and sorted by length together."""


@dataclass(frozen=True)
class ItemShard:
    """The items that are taken from the rows of a shard."""

    shard: RowShard
    places: NDArray[np.int64]
    """[items] position of the row"""
    is_target: NDArray[np.bool_]
    """[items] whether the item is its target"""
    keys: NDArray[np.int64]
    """[items] ``item_key``"""

    def only(self, wanted: NDArray[np.bool_]) -> Self:
        """Some of the items."""
        return replace(self, places=self.places[wanted], is_target=self.is_target[wanted], keys=self.keys[wanted])


def embed_items(
    source: Folder,
    target: Folder,
    shards: Sequence[ItemShard],
    images: ray.ObjectRef,
    stamp: schema.EmbeddingStamp,
    config: EmbedConfig,
) -> None:
    """Write the parts of ``VECTORS_FOLDER`` that are not there yet, by the model that ``stamp`` names."""
    folder = target.child(VECTORS_FOLDER)
    present = set(folder.files(".parquet"))
    names = [shard.shard.name for shard in shards if shard.shard.name in present]
    found = dict(zip(names, ray_tasks.on_nodes(partial(ids_of_part, folder), names), strict=True))
    missing = [shard for shard in shards if not _is_of(shard, stamp, found.get(shard.shard.name))]
    total = sum(len(shard.keys) for shard in shards)
    log.info("embedding %d distinct queries and targets, %d of %d parts to do", total, len(missing), len(shards))
    if not missing:
        return
    most = min(config.max_actors, len(missing))
    dataset = ray_tasks.task_dataset(missing).map_batches(
        ItemEmbedder,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(config.min_actors, most), max_size=most),
        num_cpus=config.cpus_per_actor,
        num_gpus=config.gpus_per_actor,
        fn_constructor_args=(source, folder, [images], stamp, config),
    )
    done = 0
    for count in ray_tasks.results(dataset):
        done += count
        log.info("embedded %d of %d items", done, sum(len(shard.keys) for shard in missing))


class ItemEmbedder:
    """The actor: one model, embeds the items of a shard per call."""

    def __init__(
        self,
        source: Folder,
        target: Folder,
        images: list[ray.ObjectRef],
        stamp: schema.EmbeddingStamp,
        config: EmbedConfig,
    ):
        self.source, self.target, self.stamp = source, target, stamp
        self.images: ImageIndex = ray.get(images[0])
        self.model = load_model(stamp.model, config.threads_per_actor, config.chorus_tokens)
        self.batch_size = config.batch_size
        self.batch_tokens = config.batch_tokens or default_batch_tokens(self.model.device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [ray_tasks.attempt(self.embed_shard, shard) for shard in batch[ray_tasks.TASK].to_pylist()]
        )

    def embed_shard(self, shard: ItemShard) -> int:
        """Embed the items of a shard and write them as one part; how many there are."""
        if self.model.fingerprint != self.stamp.fingerprint:
            raise CheckpointError(
                f"the model changed during the run: it was {self.stamp.fingerprint} and is {self.model.fingerprint}; "
                "run again once nothing writes to it"
            )
        items = items_of_shard(read_row_shard(self.source, shard.shard), shard.places, shard.is_target)
        vectors = np.zeros((len(items), self.stamp.dim), np.float32)
        errors: list[str | None] = []
        step = self.batch_size * _WINDOW
        for start in range(0, len(items), step):
            window = items[start : start + step]
            images = self.images.fetch(np.array([i for item in window for i in item["images"] or ()], np.int64))
            prepared = [self._prepared(item, images) for item in window]
            places = [start + i for i, found in enumerate(prepared) if not isinstance(found, str)]
            sequences = [found for found in prepared if not isinstance(found, str)]
            if sequences:
                whole = self.model.embed_prepared(sequences, batch_size=self.batch_size, batch_tokens=self.batch_tokens)
                vectors[places] = prefix_of(whole, self.stamp.dim)
            errors += [found if isinstance(found, str) else None for found in prepared]
        part = _part(shard, [item["text"] for item in items], vectors, errors, self.stamp)
        self.target.write_bytes(parquet_bytes(part), shard.shard.name)
        return len(items)

    def _prepared(self, item: schema.ArrowRow, images: dict[int, bytes]) -> PreparedSequence | str:
        """The item as the model reads it, or why it cannot."""
        try:
            return self.model.prepare(item_of(item, images.__getitem__))
        except ItemError as error:
            log.warning("an item has no vector: %s", error)
            return str(error)


def _is_of(
    shard: ItemShard, stamp: schema.EmbeddingStamp, found: tuple[schema.EmbeddingStamp | None, NDArray[np.int64]] | None
) -> bool:
    """Whether a part that was found holds the vectors of the items of a shard."""
    return (
        found is not None
        and found[0] is not None
        and found[0].of_vectors() == replace(stamp, model=found[0].model)
        and np.array_equal(found[1], shard.keys)
    )


def _part(
    shard: ItemShard,
    texts: list[str | None],
    vectors: NDArray[np.float32],
    errors: list[str | None],
    stamp: schema.EmbeddingStamp,
) -> pa.Table:
    null = pa.array([error is not None for error in errors])
    columns = [
        pa.array(shard.keys),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), stamp.dim, mask=null),
        pa.array(errors, pa.string()),
        pa.nulls(len(errors), pa.string()),
        pa.array(texts, pa.string()),
    ]
    return pa.table(columns, schema=schema.embeddings(stamp))
