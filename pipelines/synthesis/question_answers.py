"""What a model must answer with: question-and-answer pairs as JSON. Parsed, checked, or refused with a reason.

Endpoints that can are given the JSON schema; the others are asked for JSON in words, and models wrap it in Markdown
fences or sentences. So the first JSON object that has ``pairs`` is taken, wherever it stands, and checked either way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from crem.errors import ItemError

__all__ = ["QuestionAnswer", "answer_schema", "parse_answer"]

_MAX_QUESTION_CHARS = 1_000
_MAX_ANSWER_CHARS = 8_000
_PLACEHOLDERS = {"...", "…", "string", "n/a", "none", "null"}
"""What a model writes that copies the form instead of filling it in."""


class QuestionAnswer(BaseModel):
    """One generation turn about a query."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    question: str
    answer: str


class _Pairs(BaseModel):
    model_config = ConfigDict(extra="forbid")

    pairs: list[QuestionAnswer]


def answer_schema(kinds: Sequence[str]) -> dict[str, Any]:
    """JSON schema of an answer, in the strict form of OpenAI's structured outputs."""
    pair = {
        "type": "object",
        "properties": {
            "kind": {"type": "string", "enum": list(kinds)},
            "question": {"type": "string"},
            "answer": {"type": "string"},
        },
        "required": ["kind", "question", "answer"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"pairs": {"type": "array", "items": pair}},
        "required": ["pairs"],
        "additionalProperties": False,
    }


def parse_answer(text: str, kinds: Sequence[str], wanted: int) -> tuple[QuestionAnswer, ...]:
    """The first ``wanted`` pairs of an answer.

    Raises:
        ItemError: ``invalid_json``, ``wrong_schema`` or ``bad_pair``.
    """
    found = None
    for value in _objects(text):
        found = value
        if "pairs" in value:
            break
    if found is None:
        raise ItemError("invalid_json", f"the answer holds no JSON object: {_start(text)}")
    try:
        pairs = _Pairs.model_validate(found).pairs
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the answer"
        raise ItemError("wrong_schema", f"{place}: {first['msg']}: {_start(text)}") from None
    if len(pairs) < wanted:
        raise ItemError("wrong_schema", f"{len(pairs)} pairs, {wanted} were asked for: {_start(text)}")
    return tuple(_checked(pair, kinds) for pair in _distinct(pairs, wanted))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object that begins at a brace of ``text`` and is not inside an earlier one."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
        at = text.find("{", end)


def _distinct(pairs: list[QuestionAnswer], wanted: int) -> list[QuestionAnswer]:
    distinct = list({pair.question.strip().lower(): pair for pair in reversed(pairs)}.values())[::-1]
    if len(distinct) < wanted:
        raise ItemError("bad_pair", f"{len(distinct)} different questions, {wanted} were asked for")
    return distinct[:wanted]


def _checked(pair: QuestionAnswer, kinds: Sequence[str]) -> QuestionAnswer:
    question, answer, kind = pair.question.strip(), pair.answer.strip(), pair.kind.strip().lower()
    if kind not in kinds:
        raise ItemError("bad_pair", f"kind {kind[:40]!r} is none of {', '.join(kinds)}")
    for name, value, limit in (("question", question, _MAX_QUESTION_CHARS), ("answer", answer, _MAX_ANSWER_CHARS)):
        if not value or value.lower() in _PLACEHOLDERS:
            raise ItemError("bad_pair", f"the {name} is {value!r}")
        if len(value) > limit:
            raise ItemError("bad_pair", f"the {name} has {len(value)} characters; the limit is {limit}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ItemError("bad_pair", f"the {name} is not valid Unicode") from None
    return QuestionAnswer(kind=kind, question=question, answer=answer)


def _start(text: str) -> str:
    return repr(text[:120])
