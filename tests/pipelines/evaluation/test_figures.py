"""The figures of an evaluation against hand-counted ones, and its file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from crem.errors import ConfigError
from pipelines.evaluation.answers import GivenAnswers, answer_examples, answer_figures, cache_figures, chosen_questions
from pipelines.evaluation.evaluation_result import EvaluationResult, Examples
from pipelines.evaluation.evaluation_text import evaluation_table
from pipelines.evaluation.retrieval import mean_precision, precision, retrieval_examples, retrieval_set, target_ranks
from pipelines.tables import schema
from pipelines.tables.prepared import PreparedRows


def side(text: str | None) -> dict[str, Any] | None:
    return None if text is None else {"text": text, "images": [], "instruction": None, "image_at": []}


def rows_of(*rows: dict[str, Any]) -> PreparedRows:
    """Rows of the prepared schema without images."""
    filled = [
        dict.fromkeys(schema.ROWS.names)
        | {"id": i, "source": "s", "task": "text_to_image", "split": "test_a", **row}
        | {"query": side(row["query"]), "target": side(row.get("target"))}
        for i, row in enumerate(rows)
    ]
    return PreparedRows(pa.Table.from_pylist(filled, schema.ROWS), {})


PAIRS = rows_of(
    {"query": "a", "target": "x"},
    {"query": "b", "target": "y"},
    {"query": "c", "target": "x", "split": "test_b"},
    {"query": "a", "target": "z", "task": "other"},
    {"query": "d", "question": "?", "answer": "z"},
)
ANSWERED = rows_of(
    *({"query": "q", "question": "?", "answer": answer} for answer in ("Cat", "Cat", "Dog")),
    {"query": "q", "question": "?", "answer": "Dog", "split": "test_b"},
    {"query": "q", "question": "?", "answer": None},
)
GIVEN = [
    GivenAnswers("cat ", 100, "dog", 25),
    GivenAnswers("CAT", 100, "Cat", 25),
    GivenAnswers("bird", 100, "DOG", 25),
    GivenAnswers("dog", 300, "", 75),
]


def test_contents_are_embedded_once_and_candidates_are_the_targets_of_all_splits() -> None:
    found = retrieval_set(PAIRS)
    assert [(c.row, c.side) for c in found.contents] == [
        *((0, "query"), (0, "target"), (1, "query"), (1, "target"), (2, "query"), (3, "target"))
    ]
    other, main = found.directions
    assert (other.task, main.task) == ("other", "text_to_image") and main.splits == ("test_a", "test_a", "test_b")
    assert main.queries.tolist() == [0, 2, 4] and main.targets.tolist() == [1, 3, 1]
    assert main.candidates.tolist() == [1, 3] and other.candidates.tolist() == [5]


def test_a_tie_and_nan_count_against_the_model() -> None:
    direction = retrieval_set(PAIRS).directions[1]
    embeddings = np.zeros((6, 2), dtype=np.float32)
    embeddings[[1, 3]] = [[1, 0], [0, 1]]  # x and y
    embeddings[[0, 2, 4]] = [[2, 1], [1, 1], [np.nan, 0]]  # a finds x; b scores both alike; c is not a number
    ranks = target_ranks(direction, embeddings)
    assert ranks.tolist() == [0, 1, 1]
    figures = precision(direction, ranks)
    assert (figures["test_a"].precision_at_1, figures["test_a"].queries, figures["test_a"].candidates) == (0.5, 2, 2)
    assert (figures["all"].precision_at_1, figures["all"].precision_at_10) == (pytest.approx(1 / 3), 1)
    assert (figures["all"].chance_at_1, figures["all"].chance_at_10) == (0.5, 1)
    means = mean_precision({"text_to_image": figures, "other": precision(direction, np.zeros(3, np.int64))})
    assert means["all"].precision_at_1 == pytest.approx((1 / 3 + 1) / 2) and means["all"].directions == 2


def test_questions_are_an_even_spread_of_each_split() -> None:
    assert chosen_questions(ANSWERED, 10) == [0, 1, 2, 3]  # the row without an answer is none
    assert chosen_questions(ANSWERED, 2) == [0, 1, 3]


def test_answers_match_without_case_and_space() -> None:
    figures = answer_figures(ANSWERED, [0, 1, 2, 3], GIVEN)
    assert (figures["test_a"].native, figures["test_a"].compressed) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert (figures["all"].native, figures["all"].compressed, figures["all"].questions) == (0.75, 0.5, 4)
    assert (figures["test_a"].commonest_answer, figures["test_a"].commonest) == ("Cat", pytest.approx(2 / 3))
    plain = answer_figures(ANSWERED, [0], [GivenAnswers("cat", 100)])
    assert plain["all"].native == 1 and plain["all"].compressed is None
    assert answer_figures(ANSWERED, [], []) == {}


def test_bytes_kept_are_the_mean_of_the_items() -> None:
    cache = cache_figures(GIVEN)
    assert cache is not None and (cache.native_bytes, cache.compressed_bytes, cache.ratio) == (150, 37.5, 0.25)
    plain = cache_figures([GivenAnswers("cat", 100)])
    assert plain is not None and plain.ratio is None and cache_figures([]) is None


def evaluated(*, questions: bool) -> EvaluationResult:
    found = retrieval_set(PAIRS)
    embeddings = np.eye(6, dtype=np.float32)
    ranks = {d.task: target_ranks(d, embeddings) for d in found.directions}
    retrieval = {d.task: precision(d, ranks[d.task]) for d in found.directions}
    asked, given = ([0, 1, 2, 3], GIVEN) if questions else ([], [])
    examples = Examples(
        [e for d in found.directions for e in retrieval_examples(PAIRS, found.contents, d, embeddings, ranks[d.task])],
        answer_examples(ANSWERED, asked, given),
    )
    return EvaluationResult(
        model="m",
        chorus_tokens=4,
        fingerprint="0123",
        retrieval=retrieval,
        retrieval_mean=mean_precision(retrieval),
        answers=answer_figures(ANSWERED, asked, given),
        cache=cache_figures(given),
        examples=examples,
    )


@pytest.mark.parametrize("questions", [True, False])
def test_the_file_gives_the_result_again(questions: bool) -> None:
    result = evaluated(questions=questions)
    tree = json.loads(json.dumps(result.to_json()))
    assert EvaluationResult.from_json(tree) == result
    assert list(tree) == [
        *("format", "model", "chorus_tokens", "fingerprint", "retrieval", "retrieval_mean", "answers", "cache"),
        "examples",
    ]
    assert (tree["cache"] == {}) is not questions
    del tree["format"], tree["model"], tree["examples"]  # as `crem ablate` has always written them
    older = EvaluationResult.from_json(tree)
    assert older.retrieval == result.retrieval and older.model is None and older.examples is None


@pytest.mark.parametrize(
    "damage", [{"format": 2}, {"retrieval": {"text_to_image": {"all": {"queries": "many"}}}}, None]
)
def test_another_format_and_damage_are_refused(damage: dict[str, Any] | None) -> None:
    tree = None if damage is None else evaluated(questions=True).to_json() | damage
    with pytest.raises(ConfigError, match="run crem evaluate again"):
        EvaluationResult.from_json(tree)


def test_the_table_has_every_figure_that_is_there() -> None:
    text = evaluation_table(evaluated(questions=True))
    assert "text_to_image     test_a" in text and "mean of tasks     all" in text
    assert "all                    75.0%       50.0%      50.0%          4" in text
    assert text.endswith("keys and values kept per item: 0.1 KiB natively, 0.0 KiB compressed (25.0%)")
    assert "answers" not in evaluation_table(evaluated(questions=False))
