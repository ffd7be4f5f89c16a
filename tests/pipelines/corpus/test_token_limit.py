"""The limit of texts in tokens: counted as the model counts, and only where a tokenizer is named."""

from __future__ import annotations

from pathlib import Path

import pytest

import crem
from crem.config import PrepareConfig, load_config
from crem.errors import ConfigError, ItemError
from pipelines.corpus.prepare import prepare
from pipelines.corpus.token_limit import check_tokens, open_tokenizer
from pipelines.formats.raw_rows import parse_row
from tests.pipelines.conftest import write_rows

TEXTS = ["a red apple", "q z x j " * 50, "<|image_pad|> is text", "caf\u00e9 \u6f22\u5b57 \U0001f34e"]


def limited(limit: int) -> PrepareConfig:
    return load_config("micro", ["prepare.tokenizer=crem-micro", f"prepare.max_text_tokens={limit}"]).prepare


def test_tokens_are_those_of_the_models_prompt() -> None:
    prompts = crem.load("crem-micro").collator.prompts
    for text in TEXTS:
        assert len(open_tokenizer("crem-micro").encode(text).ids) == prompts.prefix(text, "", []).longest_text


@pytest.mark.parametrize("column", ["query_text", "target_instruction", "question", "answer", "negative"])
def test_a_row_with_a_longer_text_is_refused(column: str) -> None:
    record = {"query_text": "q", "target_text": "t", "question": "w", "answer": "a", "negatives": [{"text": "n"}]}
    long = {"negatives": [{"text": TEXTS[1]}]} if column == "negative" else {column: TEXTS[1]}
    row = parse_row(record | long, key="k", source="s")
    count = len(open_tokenizer("crem-micro").encode(TEXTS[1]).ids)
    check_tokens(row, limited(count))
    check_tokens(row, load_config("micro").prepare)
    with pytest.raises(
        ItemError, match=rf"{column}\w* has {count} tokens of crem-micro; the limit is {count - 1}"
    ) as e:
        check_tokens(row, limited(count - 1))
    assert e.value.reason == "text_too_long"


def test_a_limit_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_text_tokens=9 needs prepare\.tokenizer"):
        load_config("micro", ["prepare.max_text_tokens=9"])
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        open_tokenizer(str(tmp_path))


@pytest.mark.ray
def test_prepare_rejects_what_is_over_the_limit(tmp_path: Path, local_ray: None) -> None:
    corpus, long = tmp_path / "corpus", "q z x j " * 50
    write_rows(corpus / "r.jsonl", [{"query_text": t, "target_text": "t"} for t in ("short", long, "a red apple")])
    settings = ["prepare.tokenizer=crem-micro", "prepare.max_text_tokens=64"]
    manifest = prepare(str(corpus), str(tmp_path / "out"), load_config("micro", settings))
    assert (manifest.rows_out, manifest.by_reason) == (2, {"text_too_long": 1})
