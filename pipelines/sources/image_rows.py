"""A folder of images without any table: one row an image, and the name of its folder is its label.

The "file" of these rows is the folder, named ``<folder>/*``. Its names are listed once to plan the rows; then a store
that lists in order gives those of a range, and of another store each process lists the folder once. The layout is
that of ``imagefolder`` of Hugging Face and of torchvision: ``cat/1.jpg`` gives ``{"file_name": "1.jpg", "label":
"cat"}``, where ``file_name`` starts at the folder, as it does in a ``metadata.jsonl`` there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from pipelines.sources.input_file import InputFile
from pipelines.sources.listing import Entry, list_folder, lists_in_order
from pipelines.sources.records import FileSchema, FileStamp, ParsedRow, RawRecord, RowRange
from pipelines.tables.storage import Folder

__all__ = ["ALL_OF_FOLDER", "IMAGE_SUFFIXES", "FolderSum", "ImageRows"]

ALL_OF_FOLDER = "*"
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"),
    *(".ico", ".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".svg"),
)
_SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "images", "data")


@dataclass
class FolderSum:
    """Counts the images of a folder, in any order, and sums what identifies them."""

    count: int = 0
    content: int = 0
    """Sum of hashes of names and sizes: the same wherever the folder is stored."""
    versions: int = 0
    """Sum of hashes of names and versions."""

    def add(self, name: str, size: int, version: str) -> None:
        """Count an image by its own name."""
        self.count += 1
        self.content += _hash(f"{name}\0{size}")
        self.versions += _hash(f"{name}\0{version}")

    @property
    def version(self) -> str:
        return f"{(self.content + self.versions) % 2**64:016x}"


class ImageRows:
    """A folder of images."""

    name = "images"
    title = "a folder of images"
    suffixes: tuple[str, ...] = ()
    """None: only a folder without any table is read so."""

    def split(self, file: InputFile, rows: int) -> Iterator[RowRange]:
        names, _ = _listed(file.folder, file.name, file.version)
        for first in range(0, len(names), rows):
            yield file.range(first, min(rows, len(names) - first), after=names[first - 1] if first else "")

    def read(self, rows: RowRange, columns: Sequence[str] | None) -> Iterator[ParsedRow]:
        label = rows.file.rpartition("/")[0].rpartition("/")[2]
        for name in _names(rows):
            record: RawRecord = {"file_name": name}
            if label and label.lower() not in _SPLITS:
                record["label"] = label
            yield record, ""

    def schema(self, file: InputFile) -> FileSchema:
        return FileSchema(("file_name", "label"))

    def stamp(self, file: InputFile) -> FileStamp:
        names, total = _listed(file.folder, file.name, file.version)
        return FileStamp(file.name, len(names), total.version)

    def fingerprint(self, file: InputFile) -> str:
        return f"{_listed(file.folder, file.name, file.version)[1].content % 2**64:016x}"


def is_image(name: str) -> bool:
    """Whether the name of a file is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _names(rows: RowRange) -> Iterable[str]:
    """The images of a range."""
    folder, below = Folder(rows.folder), rows.file.removesuffix(ALL_OF_FOLDER)
    if not lists_in_order(folder):
        return _listed(rows.folder, rows.file, rows.version)[0][rows.first : rows.first + rows.rows]
    images = (image for batch in list_folder(folder, below, after=rows.after) for image in _images(batch))
    return (_base(image.name) for image in islice(images, rows.rows))


@lru_cache(maxsize=4)
def _listed(folder: str, name: str, version: str) -> tuple[tuple[str, ...], FolderSum]:
    """Names of the images of a folder in order, and their sum. ``version`` makes a changed folder be listed anew."""
    total, names = FolderSum(), []
    for batch in list_folder(Folder(folder), name.removesuffix(ALL_OF_FOLDER)):
        for image in _images(batch):
            names.append(_base(image.name))
            total.add(names[-1], image.size, image.version)
    return tuple(sorted(names)), total


def _images(batch: Iterable[Entry]) -> Iterator[Entry]:
    return (entry for entry in batch if is_image(entry.name) and not _base(entry.name).startswith((".", "_")))


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
