"""Columns that a format does not know: how near they are to one that it knows, and how many rows have them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["MAX_NAMES", "UnknownColumns", "nearest_name"]

MAX_NAMES = 200
"""Names that are counted one by one; a corpus whose keys are data would otherwise fill the memory of the driver."""
_NEAR = 0.85
"""Similarity (difflib's ratio) at which a name counts as misspelt: above ``image_id``/``image``, below
``query_image``/``query_images``."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name of which ``name`` is another spelling: another case, ``-`` for ``_``, or a letter or two.

    Exactly the same name does not count. Of ``json.caption`` only what stands behind the dot may differ.
    """
    start, dot, _ = name.rpartition(".")
    names = [k for k in known if k != name and k.rpartition(".")[0] == start]
    if dot:
        inner = nearest_name(name.removeprefix(start + dot), [k.removeprefix(start + dot) for k in names])
        return inner and start + dot + inner
    plain = _plain(name)
    for alike in (_plain, _letters):
        same = next((k for k in names if alike(k) == alike(name)), None)
        if same is not None:
            return same
    by_plain = {_plain(k): k for k in names}
    near = difflib.get_close_matches(plain, by_plain, n=1, cutoff=_NEAR)
    return by_plain[near[0]] if near else None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _letters(name: str) -> list[str]:
    """Equal for two names with letters in another order."""
    return sorted(_plain(name))


@dataclass
class UnknownColumns:
    """Counts rows by unknown column. A task keeps one, and the driver adds them up."""

    counts: Counter[str] = field(default_factory=Counter)
    """Rows that have a column."""
    others: int = 0
    """Further names, beyond the first ``MAX_NAMES``, as often as they came."""

    def add(self, names: Iterable[str]) -> None:
        """Count one row."""
        for name in names:
            self._count(name, 1)

    def merge(self, other: UnknownColumns) -> None:
        """Count the rows of another one too."""
        for name, rows in sorted(other.counts.items()):
            self._count(name, rows)
        self.others += other.others

    def _count(self, name: str, rows: int) -> None:
        if name in self.counts or len(self.counts) < MAX_NAMES:
            self.counts[name] += rows
        else:
            self.others += rows
