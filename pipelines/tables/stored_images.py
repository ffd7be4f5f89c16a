"""Images of prepared tables by id, read when they are needed: an index of where each one is, and a cache of row groups.

The index takes 16 bytes an image and is built by one task per part; in Ray's object store all workers of a node share
it. That carries about 10^8 images. Rows name images in the order in which they are stored, so that a few row groups in
memory serve a worker that walks over the rows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.tables.manifest import table_parts
from pipelines.tables.storage import Folder
from pipelines.tables.storage_retry import require_storage

__all__ = ["StoredImages", "locate_images"]

_GROUPS_IN_MEMORY = 4


@dataclass
class StoredImages:
    """Encoded images by id. May be read by several threads at once."""

    images: Folder
    """The folder of the image table."""
    names: list[str]
    """Its parts."""
    ids: NDArray[np.int64]
    """[N] sorted"""
    places: NDArray[np.int32]
    """[N, 2] part and row group of each id"""
    _groups: OrderedDict[tuple[int, int], dict[int, bytes]] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __reduce__(self) -> tuple[type[StoredImages], tuple[object, ...]]:
        return StoredImages, (self.images, self.names, self.ids, self.places)

    def read(self, image_id: int) -> bytes:
        """Encoded bytes of an image.

        Raises:
            ConfigError: the tables do not hold it.
        """
        at = int(np.searchsorted(self.ids, image_id))
        if at == len(self.ids) or self.ids[at] != image_id:
            raise ConfigError(
                f"a row names the image {image_id}, which {self.images.uri} does not hold; prepare it again"
            )
        part, group = self.places[at].tolist()
        with self._lock:
            return self._group(part, group)[image_id]

    def _group(self, part: int, group: int) -> dict[int, bytes]:
        if (part, group) not in self._groups:
            name = self.names[part]
            self._groups[part, group] = require_storage(name, lambda: self._read_group(name, group))
            while len(self._groups) > _GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
        self._groups.move_to_end((part, group))
        return self._groups[part, group]

    def _read_group(self, name: str, group: int) -> dict[int, bytes]:
        with self.images.open(name) as file:
            table = pq.ParquetFile(file).read_row_group(group, columns=["id", "bytes"])
        return dict(zip(table["id"].to_pylist(), table["bytes"].to_pylist(), strict=True))


def locate_images(prepared: Folder) -> StoredImages:
    """In the driver, with Ray: the index of the image table of ``prepared``."""
    images, names = prepared.child("images"), table_parts(prepared, "images")
    locate = ray.remote(num_cpus=0.25)(_ids_and_groups)
    found = ray.get([locate.remote(images, name) for name in names])
    ids = np.concatenate([np.empty(0, np.int64), *(of_part for of_part, _ in found)])
    parts = np.repeat(np.arange(len(names), dtype=np.int32), [len(of_part) for of_part, _ in found])
    groups = np.concatenate([np.empty(0, np.int32), *(of_part for _, of_part in found)])
    order = np.argsort(ids, kind="stable")
    return StoredImages(images, names, ids[order], np.stack([parts, groups], axis=1)[order])


def _ids_and_groups(images: Folder, name: str) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Ids of the images of one part, and the row group of each."""

    def read() -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        with images.open(name) as file:
            parquet = pq.ParquetFile(file)
            counts = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            ids = parquet.read(columns=["id"])["id"].to_numpy()
        return ids, np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    return require_storage(f"reading {images.uri}/{name}", read)
