"""The ablation: which runs there are, the trends in their figures, and all of it once on a tiny real model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from markupsafe import escape

import crem
from crem.config import AblateConfig, load_config
from crem.errors import ConfigError
from pipelines.ablation.ablate import ablate
from pipelines.ablation.ablation_page import ablation_page
from pipelines.ablation.ablation_result import AblationResult
from pipelines.ablation.ablation_text import ablation_table, verdict
from pipelines.ablation.trends import NO_SEED, Claim, Estimate, claims, estimate, judge
from pipelines.ablation.variants import BACKBONE, PAPER, variants
from pipelines.corpus.prepare import prepare
from pipelines.tables.prepared import PreparedRows
from tests.conftest import TINY
from tests.pipelines.shapes import write_corpus

RUN = [
    *TINY,
    "train.global_batch=8",
    "train.workers=1",
    "train.steps=2",
    "train.zero_stage=1",
    "train.cpus_per_worker=0.5",
    "optim.warmup_steps=1",
    "data.augment=0",
    "evaluate.max_new_tokens=2",
    "ablate.chorus_tokens=2",
    "ablate.map_images=3",
    "ablate.chorus_counts=[1,2]",
]


def test_the_variants_are_those_of_the_paper() -> None:
    made = variants(AblateConfig())
    assert [v.name for v in made if "table3" in v.tables] == [
        "retrieval-only-eos",
        "generation-only-eos",
        "both-eos",
        "crem-16",
    ]
    assert {v.name for v in made if "table4" in v.tables} == {
        *("retrieval-only-eos", "crem-1", "crem-4", "crem-8", "crem-16", "crem-32", "nested-32")
    }
    assert {v.name for v in variants(AblateConfig(), "figure4")} == {
        *("crem-16", "retrieval-only-16", "generation-only-16")
    }
    base = load_config("micro")
    by_name = {v.name: v.config(base, seed=3) for v in made}
    assert all(c.train.seed == 3 and c.optim == base.optim and c.data == base.data for c in by_name.values())
    described = {
        name: (c.model.chorus_tokens, c.loss.alpha_r, c.loss.alpha_g, c.loss.compression_probability)
        for name, c in by_name.items()
    }
    assert described["retrieval-only-eos"] == (0, 1, 0, 0)
    assert described["generation-only-eos"] == (0, 0, base.loss.alpha_g, 0)
    assert described["both-eos"] == (0, 1, base.loss.alpha_g, 0)
    assert described["crem-8"] == (8, 1, base.loss.alpha_g, 0.5)
    assert described["generation-only-16"] == (16, 0, base.loss.alpha_g, 0.5)
    assert by_name["nested-32"].model.chorus_counts == (1, 4, 8, 16, 32)


def test_an_estimate_is_the_mean_and_its_standard_error() -> None:
    two = estimate([1.0, 3.0])
    assert (two.mean, two.se, two.n) == (2.0, pytest.approx(1.0), 2)  # deviation sqrt(2), over sqrt(2)
    assert estimate([5.0]).se is None


def test_every_claim_is_true_of_the_papers_own_figures() -> None:
    scores = {key: {m: {0: v} for m, v in figures.items()} for key, figures in PAPER.items()}
    judged = [j for claim in claims(16, [1, 4, 8, 16, 32]) if (j := judge(claim, scores))]
    assert len(judged) == 13
    for trend in judged:
        assert trend.appears, trend
        assert trend.paper == pytest.approx(trend.ours.mean)


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds differ by tens of points, the two models by one in each: clear, though their ranges overlap."""
    claim = Claim("a over b", ((1, "a", "retrieval"), (-1, "b", "retrieval")))
    a, b = {0: 11.0, 1: 32.0, 2: 51.5}, {0: 10.0, 1: 30.5, 2: 50.5}
    trend = judge(claim, {"a": {"retrieval": a}, "b": {"retrieval": b}})
    assert trend is not None and trend.appears and trend.clear
    assert trend.ours.mean == pytest.approx(3.5 / 3) and trend.ours.n == 3
    assert trend.ours.se == pytest.approx(math.sqrt((2 / 36 + 1 / 9) / 2 / 3))
    assert verdict(trend) == "appears, over 2 SE" and trend.paper is None

    swapped = judge(claim, {"a": {"retrieval": b}, "b": {"retrieval": a}})
    assert swapped is not None and verdict(swapped) == "does not appear, over 2 SE"
    noisy = judge(claim, {"a": {"retrieval": {0: 11.0, 1: 20.0}}, "b": {"retrieval": {0: 10.0, 1: 20.5, 2: 1.0}}})
    assert noisy is not None and verdict(noisy) == "appears, within 2 SE" and noisy.ours.n == 2
    one = judge(claim, {"a": {"retrieval": {0: 1.0}}, "b": {"retrieval": {0: 1.0}}})
    assert one is not None and verdict(one) == "does not appear, one seed"  # no difference is no trend


def test_the_backbone_counts_for_every_seed_and_missing_figures_for_none() -> None:
    claim = Claim("worse than the backbone", ((1, BACKBONE, "native"), (-1, "a", "native")))
    scores = {BACKBONE: {"native": {NO_SEED: 50.0}}, "a": {"native": {0: 40.0, 1: 42.0}}}
    trend = judge(claim, scores)
    assert trend is not None and trend.ours == Estimate(9.0, pytest.approx(1.0), 2)
    assert judge(claim, {"a": scores["a"]}) is None
    apart = {"a": {"native": {0: 1.0}}, "b": {"native": {1: 1.0}}}
    assert judge(Claim("x", ((1, "a", "native"), (-1, "b", "native"))), apart) is None


def test_nested_costs_are_bounded_by_a_share() -> None:
    made = {c.text: c for c in claims(2, [1, 2]) if "Nested" in c.text}
    assert len(made) == 6
    claim = made["Nested, K' = 1: retrieval keeps 95% of the model trained with K = 1"]
    for nested, appears in ((38.5, True), (37.5, False)):
        scores = {"nested@1": {"retrieval": {0: nested}}, "crem@1": {"retrieval": {0: 40.0}}}
        trend = judge(claim, scores)
        assert trend is not None and trend.appears is appears


SHIPPED = resources.files("pipelines.ablation") / "results"


def test_the_shipped_result_still_loads_and_gives_the_same_report() -> None:
    """Its table has the figures of its README; the file has the same content again."""
    tree = json.loads((SHIPPED / "ablation.json").read_text(encoding="utf-8"))
    result = AblationResult.from_json(tree)
    again = json.loads(json.dumps(result.to_json()))
    assert again.pop("format") == 1 and again == tree
    lines = {line[:42].strip(): line[42:].split("  ") for line in ablation_table(result).splitlines()}
    cells = {label: [cell.strip() for cell in found if cell.strip()] for label, found in lines.items()}
    readme = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert cells["backbone"] == ["2.0", "50.1", "–"] and "| backbone | 2.0 | | 50.1 |" in readme
    assert cells["CREM, K = 16"] == ["4.0 ± 0.2", "50.4 ± 0.6", "50.0 ± 0.9"]
    assert "| CREM, K = 16 | 4.0 ± 0.2 | 66.7 | 50.4 ± 0.6 | 53.1 | 50.0 ± 0.9 | 44.2 |" in readme
    page = ablation_page(result, {}, PreparedRows(pa.table({}), {}))
    assert page.html.count("<svg") == 1 and page.maps_chart is None
    assert len(result.trends) == 28 and all(str(escape(trend.text)) in page.html for trend in result.trends)
    assert page.chart.startswith(b"\x89PNG") and "30 of 34 runs" in page.html


@pytest.mark.parametrize("damage", [{"format": 2}, {"rows": [{"key": 3}]}, {"trends": None}])
def test_another_format_and_damage_are_refused(damage: dict[str, object]) -> None:
    tree = json.loads((SHIPPED / "ablation.json").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="run crem ablate --report again"):
        AblationResult.from_json(tree | damage)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    prepare(write_corpus(folder / "corpus"), str(folder / "prepared"), load_config("micro", RUN))
    return str(folder / "prepared")


@pytest.mark.ray
@pytest.mark.slow
def test_an_ablation_runs_resumes_and_reports(prepared: str, tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    command = [sys.executable, "-m", "crem.cli", "ablate", prepared, "--out", str(out), "--seeds", "0", *RUN]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run([*command, "--only", "table3"], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((out / "ablation.json").read_text())
    rows = {row["key"]: row for row in first["rows"]}
    assert set(rows) == {BACKBONE, "retrieval_only@0", "generation_only@0", "both@0", "crem@2"}
    for key, row in rows.items():
        assert row["retrieval"]["n"] == 1 and row["retrieval"]["se"] is None
        assert ("compressed" in row) == key.startswith("crem"), "without chorus tokens there is no compressed context"
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert "does not appear" in (out / "report.html").read_text() or "appears" in (out / "report.html").read_text()

    kept = {f.name: f.stat().st_mtime_ns for f in (out / "evaluations").iterdir()}
    result = ablate(prepared, str(out), load_config("micro", [*RUN, "ablate.parallel=2"]), seeds=(0,), only="table4")
    again = {f.name: f.stat().st_mtime_ns for f in (out / "evaluations").iterdir()}
    assert {name: again[name] for name in kept} == kept, "finished runs are not done again"
    assert set(again) - set(kept) == {"crem-1-0.json", "nested-2-0.json"}
    nested = [row for row in result.rows if row.family == "nested"]
    assert [row.chorus_tokens for row in nested] == [1, 2]
    assert "CREM, nested, K' = 1" in ablation_table(result)

    assert {f.name for f in (out / "maps").iterdir()} == {"crem-2-0.json"}
    maps = json.loads((out / "maps" / "crem-2-0.json").read_text())
    assert maps["images"] == 3 and all(np.sum(m) == pytest.approx(1, abs=1e-3) for m in maps["shown"][0]["maps"])
    assert 1 / 64 < maps["coverage"] <= 1 and 0 < maps["overlap"] <= 1 and 0 < maps["image_share"] < 1
    assert rows["crem@2"]["coverage"]["mean"] == pytest.approx(100 * maps["coverage"])
    assert (out / "maps.png").read_bytes().startswith(b"\x89PNG")

    model = str(out / "runs" / "nested-2-0" / "model")
    fingerprints = {
        json.loads((out / "evaluations" / "nested-2-0.json").read_text())["evaluations"][k]["fingerprint"]
        for k in ("1", "2")
    }
    assert fingerprints == {crem.load(model, chorus_tokens=k).fingerprint for k in (1, 2)} and len(fingerprints) == 2

    reported = ablate(prepared, str(out), load_config("micro", RUN), seeds=(0, 1), report_only=True)
    assert reported.runs.finished == 7 and reported.seeds == [0], "nothing ran, and all that did is reported"
    assert AblationResult.from_json(json.loads((out / "ablation.json").read_text())) == reported

    with pytest.raises(ConfigError, match=r"train\.steps=2"):
        ablate(prepared, str(out), load_config("micro", [*RUN, "train.steps=3"]), seeds=(0, 1))
