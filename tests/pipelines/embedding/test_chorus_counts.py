"""Every job can choose K' of a nested model, and refuses one that it was not trained with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import crem
from crem.checkpoint import save_model
from crem.cli import main
from crem.config import load_config
from crem.errors import ConfigError
from crem.model.build import build_model
from pipelines.corpus.prepare import prepare
from pipelines.embedding.embed import embed
from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.evaluation_result import EvaluationResult
from pipelines.search.index import build
from pipelines.search.search import Query, search
from tests.conftest import TEXTS, TINY, lively, tiny_config
from tests.pipelines.conftest import table, write_rows
from tests.pipelines.shapes import write_corpus

SMALL = [*TINY, "evaluate.max_new_tokens=2", "embed.max_actors=1"]


@pytest.fixture(scope="module")
def nested_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, collator = build_model(tiny_config("model.nested_chorus=[2,4]"), texts=TEXTS)
    lively(model)
    folder = tmp_path_factory.mktemp("nested") / "model"
    save_model(model, collator, folder)
    return str(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_vectors_and_index_of_a_smaller_count(nested_dir: str, tmp_path: Path, local_ray: None) -> None:
    texts = TEXTS[:4]
    write_rows(tmp_path / "items.jsonl", [{"text": text} for text in texts])
    two, config = crem.load(nested_dir, chorus_tokens=2), load_config("micro", [*SMALL, "embed.chorus_tokens=2"])
    made = embed(nested_dir, str(tmp_path / "items.jsonl"), str(tmp_path / "vectors"), config)
    assert made.fingerprint == two.fingerprint != crem.load(nested_dir).fingerprint
    vectors = np.array([row["embedding"] for row in table(tmp_path / "vectors")])
    np.testing.assert_allclose(vectors, two.embed(texts), atol=1e-5)

    build(str(tmp_path / "vectors"), str(tmp_path / "index"), config)
    hit = search(str(tmp_path / "index"), nested_dir, Query(texts[2], k=1))[0]  # the index knows its count
    assert hit.text == texts[2] and hit.score > 0.9999
    wrong = load_config("micro", ["embed.chorus_tokens=3"])
    with pytest.raises(ConfigError, match="works with 2, 4 chorus tokens, not with 3"):
        embed(nested_dir, str(tmp_path / "items.jsonl"), str(tmp_path / "x"), wrong)
    assert not (tmp_path / "x").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_evaluation_at_a_smaller_count(nested_dir: str, tmp_path: Path, local_ray: None) -> None:
    config = load_config("micro", [*SMALL, "evaluate.chorus_tokens=2"])
    prepare(write_corpus(tmp_path / "corpus"), str(tmp_path / "prepared"), config)
    made = evaluate(nested_dir, str(tmp_path / "prepared"), str(tmp_path / "out"), config)
    assert (made.chorus_tokens, made.fingerprint) == (2, crem.load(nested_dir, chorus_tokens=2).fingerprint)
    splits = [made.retrieval[task]["all"].precision_at_1 for task in ("i2t", "t2i")]
    assert made.retrieval_mean["all"].precision_at_1 == pytest.approx(np.mean(splits))
    assert made.retrieval_mean["all"].directions == 2
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert EvaluationResult.from_json(written) == made
    wrong = load_config("micro", [*SMALL, "evaluate.chorus_tokens=3"])
    with pytest.raises(ConfigError, match="not with 3"):
        evaluate(nested_dir, str(tmp_path / "prepared"), str(tmp_path / "out"), wrong)


def test_the_server_refuses_a_count_before_it_starts(nested_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    if ray.is_initialized():
        pytest.skip("the check is of a server that starts its own Ray")
    assert main(["serve", nested_dir, "serve.port=0", "serve.chorus_tokens=3"]) == 2
    assert "not with 3" in capsys.readouterr().err
