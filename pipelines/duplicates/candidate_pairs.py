"""Near pairs among items that share a key, in bounded work however many share it.

Up to ``ALL_PAIRS`` items of one key are compared each with each. More of them (a million copies of one picture, blank
images) are compared with leaders: the first item leads, those near it are paired with it and leave, and so on with the
first that is left, ``LEADERS`` times. A cluster then is a star instead of all its pairs. Those that are left get finer
keys, if their relation has some; more than ``ALL_PAIRS`` of one finer key are not compared, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALL_PAIRS", "LEADERS", "NearPairs", "Relation", "find_pairs", "thin_out"]

ALL_PAIRS = 512
LEADERS = 16
_COMPARED_AT_ONCE = 2**20
Places = NDArray[np.intp]


class Relation(Protocol):
    """Whether two items are near-identical."""

    def near(self, signatures: NDArray[Any], i: Places, j: Places) -> NDArray[np.bool_]:
        """[P] for places i [P] and j [P] in ``signatures``."""

    def finer_keys(self, signatures: NDArray[Any]) -> NDArray[np.int64]:
        """[tables, N] under which near items meet that share a key with many others; no tables where there are none."""


@dataclass(frozen=True)
class NearPairs:
    """Places of near items, and how many items were not compared with all others of their key."""

    first: Places
    second: Places
    unchecked: int


def find_pairs(keys: NDArray[np.int64], signatures: NDArray[Any], relation: Relation) -> NearPairs:
    """All near pairs of items of equal key; ``keys`` is sorted."""
    starts, sizes = _groups(keys)
    found = [_empty()]
    for size in np.unique(sizes[(sizes > 1) & (sizes <= ALL_PAIRS)]):
        found += _small(starts[sizes == size], int(size), signatures, relation)
    unchecked = 0
    for start, size in zip(starts[sizes > ALL_PAIRS], sizes[sizes > ALL_PAIRS], strict=True):
        pairs, rest = _stars(np.arange(start, start + size), signatures, relation)
        found += pairs
        if 1 < len(rest) <= ALL_PAIRS:
            found.append(_compare(rest, signatures, relation))
        elif len(rest) > 1:
            finer, left = _finer(rest, signatures, relation)
            found += finer
            unchecked += left
    first, second = (np.concatenate(side) for side in zip(*found, strict=True))
    return NearPairs(first, second, unchecked)


def thin_out(
    keys: NDArray[np.int64], signatures: NDArray[Any], relation: Relation
) -> tuple[NDArray[np.bool_], NearPairs]:
    """Before a shuffle: which items to send, and pairs of those that stay behind with the leader that is sent."""
    starts, sizes = _groups(keys)
    send = np.ones(len(keys), np.bool_)
    found = [_empty()]
    for start, size in zip(starts[sizes > ALL_PAIRS], sizes[sizes > ALL_PAIRS], strict=True):
        pairs, _ = _stars(np.arange(start, start + size), signatures, relation)
        found += pairs
        send[np.concatenate([second for _, second in [_empty(), *pairs]])] = False
    first, second = (np.concatenate(side) for side in zip(*found, strict=True))
    return send, NearPairs(first, second, 0)


def _groups(keys: NDArray[np.int64]) -> tuple[Places, Places]:
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, np.intp)
    return starts, np.diff(np.r_[starts, len(keys)])


def _small(starts: Places, size: int, signatures: NDArray[Any], relation: Relation) -> Iterator[tuple[Places, Places]]:
    """Each with each, for all groups of one size together."""
    i, j = np.triu_indices(size, 1)
    step = max(1, _COMPARED_AT_ONCE // len(i))
    for at in range(0, len(starts), step):
        some = starts[at : at + step, None]
        first, second = (some + i).ravel(), (some + j).ravel()
        near = relation.near(signatures, first, second)
        yield first[near], second[near]


def _stars(members: Places, signatures: NDArray[Any], relation: Relation) -> tuple[list[tuple[Places, Places]], Places]:
    """Pairs (leader, follower), and the members that no leader was near to when leading ended."""
    pairs = []
    for _ in range(LEADERS):
        if len(members) <= ALL_PAIRS:
            break
        leader, others = members[:1], members[1:]
        near = relation.near(signatures, np.broadcast_to(leader, len(others)), others)
        followers = others[near]
        if len(followers):
            pairs.append((np.broadcast_to(leader, len(followers)), followers))
        # a leader without followers is near to nobody here, and leaves as well
        members = others[~near]
    return pairs, members


def _finer(members: Places, signatures: NDArray[Any], relation: Relation) -> tuple[list[tuple[Places, Places]], int]:
    """Pairs of members that share a finer key, and how many members were not compared under some key."""
    some = signatures[members]
    tables = relation.finer_keys(some)
    found = []
    unchecked = np.full(len(members), len(tables) == 0)
    for keys in tables:
        order = np.argsort(keys, kind="stable")
        starts, sizes = _groups(keys[order])
        for size in np.unique(sizes[(sizes > 1) & (sizes <= ALL_PAIRS)]):
            for first, second in _small(starts[sizes == size], int(size), some[order], relation):
                found.append((members[order[first]], members[order[second]]))
        for start, size in zip(starts[sizes > ALL_PAIRS], sizes[sizes > ALL_PAIRS], strict=True):
            unchecked[order[start : start + size]] = True
    return found, int(unchecked.sum())


def _compare(members: Places, signatures: NDArray[Any], relation: Relation) -> tuple[Places, Places]:
    i, j = np.triu_indices(len(members), 1)
    near = relation.near(signatures, members[i], members[j])
    return members[i[near]], members[j[near]]


def _empty() -> tuple[Places, Places]:
    return np.empty(0, np.intp), np.empty(0, np.intp)
