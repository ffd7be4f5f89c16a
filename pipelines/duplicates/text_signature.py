"""What two texts are compared by: their normal form, and then typing errors (short texts) or MinHash (long ones).

The normal form ignores case, punctuation, spacing and compatibility forms (NFKC). Texts of one normal form are equal.

Short texts. "What colour is the car?" and "What colour is the cap?" share most of their shingles and are two
questions, as are most short texts of high Jaccard similarity. Two short texts are therefore near only if they differ
in one word, and there in one letter of a word long enough that this is a typing error rather than another word.
Numbers never match. Candidates share a key of the text without that word, so the search misses none of them.

Long texts are near if the Jaccard similarity of their character shingles reaches a threshold (Broder 1997; Lee et al.
2022, "Deduplicating training data makes language models better"), estimated from MinHash signatures of ``rensa``, of
which a byte each is kept (b-bit minwise hashing, Li and König 2010).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.duplicates.libraries import library
from pipelines.tables.schema import content_id

__all__ = [
    "MinHashRelation",
    "MinHasher",
    "TypingErrorRelation",
    "is_typing_error",
    "normal_form",
    "text_id",
    "typing_keys",
]

_SEPARATORS = re.compile(r"[\W_]+")
_TYPING_ERROR_LETTERS = 6
"""Shorter words that differ in a letter are as often two words: ``house`` and ``mouse``."""


def normal_form(text: str | None) -> str:
    """The text without case, punctuation, symbols of spacing and compatibility forms; itself where nothing is left."""
    folded = unicodedata.normalize("NFKC", text or "").casefold()
    return _SEPARATORS.sub(" ", folded).strip() or folded.strip()


def text_id(normal: str) -> int:
    """Identifies a normal form."""
    return content_id(normal.encode(errors="surrogatepass"))


def typing_keys(normal: str) -> list[tuple[int, str]]:
    """For each word that may hold a typing error: an id of the text without it, and the word.

    Only words of cased scripts count: in the others a letter is a syllable or a word.
    """
    words = normal.split(" ")
    keys = []
    for place, word in enumerate(words):
        if len(word) >= _TYPING_ERROR_LETTERS - 1 and word.isalpha() and word.upper() != word:
            rest = " ".join([*words[:place], f"\0{word[0]}", *words[place + 1 :]])
            keys.append((text_id(rest), word))
    return keys


def is_typing_error(a: str, b: str) -> bool:
    """Whether two words differ by one letter left out, added, replaced or swapped with the next."""
    if a == b or abs(len(a) - len(b)) > 1 or max(len(a), len(b)) < _TYPING_ERROR_LETTERS:
        return False
    if len(a) > len(b):
        a, b = b, a
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
    if len(a) < len(b):
        return a[at:] == b[at + 1 :]
    swapped = a[at : at + 2] == b[at : at + 2][::-1] and a[at + 2 :] == b[at + 2 :]
    return swapped or a[at + 1 :] == b[at + 1 :]


@dataclass(frozen=True)
class MinHasher:
    """MinHash signatures of texts."""

    shingle_chars: int
    permutations: int
    bands: int

    def signature(self, normal: str) -> NDArray[np.uint32]:
        """[permutations] of a normal form."""
        rensa = library("rensa", "prepare.near_duplicates")
        size = self.shingle_chars
        shingles = {normal[i : i + size] for i in range(max(1, len(normal) - size + 1))}
        sketch = rensa.RMinHash(num_perm=self.permutations, seed=_SEED)
        sketch.update(list(shingles))
        return np.array(sketch.digest(), np.uint32)

    def keys(self, signature: NDArray[np.uint32]) -> list[int]:
        """One key a band; texts that share a key are compared."""
        rows = self.permutations // self.bands
        return [
            content_id(band.to_bytes(4, "big") + signature[band * rows : (band + 1) * rows].tobytes())
            for band in range(self.bands)
        ]


_SEED = 1


@dataclass(frozen=True)
class MinHashRelation:
    """Whether two signatures, of the lowest byte of each minimum, are those of near-identical texts."""

    jaccard: float

    def near(self, signatures: NDArray[np.uint8], i: NDArray[np.intp], j: NDArray[np.intp]) -> NDArray[np.bool_]:
        """[P] whether ``signatures[i]`` and ``signatures[j]`` are near, for places i [P] and j [P]."""
        chance = 1 / 256  # two bytes that are equal by chance
        equal = (signatures[i] == signatures[j]).mean(axis=1)
        near: NDArray[np.bool_] = (equal - chance) / (1 - chance) >= self.jaccard
        return near

    def finer_keys(self, signatures: NDArray[np.uint8]) -> NDArray[np.int64]:
        """None: the other bands are as fine as this one."""
        return np.empty((0, len(signatures)), np.int64)


class TypingErrorRelation:
    """Whether two words, each in the place of the other in texts that are equal otherwise, differ by a typing error."""

    def near(self, signatures: NDArray[np.object_], i: NDArray[np.intp], j: NDArray[np.intp]) -> NDArray[np.bool_]:
        """[P] for words ``signatures[i]`` and ``signatures[j]``, for places i [P] and j [P]."""
        pairs = zip(signatures[i], signatures[j], strict=True)
        return np.fromiter((is_typing_error(a, b) for a, b in pairs), np.bool_, len(i))

    def finer_keys(self, signatures: NDArray[np.object_]) -> NDArray[np.int64]:
        """[2, N]: one letter is wrong, so three letters at the start or at the end are right."""
        ends = ([word[:3] for word in signatures], [f"{word[-3:]}\0" for word in signatures])
        return np.array([[text_id(end) for end in side] for side in ends], np.int64)
