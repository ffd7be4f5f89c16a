"""What the path of a file says about its rows: the sub-dataset that they belong to, and their split."""

from __future__ import annotations

import posixpath
import re

__all__ = ["split_named", "split_of", "subset_of"]

_SPLITS = {
    "train": ("train", "training", "restval"),  # Karpathy's split of COCO trains on restval
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_NO_SUBSET = frozenset(
    {"data", "rows", "default", "original", "diverse", "instruction", "images", "json", "parquet", *_WORDS}
)


def split_of(file: str) -> str:
    """The split that folders or the name of a file say, by the words that Hugging Face looks for; else ``train``.

    The last word counts: ``val/test-00.parquet`` is a test file.
    """
    words = [_WORDS[word] for word in re.split(r"[^a-z]+", file.lower()) if word in _WORDS]
    return words[-1] if words else "train"


def split_named(name: str) -> str:
    """The split that a publisher's word means: ``val`` is ``validation``; other names stay."""
    return _WORDS.get(name.strip().lower(), name)


def subset_of(file: str) -> str | None:
    """The sub-dataset: the nearest folder whose name is not one of a split or of storage (``data``, ``a=1``)."""
    for folder in reversed(posixpath.dirname(file).split("/")):
        plain = [word for word in re.split(r"[^a-z]+", folder.lower()) if word]
        if plain and "=" not in folder and not _NO_SUBSET.issuperset(plain):
            return folder
    return None
