"""Vectors of the distinct items: by a pool of actors with one model each, kept in parts so that a killed run resumes.

A part holds the items that were given to one shard: their vectors in the order of their numbers, and the items
themselves, because a mined negative is written as an item. An item that the model cannot read (more images than it
takes) has no vector, and takes no part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from crem.config import EmbedConfig
from crem.data.sequence import PreparedSequence
from crem.errors import CheckpointError, ItemError
from pipelines.mining.mined_items import items_of_shard
from pipelines.tables import ray_tasks, schema
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.models import load_model
from pipelines.tables.new_version import parquet_bytes
from pipelines.tables.prepared import item_of
from pipelines.tables.row_shards import RowShard, read_row_shard
from pipelines.tables.storage import Folder

__all__ = ["VECTORS_FOLDER", "ItemShard", "embed_items", "read_vectors"]

log = logging.getLogger(__name__)

VECTORS_FOLDER = "_vectors"
_STAMP = b"crem.mine"
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


def embed_items(
    source: Folder,
    target: Folder,
    shards: Sequence[ItemShard],
    images: ray.ObjectRef,
    model: str,
    fingerprint: str,
    config: EmbedConfig,
) -> None:
    """Write the parts of ``VECTORS_FOLDER`` that are not there yet."""
    present = set(target.child(VECTORS_FOLDER).files(".parquet"))
    missing = [shard for shard in shards if shard.shard.name not in present]
    total = sum(len(shard.places) for shard in shards)
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
        fn_constructor_args=(source, target, [images], model, fingerprint, config),
    )
    done = 0
    for count in ray_tasks.results(dataset):
        done += count
        log.info("embedded %d of %d items", done, sum(len(shard.places) for shard in missing))


class ItemEmbedder:
    """The actor: one model, embeds the items of a shard per call."""

    def __init__(
        self,
        source: Folder,
        target: Folder,
        images: list[ray.ObjectRef],
        model: str,
        fingerprint: str,
        config: EmbedConfig,
    ):
        self.source, self.target, self.fingerprint = source, target, fingerprint
        self.images: ImageIndex = ray.get(images[0])
        self.model = load_model(model, config.threads_per_actor, config.chorus_tokens)
        self.batch_size = config.batch_size

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [ray_tasks.attempt(self.embed_shard, shard) for shard in batch[ray_tasks.TASK].to_pylist()]
        )

    def embed_shard(self, shard: ItemShard) -> int:
        """Embed the items of a shard and write them as one part; how many there are."""
        if self.model.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"the model changed during the run: it was {self.fingerprint} and is {self.model.fingerprint}; run "
                "again once nothing writes to it"
            )
        items = items_of_shard(read_row_shard(self.source, shard.shard), shard.places, shard.is_target)
        vectors = np.zeros((len(items), self.model.dim), np.float32)
        valid = np.zeros(len(items), np.bool_)
        step = self.batch_size * _WINDOW
        for start in range(0, len(items), step):
            window = items[start : start + step]
            images = self.images.fetch(np.array([i for item in window for i in item["images"] or ()], np.int64))
            prepared = [self._prepared(item, images) for item in window]
            places = [start + i for i, sequence in enumerate(prepared) if sequence is not None]
            sequences = [sequence for sequence in prepared if sequence is not None]
            if sequences:
                vectors[places] = self.model.embed_prepared(sequences, batch_size=self.batch_size)
            valid[places] = True
        self.target.write_bytes(
            parquet_bytes(_part(items, vectors, valid, self.fingerprint)), VECTORS_FOLDER, shard.shard.name
        )
        return len(items)

    def _prepared(self, item: schema.ArrowRow, images: dict[int, bytes]) -> PreparedSequence | None:
        try:
            return self.model.prepare(item_of(item, images.__getitem__))
        except ItemError as error:
            log.warning("an item has no vector: %s", error)
            return None


def read_vectors(target: Folder, name: str) -> tuple[NDArray[np.float32], NDArray[np.bool_], pa.Table]:
    """In a worker: vectors [items, D], whether each is valid, and the items, of one part."""
    with target.open(VECTORS_FOLDER, name) as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
    dim = json.loads(table.schema.metadata[_STAMP])["dim"]
    column = table["vector"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return vectors, table["valid"].to_numpy(), table.select(["item"])


def _part(items: list[Any], vectors: NDArray[np.float32], valid: NDArray[np.bool_], fingerprint: str) -> pa.Table:
    dim = vectors.shape[1]
    stamp = {_STAMP: json.dumps({"dim": dim, "fingerprint": fingerprint})}
    fields = [("item", schema.ITEM), ("valid", pa.bool_()), ("vector", pa.list_(pa.float32(), dim))]
    columns = [
        pa.array(items, schema.ITEM),
        pa.array(valid),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dim),
    ]
    return pa.table(columns, schema=pa.schema(fields, metadata=stamp))
