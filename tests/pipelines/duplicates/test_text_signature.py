"""Normal forms, typing errors and MinHash."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.duplicates.text_signature import (
    MinHasher,
    MinHashRelation,
    is_typing_error,
    normal_form,
    typing_keys,
)

HASHER = MinHasher(shingle_chars=5, permutations=128, bands=16)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("A red  fox.", "a red fox"),
        ("What colour is it?", "WHAT COLOUR IS IT"),
        ("Ｆｕｌｌ width", "full width"),
        ("Straße", "STRASSE"),
        ("well-known_thing", "well known thing"),
        (None, ""),
    ],
)
def test_one_normal_form(a: str | None, b: str) -> None:
    assert normal_form(a) == normal_form(b)


@pytest.mark.parametrize(("a", "b"), [("3:15", "3:16"), ("!", "?"), ("é", "e"), ("我的红色汽车", "我的蓝色汽车")])
def test_other_normal_forms(a: str, b: str) -> None:
    assert normal_form(a) != normal_form(b)


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ("photograph", "photogrpah", True),
        ("photograph", "photogaph", True),
        ("photograph", "photograpph", True),
        ("photograph", "photogrsph", True),
        ("photograph", "photograph", False),
        ("photograph", "photogaphs", False),
        ("house", "mouse", False),
        ("car", "cap", False),
    ],
)
def test_typing_errors(a: str, b: str, error: bool) -> None:
    assert is_typing_error(a, b) is is_typing_error(b, a) is error


def test_texts_that_differ_in_one_word_share_a_key() -> None:
    good, bad = (
        dict(typing_keys(normal_form(f"A {word} of the harbour at night"))) for word in ("photograph", "photogrpah")
    )
    assert {(good[key], bad[key]) for key in good.keys() & bad.keys()} == {("photograph", "photogrpah")}


@pytest.mark.parametrize("text", ["at 1234567 and 7654321", "我的红色汽车停在那里 很好", "a cat and a hat"])
def test_numbers_short_words_and_scripts_without_case_hold_no_typing_errors(text: str) -> None:
    assert typing_keys(normal_form(text)) == []


def test_minhash_estimates_the_jaccard_similarity() -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    errors = []
    for changes in (0, 3, 10, 30, 100):
        a = rng.choice(letters, 2000)
        b = a.copy()
        b[rng.choice(2000, changes, replace=False)] = "0"
        texts = ["".join(t) for t in (a, b)]
        sets = [{t[i : i + 5] for i in range(len(t) - 4)} for t in texts]
        truth = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        low = np.stack([HASHER.signature(t) & 0xFF for t in texts]).astype(np.uint8)
        at = [t for t in np.arange(0, 1.001, 0.01) if MinHashRelation(t).near(low, np.array([0]), np.array([1]))[0]]
        errors.append(max(at) - truth)
    assert np.abs(errors).max() < 0.12, "four standard deviations"


def test_near_long_texts_share_a_band() -> None:
    text = " ".join(f"word{i} of the story" for i in range(100))
    other = text.replace("word7 ", "other ")
    keys = [set(HASHER.keys(HASHER.signature(t))) for t in (text, other, text[::-1])]
    assert len(keys[0]) == 16 and keys[0] & keys[1] and not keys[0] & keys[2]
