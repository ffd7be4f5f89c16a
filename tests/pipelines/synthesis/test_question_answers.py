"""Answers of models: what is valid is found wherever it stands, and what is not is named."""

from __future__ import annotations

import json

import pytest

from crem.errors import ItemError
from pipelines.synthesis.question_answers import answer_schema, parse_answer

KINDS = ("describe", "count")
PAIR = {"kind": "count", "question": "How many apples lie there?", "answer": "3"}


def wrapped(*pairs: dict[str, object]) -> str:
    return json.dumps({"pairs": pairs})


@pytest.mark.parametrize(
    "text",
    [
        wrapped(PAIR),
        f"```json\n{wrapped(PAIR)}\n```",
        f"Here it is, in the form {{question}}: {wrapped(PAIR)} I hope this helps {{:-)}}",
        f'{{"thoughts": "none"}}\n{wrapped(PAIR)}',
        "\ufeff\n" + json.dumps({"pairs": [PAIR]}, indent=4),
        wrapped(PAIR | {"kind": " Count ", "question": "\n How many apples lie there? "}),
        wrapped(PAIR, PAIR | {"question": "one more than was asked for"}),
    ],
)
def test_valid_pairs_are_found(text: str) -> None:
    (pair,) = parse_answer(text, KINDS, 1)
    assert pair.model_dump() == PAIR


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid_json"),
        ("I cannot see an image.", "invalid_json"),
        ('{"pairs": [{"kind": "count", "question": "How ma', "invalid_json"),
        ('["pairs"]', "invalid_json"),
        ("{" * 5_000, "invalid_json"),
        ('{"a":' * 5_000, "invalid_json"),
        ("{}", "wrong_schema"),
        (wrapped(), "wrong_schema"),
        ('{"pairs": {"kind": "count"}}', "wrong_schema"),
        (wrapped({"question": "q", "answer": "a"}), "wrong_schema"),
        (wrapped(PAIR | {"answer": 3}), "wrong_schema"),
        (wrapped(PAIR | {"confidence": "high"}), "wrong_schema"),
        (wrapped(PAIR | {"kind": "guess"}), "bad_pair"),
        (wrapped(PAIR | {"answer": "  "}), "bad_pair"),
        (wrapped(PAIR | {"question": "..."}), "bad_pair"),
        (wrapped(PAIR | {"question": "q" * 1_001}), "bad_pair"),
        (wrapped(PAIR | {"answer": "a" * 8_001}), "bad_pair"),
        ('{"pairs": [{"kind": "count", "question": "\\ud800?", "answer": "a"}]}', "bad_pair"),
    ],
)
def test_what_is_not_valid_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ItemError) as caught:
        parse_answer(text, KINDS, 1)
    assert caught.value.reason == reason and len(caught.value.detail) < 400


def test_several_pairs_are_different_questions() -> None:
    second = PAIR | {"kind": "describe", "question": "What is there?"}
    assert [p.question for p in parse_answer(wrapped(PAIR, PAIR, second), KINDS, 2)] == [
        "How many apples lie there?",
        "What is there?",
    ]
    with pytest.raises(ItemError, match="1 different questions, 2 were asked for"):
        parse_answer(wrapped(PAIR, PAIR | {"question": "how many apples lie there? "}), KINDS, 2)
    with pytest.raises(ItemError, match="1 pairs, 2 were asked for"):
        parse_answer(wrapped(PAIR), KINDS, 2)


def test_the_schema_accepts_what_the_parser_accepts() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = answer_schema(KINDS)
    jsonschema.validate({"pairs": [PAIR]}, schema)
    for wrong in ({"pairs": [PAIR | {"kind": "guess"}]}, {"pairs": [PAIR | {"more": 1}]}, {}, {"pairs": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
