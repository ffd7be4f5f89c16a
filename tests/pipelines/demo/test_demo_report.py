"""The page and the file of a demo, from made-up results."""

from __future__ import annotations

import json

from crem.config import load_config
from pipelines.demo.demo_page import demo_page
from pipelines.demo.demo_report import Chat, Check, DemoReport, Search, SearchHit, ServeReport
from pipelines.embedding.output import EmbedManifest
from pipelines.search.index_dataset import IndexSummary
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.prepared import PreparedRows
from pipelines.training.run_folder import TrainResult
from tests.pipelines.evaluation.test_figures import PAIRS, evaluated


def report() -> DemoReport:
    result = evaluated(questions=True)
    return DemoReport(
        config=load_config("micro"),
        checks={"answers": Check(2.0, 1.5, True)},
        prepare=PrepareManifest(
            rows_in=9,
            rows_out=8,
            rejected=1,
            images=7,
            by_reason={},
            by_split_task={},
            source_uri="corpus",
            created_with={},
            config={},
        ),
        train=TrainResult(model="run/model", fingerprint="ff", steps=150, parameters=1_500_000, rows=8, metrics={}),
        curves=[{"step": s, "retrieval": 1.0, "generation": None, "samples_per_s": 9.0} for s in (10, 20)],
        embed=EmbedManifest(
            fingerprint="0123",
            dim=8,
            model="model",
            rows_in=7,
            rows_out=7,
            embedded=7,
            errors=0,
            resumed=0,
            items_per_s=9.0,
        ),
        index=IndexSummary(
            version=1, fingerprint="0123", model="model", dim=8, count=7, skipped=0, index="exact", probes=1
        ),
        evaluation=result,
        short=result,
        untrained=result,
        serve=ServeReport(
            9.0,
            [Search("<apple>", [SearchHit(1, "noto/1f34e.webp", 0.96)])],
            0.012,
            [Chat("?", "x", 1, "a", 1, "b", 1)],
        ),
        timings_s={"train": 160.0, "total": 299.0},
        peak_memory_gib=6.97,
    )


def test_the_page_has_all_charts_and_escapes_texts() -> None:
    page = demo_page(report(), _WithImage(PAIRS.table, PAIRS.images))
    assert page.count("<svg") == 3 and "&lt;apple&gt;" in page and "<apple>" not in page
    assert "data:image/png;base64," in page and "1.5 M parameters" in page and "299 s" in page


def test_the_file_keeps_its_keys() -> None:
    tree = json.loads(json.dumps(report().to_json()))
    assert {"config", "checks", "prepare", "train", "curves", "embed", "index", "serve", "timings_s"} <= tree.keys()
    assert tree["checks"]["answers"] == {"value": 2.0, "at_least": 1.5, "kept": True}
    assert tree["prepare"] == {"rows_in": 9, "rows_out": 8, "rejected": 1, "filtered": 0, "images": 7}
    assert tree["train"] == {"fingerprint": "ff", "steps": 150, "parameters": 1_500_000, "rows": 8, "metrics": {}}
    assert tree["embed"]["embedded"] == tree["index"]["count"] == 7
    assert not {"model", "format"} & (tree["embed"].keys() | tree["index"].keys())
    assert set(tree["short"]) == set(tree["untrained"]) == {"fingerprint", "retrieval", "answers", "cache"}
    assert "model" not in tree["evaluation"] and tree["evaluation"]["examples"]["retrieval"]
    assert tree["serve"]["searches"][0]["hits"] == [{"id": 1, "uri": "noto/1f34e.webp", "score": 0.96}]


class _WithImage(PreparedRows):
    """Rows whose every image is the same few bytes."""

    def image(self, image_id: int) -> bytes:
        return b"\x89PNG"
