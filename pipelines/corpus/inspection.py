"""``crem inspect``: what is at a place, before a job is paid for. It writes nothing but the page it is asked for.

It says what ``crem prepare`` would do: which files are rows and which are not, the format, the use of every column,
what would be rejected of a sample and why, and some rows with their images as the model would see them. It runs in this
process, without Ray.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from crem.config import RunConfig
from crem.data.image_bytes import is_inline
from crem.data.images import decode_image, encode_image
from crem.errors import ConfigError, ItemError
from pipelines.corpus.corpus_place import require_raw
from pipelines.corpus.token_limit import check_tokens
from pipelines.formats.detection import ColumnUse, Detection, detect_source
from pipelines.formats.raw_rows import RawRow, check_row
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.sampling import chosen_files
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.known_containers import container_named
from pipelines.sources.records import SourceRow
from pipelines.sources.sources import SourceFiles

__all__ = ["Inspection", "RowCount", "SampledImage", "SampledRow", "inspect_source"]

_SAMPLED_FILES = 16
_RECORDS = 200
"""Records that are checked, spread over the sampled files."""
_SHOWN_ROWS = 5
_THUMBNAIL_PIXELS = 320 * 320
_COUNTING_S = 30.0
"""Compressed and text files are counted by reading them; after this time the rest is reckoned from their bytes."""
_CELL = 160
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class RowCount:
    """Records of a corpus."""

    rows: int
    exact: bool
    """False where ``rows`` is reckoned from the bytes of the files that were counted in time."""


@dataclass(frozen=True)
class SampledImage:
    """An image of a shown row."""

    name: str
    width: int
    height: int
    thumbnail: bytes


@dataclass(frozen=True)
class SampledRow:
    """A row with its images."""

    row: RawRow
    images: dict[str | bytes, SampledImage]


@dataclass
class Inspection:
    """What was found."""

    place: str
    files: SourceFiles
    detection: Detection
    count: RowCount
    warnings: list[str]
    """What is not read, a line for each column and kind of file."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first value of each column."""
    records_checked: int = 0
    rows_checked: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows of the sample by reason."""
    first_rejected: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Key and detail of the first row of each reason."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height in pixels of the images of the sample."""
    samples: list[SampledRow] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """Bytes of the row files."""
        return int(sum(self.files.table["size"].to_pylist()))

    @property
    def columns(self) -> list[ColumnUse]:
        """The columns of all layouts, each once; one that any layout uses is used."""
        columns: dict[str, ColumnUse] = {}
        for layout in self.detection.layouts:
            columns |= {c.name: c for c in layout.columns if c.name not in columns or c.use == "used"}
        return list(columns.values())


def inspect_source(source: str, config: RunConfig) -> Inspection:
    """Look at the raw corpus ``source`` (path or URI).

    Raises:
        ConfigError: there is no corpus, its format is not known, or a file is damaged.
        ResourceError: the storage fails.
    """
    files = sources.find(source)
    require_raw(source)
    refusal = ""
    try:
        detection = detect_source(files, config.prepare, section="prepare")
    except ConfigError as error:  # a column that is nearly a known one: prepare refuses it, and here it is shown
        lenient = config.prepare.model_copy(update={"allow_unknown": True})
        detection, refusal = detect_source(files, lenient, section="prepare"), str(error)
    found = Inspection(source, files, detection, RowCount(0, exact=False), [])
    reader = RecordReader(detection, files.root.name)
    images = ImageReader.of(files.root, config.model.image, config.prepare, files.archives)
    for row in _first_rows(files):
        _check(row, reader, images, config, found)
    found.warnings = [f"prepare refuses this corpus: {refusal}"] if refusal else []
    found.warnings += detection.warnings(reader.unknown) + [
        f"{ignored.count} files are not read ({', '.join(ignored.names[:3])}{' …' if ignored.count > 3 else ''}): "
        f"{ignored.why}"
        for ignored in files.ignored
        if not ignored.expected
    ]
    found.count = _count(files)
    return found


def _first_rows(files: SourceFiles) -> Iterator[SourceRow]:
    """The first rows of files spread over the corpus."""
    chosen = set(chosen_files(files.names, _SAMPLED_FILES))
    each = -(-_RECORDS // max(1, len(chosen)))
    for file in files.files():
        if file.name in chosen:
            first = next(iter(container_named(file.container).split(sources.identified(file), each)), None)
            if first is not None:
                yield from islice(sources.read(first), each)


def _check(row: SourceRow, reader: RecordReader, images: ImageReader, config: RunConfig, found: Inspection) -> None:
    """Count one record and what becomes of it; keep its rows for the page while there is room."""
    found.records_checked += 1
    for name, value in (row.record or {}).items():
        if name not in found.examples and value is not None:
            found.examples[name] = _short(value)
    limits = config.model.image
    rows: list[RawRow] = []
    try:
        rows = reader.rows(row)
    except ItemError as error:
        _reject(found, row.name, error)
    for each in rows:
        try:
            check_row(each, max_text_chars=config.prepare.max_text_chars, max_images=limits.max_images_per_item)
            check_tokens(each, config.prepare)
            seen = {
                source: _image(source, images, row.folder)
                for item in (each.query, each.target, *each.negatives)
                for source in item.images
            }
        except ItemError as error:
            _reject(found, each.key, error)
            continue
        found.rows_checked += 1
        found.sizes += [(image.width, image.height) for image in seen.values()]
        if len(found.samples) < _SHOWN_ROWS:
            found.samples.append(SampledRow(each, seen))


def _reject(found: Inspection, key: str, error: ItemError) -> None:
    found.rows_checked += 1
    found.rejected[error.reason] += 1
    found.first_rejected.setdefault(error.reason, (key, error.detail))


def _image(source: str | bytes, reader: ImageReader, near: str) -> SampledImage:
    decoded = decode_image(reader.read(source, near=near), reader.limits)
    thumbnail = encode_image(decoded.image, _THUMBNAIL_PIXELS)[0]
    name = "inline" if isinstance(source, bytes) or is_inline(source) else source
    return SampledImage(name, decoded.width, decoded.height, thumbnail)


def _count(files: SourceFiles) -> RowCount:
    """All records, or as many as were counted in time and the rest by their bytes."""
    deadline = time.monotonic() + _COUNTING_S
    counted: Counter[str] = Counter()
    for part in sources.split(files, None, 1 << 20):
        counted[part.file] += part.rows
        if time.monotonic() > deadline:
            break
    else:
        return RowCount(counted.total(), exact=True)
    sizes = dict(zip(files.names, files.table["size"].to_pylist(), strict=True))
    done = sum(sizes[name] for name in counted)
    return RowCount(round(counted.total() * sum(sizes.values()) / max(1, done)), exact=False)


def _short(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= _CELL else f"{text[:_CELL]} … ({len(text):,} characters)"
