"""The dry run: what it counts is what the run will do."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from crem.cli import main
from crem.config import load_config
from crem.forecast.shapes import PUBLISHED, image_patches
from crem.forecast.summary import summary
from crem.model.build import build_model
from pipelines.tables import schema
from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.prepared import index_rows, read_rows, texts_of
from pipelines.tables.storage import Folder
from pipelines.training import dry_run as dryrun
from pipelines.training.dry_run import dry_run
from tests.conftest import TINY
from tests.crem.published import published_backbone
from tests.pipelines.shapes import COLOURS, SHAPES, draw

SIZES = {"i2t": 60, "t2i": 15, "caption": 20}
RUN = [*TINY, "train.global_batch=32", "train.steps=40", "train.workers=2", "data.retrieval_share=0.75"]


def write_manifest(folder: Path, rows: int, images: int) -> None:
    """What makes tables written by hand complete."""
    PrepareManifest(
        rows_in=rows,
        rows_out=rows,
        rejected=0,
        images=images,
        by_reason={},
        by_split_task={},
        source_uri="by hand",
        created_with={},
        config={},
    ).write(Folder.at(folder))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prepared tables of three tasks, written by hand: no Ray."""
    folder = tmp_path_factory.mktemp("prepared")
    images, rows = [], []
    for task, size in SIZES.items():
        for i in range(size):
            colour, shape = list(COLOURS)[i % 4], SHAPES[i % 3]
            data = draw(colour, shape, 10 + i % 20)
            image = {"id": schema.content_id(data), "bytes": data, "width": 64, "height": 64, "uri": str(i)}
            images.append(image)
            image_side = {"text": None, "instruction": None, "images": [image["id"]]}
            words = {"text": f"a {colour} {shape} " * (1 + i % 5), "instruction": None, "images": []}
            turn = {"question": "what is this?", "answer": f"{colour} {shape}"} if task != "t2i" else {}
            query, target = {"i2t": (image_side, words), "t2i": (words, image_side), "caption": (image_side, None)}[
                task
            ]
            row = {"id": schema.row_id(task, str(i)), "source": "s", "key": str(i), "task": task, "split": "train"}
            rows.append(
                {**row, "query": query, "target": target, "negatives": None, "question": None, "answer": None, **turn}
            )
    unique = list({image["id"]: image for image in images}.values())
    for name, held, kind in (("rows", rows, schema.ROWS), ("images", unique, schema.IMAGES)):
        (folder / name).mkdir()
        pq.write_table(pa.Table.from_pylist(held, schema=kind), folder / name / "part-0.parquet")
    write_manifest(folder, len(rows), len(unique))
    return str(folder)


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_shares_and_epochs_are_those_of_the_plan(prepared: str, temperature: float) -> None:
    config = load_config("micro", [*RUN, f"data.source_temperature={temperature}"])
    forecast = dry_run(prepared, config)
    counts = {m.task: (m.retrieval, m.with_turn, m.heterogeneous) for m in forecast.tasks}
    assert counts == {"i2t": (60, 60, 0), "t2i": (15, 0, 0), "caption": (0, 0, 20)}
    rows = read_rows(prepared, split_prefix="train")
    plan = index_rows(prepared, split_prefix="train").plan(config)
    taken = np.concatenate([plan.step(s).rows for s in range(400)])
    tasks = np.array(rows.table.column("task").to_pylist())[taken]
    for m in forecast.tasks:
        assert m.share == pytest.approx((tasks == m.task).mean(), abs=0.01)
        rows_of_task = m.retrieval + m.heterogeneous
        assert m.epochs == pytest.approx(40 * 32 * m.share / rows_of_task)
    assert sum(m.share for m in forecast.tasks) == pytest.approx(1)
    assert forecast.epochs == (pytest.approx(40 * 24 / 75), pytest.approx(40 * 8 / 20))


def test_tokens_are_those_of_the_runs_own_batches(prepared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dryrun, "SAMPLE_ROWS", 64)
    config = load_config("micro", [*RUN, "train.chunk_rows=8"])
    forecast = dry_run(prepared, config)
    rows = read_rows(prepared, split_prefix="train")
    plan = index_rows(prepared, split_prefix="train").plan(config)
    _, collator = build_model(config.model, texts=texts_of(rows))
    steps = [plan.step(s) for s in range(2)]
    numbers, z = np.concatenate([s.rows for s in steps]), np.concatenate([s.z for s in steps])
    batches = [collator.examples(rows.examples(numbers[i : i + 8], z[i : i + 8])) for i in range(0, 64, 8)]
    assert forecast.row.tokens == pytest.approx(sum(b.tokens for b in batches) / 64)
    assert forecast.row.answer_tokens == pytest.approx(sum(int(b.answer_tokens) for b in batches) / 64)
    assert forecast.chunk_rows == 8
    assert max(b.tokens for b in batches) <= forecast.chunk.tokens <= 1.1 * max(b.tokens for b in batches) + 1


def test_tables_poorer_than_the_preset_are_said(prepared: str, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "small")
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    shrunk = {"images_shrunk": 5, "config": {"prepare": {"encode_max_pixels": 4096}}}
    (tmp_path / "small" / "manifest.json").write_text(json.dumps(manifest | shrunk))
    settings = ["train.global_batch=32", "train.chunk_rows=4"]
    shown = summary(dry_run(str(tmp_path / "small"), load_config("2b", settings)))
    assert "WARNING: the tables hold 5 of the" in shown and "prepare.encode_max_pixels=1003520" in shown
    assert "WARNING" not in summary(dry_run(prepared, load_config("2b", settings)))


def test_without_the_tokenizer_it_is_estimated_and_said(prepared: str) -> None:
    config = load_config("2b", ["train.global_batch=32", "train.chunk_rows=4"])
    forecast = dry_run(prepared, config)
    assert "tokenizer of Qwen/Qwen2-VL-2B-Instruct is not on this machine" in summary(forecast)
    assert 60 < forecast.row.tokens < 250 and forecast.row.patches > 4
    assert [need.workers for need in forecast.needs] == [1, 1, 1]


@pytest.mark.parametrize("measured", [True, False], ids=["with the tokenizer", "estimated"])
def test_texts_that_would_be_cut_are_counted(prepared: str, monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    if not measured:
        monkeypatch.setattr(dryrun, "_collator", lambda *_: None)
    limit = "model.prompt.max_text_tokens=10"
    shown = summary(dry_run(prepared, load_config("micro", [*RUN, limit])))
    found = re.search(r"([\d,]+) of ([\d,]+) sampled sequences lost .* cut to 10 tokens .* had (\d+): ([\d.]+)%", shown)
    assert found is not None, shown
    cut, sequences, longest = (int(number.replace(",", "")) for number in found.groups()[:3])
    assert 0 < cut < sequences and longest > 10 and float(found[4]) == pytest.approx(100 * cut / sequences, abs=0.05)
    assert "lost the end" not in summary(dry_run(prepared, load_config("micro", RUN)))


@pytest.mark.parametrize("measured", [True, False], ids=["with the tokenizer", "estimated"])
def test_configured_bounds_hold_on_a_published_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    if not measured:
        monkeypatch.setattr(dryrun, "_collator", lambda *_: None)
    Image.new("RGB", (2000, 1500), "red").save(file := io.BytesIO(), "PNG")
    image = {"id": 7, "bytes": file.getvalue(), "width": 2000, "height": 1500, "uri": "0"}
    row = {"source": "s", "key": "0", "task": "caption", "split": "train", "target": None, "negatives": None}
    row |= {"query": {"text": None, "instruction": None, "images": [7]}, "question": "what?", "answer": "red"}
    rows = [row | {"id": 1}, row | {"id": 2}]
    for name, held, kind in (("rows", rows, schema.ROWS), ("images", [image], schema.IMAGES)):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(held, schema=kind), tmp_path / name / "part-0.parquet")
    write_manifest(tmp_path, len(rows), 1)
    backbone = published_backbone(tmp_path / "backbone")
    settings = [f"model.backbone={backbone}", "train.global_batch=8", "train.chunk_rows=1", "train.steps=1"]
    assert dry_run(str(tmp_path), load_config("2b", settings)).row.patches == 4 * 1230


@pytest.mark.parametrize("size", [(64, 64), (1920, 1080), (30, 900), (4000, 3000), (20, 20)])
def test_patches_are_those_of_qwen2_vl(size: tuple[int, int]) -> None:
    config = load_config("2b")
    bounds = config.model.image
    height, width = smart_resize(size[1], size[0], 28, bounds.min_pixels, bounds.max_pixels)
    got = image_patches(*size, config.model.image, PUBLISHED["Qwen/Qwen2-VL-2B-Instruct"])
    assert got == height * width // 14**2


def test_the_command_says_how_many_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--preset", "7b+full"]) == 0
    shown = capsys.readouterr().out
    assert "8.29 B parameters, 8.29 B trained" in shown and "no tables were named" in shown
    for size in ("80 GB", "40 GB", "24 GB"):
        assert any(line.startswith("needs") and size in line and "GPU" in line for line in shown.splitlines())
    assert "PFLOP a step" in shown and "35% of 989 TFLOP/s" in shown
    assert main(["train", "--dry-run", "/nowhere/prepared", "--preset", "micro"]) == 2
    assert "crem prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048},
            "holds a 'llama' model (LlamaForCausalLM); CREM's backbone is Qwen2-VL",
        ),
        (
            {
                "model_type": "qwen3_5",
                "architectures": ["Qwen3_5ForConditionalGeneration"],
                "text_config": {"hidden_size": 2048},
                "vision_config": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "patch_size": 16},
            },
            "holds a 'qwen3_5' model (Qwen3_5ForConditionalGeneration); CREM's backbone is Qwen2-VL",
        ),
        ({"model_type": "qwen2_vl"}, "does not describe a Qwen2-VL (KeyError: 'vision_config')"),
        ([], "config.json cannot be read"),
    ],
)
def test_another_backbone_is_refused_by_its_name(
    config: object, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["train", "--dry-run", "--preset", "2b", f"model.backbone={tmp_path}"]) == 1
    shown = capsys.readouterr().err
    assert says in shown and "Traceback" not in shown, shown


def test_training_itself_needs_tables_and_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--preset", "micro"]) == 2
    assert "PREPARED" in capsys.readouterr().err
    assert main(["train", str(tmp_path), "--preset", "micro"]) == 2
    assert "--out" in capsys.readouterr().err
