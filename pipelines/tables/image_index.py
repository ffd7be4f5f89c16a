"""Where the bytes of every image stand, and fetching those of chosen images.

The index takes 24 bytes an image and is read from the footers of the parts alone (``image_parts``). Images are fetched
in requests of exactly their bytes; those that stand close together share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from fsspec.utils import merge_offset_ranges
from numpy.typing import NDArray

from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.image_parts import BY_ROW, PLACE
from pipelines.tables.part_reads import in_threads, open_part, read_part
from pipelines.tables.storage import Folder

__all__ = ["ImageIndex"]

_GAP_BYTES = 64 * 2**10
"""Unwanted bytes between two images that are read with them rather than by a second request: storage sends them in less
time than it takes to answer one."""
_REQUEST_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ImageIndex:
    """Places of the images of some parts, in the order of their ids."""

    images: Folder
    """the image table"""
    parts: tuple[str, ...]
    """file names of its parts"""
    ids: NDArray[np.int64]
    part: NDArray[np.int32]
    """[images] position in ``parts``"""
    start: NDArray[np.int64]
    length: NDArray[np.int32]

    @classmethod
    def of(cls, images: Folder, parts: Sequence[str], places: Sequence[NDArray[Any]]) -> ImageIndex:
        """From what ``image_places`` found in each of the parts."""
        known = [np.empty(0, PLACE), *places]
        ids = np.concatenate([p["id"] for p in known])
        part = np.repeat(np.arange(len(places), dtype=np.int32), [len(p) for p in places])
        order = np.argsort(ids)
        start, length = (np.concatenate([p[name] for p in known])[order] for name in ("start", "length"))
        return cls(images, tuple(parts), ids[order], part[order], start, length)

    def fetch(self, wanted: NDArray[np.int64]) -> dict[int, bytes]:
        """Encoded bytes of images by id; each is checked against its id.

        Raises:
            ConfigError: an image is in no part, or a part is missing or damaged. StorageError: storage did not answer.
        """
        wanted = np.unique(wanted)
        at = np.minimum(np.searchsorted(self.ids, wanted), max(0, len(self.ids) - 1))
        known = self.ids[at] == wanted if len(self.ids) else np.zeros(len(wanted), np.bool_)
        if not known.all():
            raise ConfigError(
                f"a row names the image {wanted[~known][0]}, which is in no part of {self.images.uri}; "
                "run crem prepare again"
            )
        by_row = self.length[at] == BY_ROW
        return self._by_place(at[~by_row]) | self._by_row(at[by_row])

    def _by_place(self, at: NDArray[np.int64]) -> dict[int, bytes]:
        """Images at these positions of the index, by requests of their bytes."""
        at = at[np.lexsort((self.start[at], self.part[at]))]
        names = [self.parts[part] for part in self.part[at].tolist()]
        ids, starts, ends = self.ids[at].tolist(), self.start[at].tolist(), (self.start[at] + self.length[at]).tolist()
        places = iter(zip(ids, names, starts, ends, strict=True))
        requests, place = [], next(places, None)
        merged = merge_offset_ranges(names, starts, ends, _GAP_BYTES, _REQUEST_BYTES, sort=False)
        for name, start, end in zip(*merged, strict=True):
            held = []
            while place is not None and place[1] == name and place[3] <= end:
                held.append((place[0], place[2] - start, place[3] - start))
                place = next(places, None)
            requests.append((name, start, end, held))
        assert place is None, f"{place} is in no request"
        fetched = in_threads(lambda request: self._request(*request), requests)
        return {image_id: data for group in fetched for image_id, data in group}

    def _request(
        self, name: str, start: int, end: int, held: Sequence[tuple[int, int, int]]
    ) -> list[tuple[int, bytes]]:
        """One request, and the images in it: (id, first byte, end)."""
        path = self.images.path(name)
        data: bytes = read_part(self.images, name, lambda: self.images.fs.cat_file(path, start=start, end=end))
        images = [(image_id, data[first:last]) for image_id, first, last in held]
        for image_id, image in images:
            if schema.content_id(image) != image_id:
                raise ConfigError(
                    f"{self.images.uri}/{name} is damaged: the image {image_id} is not among "
                    f"its bytes {start} to {end}; run crem prepare again"
                )
        return images

    def _by_row(self, at: NDArray[np.int64]) -> dict[int, bytes]:
        """Images at these positions of the index, by reading the row groups that hold them."""
        found: dict[int, bytes] = {}
        for part in np.unique(self.part[at]).tolist():
            wanted = at[self.part[at] == part]
            rows = dict(zip(self.start[wanted].tolist(), self.ids[wanted].tolist(), strict=True))
            read = partial(self._row_groups, self.parts[part], rows)
            found |= read_part(self.images, self.parts[part], read)
        return found

    def _row_groups(self, name: str, rows: dict[int, int]) -> dict[int, bytes]:
        """Images of a part by the numbers of their rows."""
        found: dict[int, bytes] = {}
        with open_part(self.images, name, whole=True) as file:
            reader, start = pq.ParquetFile(file), 0
            for group in range(reader.num_row_groups):
                stop = start + reader.metadata.row_group(group).num_rows
                if wanted := [row - start for row in rows if start <= row < stop]:
                    table = reader.read_row_group(group, columns=["id", "bytes"], use_threads=False).take(wanted)
                    found |= dict(zip(table["id"].to_pylist(), table["bytes"].to_pylist(), strict=True))
                start = stop
        if missing := set(rows.values()) - set(found):
            raise ValueError(f"it no longer holds the image {missing.pop()}")
        return found
