"""Items are numbered once, in the order of the rows; what shares a query or a target counts as right."""

from __future__ import annotations

import numpy as np

from pipelines.mining.mined_items import RowKeys, content_key, item_key, number_items


def side(text: str | None = None, images: list[int] | None = None, instruction: str | None = None) -> dict[str, object]:
    return {"text": text, "images": images, "instruction": instruction, "image_at": None}


def keys(shard: int, *pairs: tuple[int, int], group: int = 0, places: list[int] | None = None) -> RowKeys:
    """Rows whose items are their own contents."""
    array = np.array(pairs, np.int64).reshape(-1, 2)
    at = np.array(places if places is not None else range(len(pairs)), np.int64)
    return RowKeys(shard, at, np.full(len(pairs), group, np.int64), array, array)


def test_items_have_the_numbers_of_their_first_rows() -> None:
    items = number_items([keys(0, (10, 20), (11, 20)), keys(1), keys(2, (20, 30), (10, 31), places=[4, 7], group=5)])
    assert items.number(np.array([10, 20, 11, 30, 31])).tolist() == [0, 1, 2, 3, 4]
    assert items.begins.tolist() == [0, 3, 3, 5]
    assert items.rows.tolist() == [0, 0, 1, 4, 7] and items.is_target.tolist() == [False, True, False, True, True]
    assert items.contents.tolist() == [10, 20, 11, 30, 31]
    assert {group: numbers.tolist() for group, numbers in items.targets.items()} == {0: [1], 5: [3, 4]}


def test_positives_are_shared_over_queries_and_targets() -> None:
    """Word 1 finds drawings 10 and 11; word 2 finds 11; word 3 finds 12; word 4 finds 11 and 13."""
    items = number_items([keys(0, (1, 10), (1, 11), (2, 11), (3, 12), (4, 11), (4, 13))])
    assert items.positives(1, 10).tolist() == [1, 10, 11]
    assert items.positives(2, 11).tolist() == [2, 10, 11, 13], "through words 1 and 4, which find 11 too"
    assert items.positives(3, 12).tolist() == [3, 12]
    assert items.positives(4, 13).tolist() == [4, 11, 13]


def test_positives_are_those_of_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        pairs = [(int(q), int(t) + 100) for q, t in rng.integers(0, 12, (40, 2))]
        items = number_items([keys(0, *pairs[:15]), keys(1, *pairs[15:])])
        for query, target in pairs:
            sharing = {q for q, t in pairs if t == target} | {query}
            expected = {t for q, t in pairs if q in sharing} | {query, target}
            assert items.positives(query, target).tolist() == sorted(expected)


def test_keys_tell_what_is_embedded_and_what_is_said() -> None:
    assert item_key(side("a")) != item_key(side("a", instruction="Find it."))
    assert item_key(side("a")) == item_key(side("a", [])) != item_key(side("A"))
    assert content_key(side("Red  apple\n")) == content_key(side("red apple", instruction="Find it."))
    assert (
        len({content_key(s) for s in (side("red apple"), side("apple"), side("red apple", [1]), side(None, [1]))}) == 4
    )
