"""Finds the row files of a place, and accounts for everything else in it.

A folder ``rows/`` means that the table is there. Otherwise the whole folder is searched, except for a folder
``images/`` at its top if there are rows elsewhere. A folder with images and no table at all gives one row an image.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import pyarrow as pa
import pyarrow.compute as pc

from crem.errors import ConfigError, StorageError
from pipelines.sources import file_kinds as kinds
from pipelines.sources.container import FolderContainer
from pipelines.sources.file_kinds import CAPTIONS_OF_COCO, IgnoredCounts, besides_captions, is_hidden, kind_of
from pipelines.sources.image_rows import ALL_OF_FOLDER, FolderSum, ImageRows
from pipelines.sources.input_file import InputFile, current_stamp, storage_call
from pipelines.sources.known_containers import CONTAINERS, container_named, container_of
from pipelines.sources.lance_rows import LanceRows
from pipelines.sources.listing import Entry, list_folder, list_tree
from pipelines.sources.records import FileStamp, Ignored
from pipelines.sources.source_files import FILES, SourceFiles
from pipelines.tables.storage import Folder

__all__ = ["find"]

log = logging.getLogger(__name__)

_ROWS, _IMAGES = "rows", "images"
_FIRST_TIMEOUT_S = 60.0
"""How long the first look waits for storage that does not answer: the address may be wrong."""
_FLUSH_FILES = 10_000
_COCO_FILES = 100
"""More files than this are not captions of COCO."""
_VERSIONED = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
"""Folders of tables whose files also hold rows that were deleted."""
_ICEBERG = re.compile(r"(^|/)metadata/[^/]*\.metadata\.json$")


def find(place: str, *, what: str = "corpus") -> SourceFiles:
    """The row files of a folder (of its ``rows/`` if it has one), a single file, or the files that a pattern names.

    Args:
        place: path or URI; a pattern has ``*``, ``?`` or ``[…]`` in it, and ``**`` for any folders.
        what: the name of the input in error messages.

    Raises:
        ConfigError: ``place`` does not exist, has no row files, or cannot be read.
        StorageError: the storage does not answer.
    """
    try:
        source = _find(place, what)
    except (ConfigError, StorageError):
        raise
    except Exception as error:  # of botocore or of the operating system: the place cannot be listed
        raise ConfigError(
            f"{what} {place!r} cannot be read: {type(error).__name__}: {error}; check the address, and for s3:// "
            "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from error
    _say(source)
    return source


def _find(place: str, what: str) -> SourceFiles:
    root, pattern = Folder.at(place), None
    look = root.patient(_FIRST_TIMEOUT_S)
    exists = look.exists()
    if not exists and re.search(r"[*?\[]", place):
        root, pattern = _pattern(place)
        look = root.patient(_FIRST_TIMEOUT_S)
        exists = look.exists()
    if pattern is None and (look.is_file() or _is_lance(look)):
        return _single(place, look)
    if not exists:
        raise ConfigError(f"{what} {place!r} does not exist; give the folder or s3:// URI that holds rows/*.parquet")
    if pattern is None and look.exists(_ROWS):
        rows = root.child(_ROWS)
        inventory = _Inventory(rows).take()
        if inventory.has_rows:
            return SourceFiles(root, rows, inventory.table(), _beside_rows(root, inventory.ignored))
    inventory = _Inventory(root, pattern, enter_images=False).take()
    if not inventory.has_rows:
        inventory = _Inventory(root, pattern).take()
    table = inventory.table() if inventory.has_rows or pattern else inventory.image_table()
    ignored = inventory.ignored.all()
    if not table.num_rows:
        found = "; ".join(f"{i.count} {i.kind} ({', '.join(i.names[:4])}): {i.why}" for i in ignored) or "nothing"
        raise ConfigError(f"{what} {place!r} holds no rows: known are {_known()}; found {found}")
    return SourceFiles(_image_root(root, table), root, table, ignored)


def _single(place: str, file: Folder) -> SourceFiles:
    container = LanceRows.name if _is_lance(file) else container_of(file.name)
    if container is None:
        raise ConfigError(f"{place!r} is no file of rows; known are {_known()}")
    parent = Folder(file.uri.rpartition("/")[0] or "/")
    inventory = _Inventory(parent)
    of_folder = isinstance(container_named(container), FolderContainer)
    stamp = FileStamp(file.name, 0, "")
    if not of_folder:
        stamp = storage_call(file.uri, lambda: current_stamp(parent, file.name), timeout_s=_FIRST_TIMEOUT_S)
    inventory.add_rows(stamp, container)
    table = inventory.table()
    return SourceFiles(_image_root(parent, table), parent, table)


def _image_root(folder: Folder, table: pa.Table) -> Folder:
    """Where the names of images start: above a folder of COCO's captions, whose images are in folders beside it."""
    captions = [CAPTIONS_OF_COCO.fullmatch(name) for name in table["name"].slice(0, _COCO_FILES + 1).to_pylist()]
    above = folder.uri.rpartition("/")[0]
    if len(captions) > _COCO_FILES or not above.strip("/") or above.endswith("/"):
        return folder
    images = [found["images"] for found in captions if found]
    if len(images) < len(captions) or any(map(folder.patient(_FIRST_TIMEOUT_S).exists, images)):
        return folder
    parent = Folder(above)
    beside = folder.name == "annotations" or any(map(parent.patient(_FIRST_TIMEOUT_S).exists, images))
    return parent if beside else folder


def _is_lance(folder: Folder) -> bool:
    """Whether a folder is itself a Lance dataset, whatever its name."""
    return folder.exists("_versions") and folder.exists("data")


def _pattern(place: str) -> tuple[Folder, tuple[str, ...]]:
    """The folder before the first part that is a pattern, and the parts from there."""
    scheme, separator, path = place.rpartition("://")
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if re.search(r"[*?\[]", part))
    above = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return Folder.at(f"{scheme}{separator}{above}"), tuple(parts[first:])


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


@dataclass
class _Inventory:
    """What is in a folder."""

    folder: Folder
    pattern: tuple[str, ...] | None = None
    enter_images: bool = True
    ignored: IgnoredCounts = field(default_factory=IgnoredCounts)
    _rows: list[tuple[str, int, str, str]] = field(default_factory=list)
    _batches: list[pa.RecordBatch] = field(default_factory=list)
    _images: dict[str, FolderSum] = field(default_factory=dict)

    @property
    def has_rows(self) -> bool:
        return bool(self._rows or self._batches)

    def take(self) -> _Inventory:
        """List all."""
        for batch in list_tree(self.folder, self._enter):
            for entry in batch:
                self._add(entry)
        return self

    def table(self) -> pa.Table:
        """The row files, as ``FILES``, in the order of their names."""
        self._flush()
        table = pa.Table.from_batches(self._batches, FILES)
        table = table.take(pc.sort_indices(table, [("name", "ascending")])).combine_chunks()
        for name in (others := besides_captions(table["name"])):
            self.ignored.add(kinds.COCO, name)
        return table.filter(pc.invert(pc.is_in(table["name"], pa.array(others, pa.string())))) if others else table

    def image_table(self) -> pa.Table:
        """The folders of images as files of rows, where there are no others."""
        for folder, total in self._images.items():
            self.add_rows(FileStamp(f"{folder}{ALL_OF_FOLDER}", total.count, total.version), ImageRows.name)
        self.ignored.drop(kinds.IMAGES)
        return self.table()

    def add_rows(self, stamp: FileStamp, container: str) -> None:
        """Add a row file."""
        known = container_named(container)
        if isinstance(known, FolderContainer) and not stamp.version:
            stamp = known.stamp(InputFile(self.folder.uri, stamp.file, container, 0, ""))
        self._rows.append((stamp.file, stamp.size, stamp.version, container))
        if len(self._rows) >= _FLUSH_FILES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, kind.type) for column, kind in zip(columns, FILES, strict=True)]
            self._batches.append(pa.record_batch(arrays, schema=FILES))
            self._rows = []

    def _enter(self, path: str) -> bool:
        images = path == f"{_IMAGES}/" and not self.enter_images and self.pattern is None
        return not (is_hidden(path) or images or path.lower().endswith(".lance/"))

    def _add(self, entry: Entry) -> None:
        name = entry.name.rstrip("/")
        kind = kind_of(name)
        if (versioned := _VERSIONED.get(name.rpartition("/")[2])) or (versioned := _iceberg(name)):
            raise ConfigError(
                f"{self.folder.uri} holds a {versioned} table ({name}), whose files also hold rows that were deleted "
                "or replaced; export the present version as Parquet"
            )
        if entry.is_folder and not isinstance(kind, str):
            self.ignored.add(kinds.HIDDEN if is_hidden(name) else kinds.IMAGE_FOLDER, entry.name)
        elif entry.size < 0:
            self.ignored.add(kinds.BROKEN, name)
        elif not _is_utf8(name):
            self.ignored.add(kinds.BAD_NAME, repr(name))
        elif self.pattern is not None and not _matches(name.split("/"), self.pattern):
            self.ignored.add(kinds.NOT_NAMED, name)
        elif isinstance(kind, str) and (kind == LanceRows.name) == entry.is_folder:
            self.add_rows(FileStamp(name, entry.size, entry.version), kind)
        else:
            kind = kinds.TABLES if isinstance(kind, str) else kind  # a file of Lance without its dataset
            self.ignored.add(kind, name)
            if kind is kinds.IMAGES and not self.has_rows:
                below, _, image = name.rpartition("/")
                folder = f"{below}/" if below else ""
                self._images.setdefault(folder, FolderSum()).add(image, entry.size, entry.version)


def _iceberg(name: str) -> str | None:
    return "Iceberg" if _ICEBERG.search(name) else None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _beside_rows(root: Folder, ignored: IgnoredCounts) -> tuple[Ignored, ...]:
    """What is in ``rows/`` and not read, and what is beside it."""
    for batch in list_folder(root):
        for entry in batch:
            name, kind = entry.name.rstrip("/"), kind_of(entry.name.rstrip("/"))
            if name == _ROWS:
                continue
            if isinstance(kind, str):
                ignored.add(kinds.BESIDE_ROWS, entry.name)
            elif entry.is_folder and not is_hidden(name):
                ignored.add(kinds.IMAGE_FOLDER if name == _IMAGES else kinds.FOLDER_BESIDE_ROWS, entry.name)
            else:
                ignored.add(kind, name)
    return ignored.all()


def _known() -> str:
    return ", ".join(f"{c.title} ({c.suffixes[0]})" if c.suffixes else c.title for c in CONTAINERS)


def _say(source: SourceFiles) -> None:
    """Log what is read and what is not; a guess that may be wrong is a warning."""
    by_container = Counter(dict(zip(*_counts(source.table), strict=True)))
    what = ", ".join(f"{count} of {container_named(name).title}" for name, count in sorted(by_container.items()))
    if len(by_container) > 1:
        log.warning("%s: files of several kinds are read as rows: %s", source.folder.uri, what)
    else:
        log.info("%s: %s", source.folder.uri, what)
    for ignored in source.ignored:
        more = f", … {ignored.count} in all" if ignored.count > len(ignored.names) else ""
        level = logging.INFO if ignored.expected else logging.WARNING
        log.log(
            level, "%s: not read: %s: %s%s (%s)",
            source.root.uri, ignored.kind, ", ".join(ignored.names), more, ignored.why,
        )  # fmt: skip


def _counts(table: pa.Table) -> tuple[list[str], list[int]]:
    counts = pc.value_counts(table["container"].combine_chunks())
    return counts.field("values").to_pylist(), counts.field("counts").to_pylist()
