"""The split of a record, and the sub-dataset that the path of its file says."""

from __future__ import annotations

import posixpath
import re

from pipelines.formats.cells import parse_text_value
from pipelines.sources.records import RawRecord

__all__ = ["is_split", "split_in", "split_named", "split_of", "split_of_folder", "subset_of"]

_SPLITS = {
    "train": ("train", "training", "restval"),  # Karpathy's split of COCO trains on restval
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_NO_SUBSET = frozenset(
    {"data", "rows", "default", "original", "diverse", "instruction", "images", "json", "parquet", *_WORDS}
)


def split_of(record: RawRecord, file: str, *, folder: str | None = None, within: str = "") -> str:
    """The split of a record: the one rule of all formats.

    The column ``split`` in any case says it; else the path of the file; else the corpus; else the name of the list of a
    JSON document; else it is ``train``.

    Args:
        file: path from the folder of the corpus.
        folder: split of the corpus (``split_of_folder``).
        within: ``SourceRow.within``.

    Raises:
        ItemError: ``bad_row`` where the column holds no text.
    """
    return split_in(record) or _last_word(file) or folder or _last_word(within) or "train"


def split_in(record: RawRecord) -> str | None:
    """The split that the column ``split`` says, if there is one. Raises as ``split_of`` does."""
    values = (parse_text_value(value, name) for name, value in record.items() if is_split(name))
    return next((split_named(value) for value in values if value), None)


def is_split(column: str) -> bool:
    """Whether a column is that of the split."""
    return column.lower() == "split"


def split_of_folder(uri: str) -> str | None:
    """The split that the folder of a corpus says.

    Only its last folder counts, or the one above ``rows``, ``data`` or ``lang=en``, and only if that is all that its
    name says: a corpus in ``/home/test/photos`` or ``test_run`` may be for training.
    """
    for folder in reversed(uri.rstrip("/").split("/")):
        words = _words(folder)
        if not _NO_SUBSET.issuperset(words) and "=" not in folder:
            return None
        if found := _last_word(folder):
            return found
    return None


def split_named(name: str) -> str:
    """The split that a publisher's word means, so that jobs read it: ``Val`` is ``validation``, ``dev2`` is
    ``validation2``; other names stay."""
    word = re.match(r"[a-z]*", name.strip().lower())
    split = _WORDS.get(word[0]) if word else None
    return name if split is None or word is None else split + name.strip()[word.end() :]


def _last_word(path: str) -> str | None:
    """The split that a path says, by the words that Hugging Face looks for; ``val/test-00.parquet`` is a test file."""
    found = [_WORDS[word] for word in _words(path) if word in _WORDS]
    return found[-1] if found else None


def _words(path: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", path.lower()) if word]


def subset_of(file: str) -> str | None:
    """The sub-dataset: the nearest folder whose name is not one of a split or of storage (``data``, ``a=1``)."""
    for folder in reversed(posixpath.dirname(file).split("/")):
        plain = _words(folder)
        if plain and "=" not in folder and not _NO_SUBSET.issuperset(plain):
            return folder
    return None
