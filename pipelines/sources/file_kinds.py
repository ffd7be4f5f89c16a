"""What a name says about a file of a corpus: rows, pictures, or something that is not read. Pure functions.

Everything that is not read has a kind and a reason, and a kind that one would not expect beside rows is a warning.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.sources.image_rows import IMAGE_SUFFIXES
from pipelines.sources.known_containers import container_of
from pipelines.sources.records import Ignored

__all__ = ["CAPTIONS_OF_COCO", "COCO", "IMAGES", "IgnoredCounts", "Kind", "besides_captions", "is_hidden", "kind_of"]

_NAMES_KEPT = 6


@dataclass(frozen=True)
class Kind:
    """A kind of file that is not read as rows."""

    name: str
    why: str
    expected: bool


HIDDEN = Kind("hidden", "names that begin with . or _ are not part of a corpus", True)
IMAGES = Kind("images", "pictures that rows may name", True)
ARCHIVES = Kind("archives", "pictures that rows may name", True)
DOCUMENTS = Kind("documents", "about the corpus, not of it", True)
METADATA = Kind("metadata", "about the files, not rows", True)
UNFINISHED = Kind("unfinished", "a download or an upload that did not end; get it again", False)
BROKEN = Kind("broken links", "links to nothing; get the files that they mean", False)
TABLES = Kind("other tables", "a kind of table that is not read; write it as Parquet", False)
MEDIA = Kind("media", "neither rows nor pictures", False)
UNKNOWN = Kind("unknown", "no known kind of file", False)
BESIDE_ROWS = Kind("beside rows/", "where there is a folder rows/, only rows in it are read; move them there", False)
FOLDER_BESIDE_ROWS = Kind("folders beside rows/", "where there is a folder rows/, no other is searched for rows", False)
IMAGE_FOLDER = Kind("folders of images", "pictures that rows may name; not searched for rows", True)
BAD_NAME = Kind("names that are not UTF-8", "they cannot be stored in a table; rename the files", False)
COCO = Kind("other annotations of COCO", "boxes, key points or masks of images whose captions are read", True)
NOT_NAMED = Kind("other files", "the pattern does not name them", True)

CAPTIONS_OF_COCO = re.compile(r"captions_(?P<images>[^/]+)\.json(\.\w+)?")
_OTHERS_OF_COCO = re.compile(r"(instances|person_keypoints|stuff|panoptic|image_info)_[^/]+\.json(\.\w+)?")

_BY_SUFFIX = {
    IMAGES: IMAGE_SUFFIXES,
    ARCHIVES: (".zip",),
    DOCUMENTS: (".md", ".rst", ".pdf", ".html", ".bib", ".py", ".ipynb", ".sh", ".cff"),
    METADATA: (".yaml", ".yml", ".toml", ".ini", ".crc", ".md5", ".sha256", ".sha1", ".idx", ".index", ".log"),
    UNFINISHED: (".partial", ".part", ".tmp", ".crdownload", ".incomplete", ".download"),
    TABLES: (
        *(".arrow", ".feather", ".orc", ".avro", ".h5", ".hdf5", ".tfrecord", ".tfrecords", ".xlsx", ".xls", ".pkl"),
        *(".pickle", ".npy", ".npz", ".sqlite", ".db", ".duckdb", ".msgpack", ".mds", ".pt", ".lmdb", ".rar", ".7z"),
        *(".jsonl.lz4", ".jsonl.br", ".csv.zip", ".xml", ".mat", ".dta", ".rec"),
    ),
    MEDIA: (".mp4", ".avi", ".mov", ".mkv", ".webm", ".wav", ".mp3", ".flac", ".ogg"),
}
_KIND_OF_SUFFIX = {suffix: kind for kind, suffixes in _BY_SUFFIX.items() for suffix in suffixes}
_METADATA_NAMES = frozenset(
    {
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json", "config.json"),
        *("stats.json", "schema.json", "datapackage.json", "croissant.json", "package.json", "dataset-metadata.json"),
    }
)
_DOCUMENT_NAMES = ("readme", "license", "licence", "citation", "notice", "changelog", "authors", "requirements")


def is_hidden(path: str) -> bool:
    """Whether any part of a path says that it is not meant to be read."""
    return any(part.startswith((".", "_")) for part in path.rstrip("/").split("/"))


def kind_of(path: str) -> str | Kind:
    """Name of the container that reads a file, or the kind of one that is not read."""
    name = path.rpartition("/")[2].lower()
    if is_hidden(path):
        return HIDDEN
    if name in _METADATA_NAMES or name.endswith(("_stats.json", ".metadata.json", "_infos.json")):
        return METADATA
    if name.startswith(_DOCUMENT_NAMES) and not name.endswith((".parquet", ".tar")):
        return DOCUMENTS
    container = container_of(name)
    if container is not None:
        return container
    parts = name.split(".")
    ends = (f".{'.'.join(parts[i:])}" for i in range(max(1, len(parts) - 2), len(parts)))
    return next((_KIND_OF_SUFFIX[end] for end in ends if end in _KIND_OF_SUFFIX), UNKNOWN)


def besides_captions(names: pa.ChunkedArray) -> list[str]:
    """The annotation files of COCO that stand in a folder with captions, and hold none."""
    if not pc.any(pc.match_substring(names, "captions_")).as_py():
        return []
    split = [posixpath.split(name) for name in names.to_pylist()]
    folders = {folder for folder, name in split if CAPTIONS_OF_COCO.fullmatch(name)}
    return [posixpath.join(f, n) for f, n in split if f in folders and _OTHERS_OF_COCO.fullmatch(n)]


@dataclass
class IgnoredCounts:
    """Counts what is not read, by kind."""

    _counts: dict[Kind, int] = field(default_factory=dict)
    _names: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, kind: Kind, name: str) -> None:
        """Count a file, or a folder that was not entered."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        names = self._names.setdefault(kind, [])
        if len(names) < _NAMES_KEPT or name < names[-1]:  # the first by name, whatever the order of the listing
            self._names[kind] = sorted([*names, name])[:_NAMES_KEPT]

    def drop(self, kind: Kind) -> None:
        """Forget a kind: its files are read after all."""
        self._counts.pop(kind, None)

    def all(self) -> tuple[Ignored, ...]:
        """What was counted, the unexpected first."""
        kinds = sorted(self._counts, key=lambda kind: (kind.expected, kind.name))
        return tuple(
            Ignored(kind.name, kind.why, self._counts[kind], tuple(self._names[kind]), kind.expected) for kind in kinds
        )
