"""Rows of some emoji, prepared, and what was mined of them with the shipped model, which embedded them itself."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from crem.config import RunConfig, load_config
from pipelines.corpus.prepare import prepare
from pipelines.mining.mine import MineSummary, mine
from tests.pipelines.conftest import write_rows

EMOJI = Path("pipelines/emoji/corpus")
MODEL = "crem/checkpoints/crem-micro"
CONCEPTS = 24


def config(*overrides: str) -> RunConfig:
    basic = ["mine.negatives=3", "mine.rows_per_shard=100", "embed.max_actors=1"]
    return load_config("micro", [*basic, *overrides])


def concept(key: str) -> str:
    """``text_to_image/noto/1f603/label/1`` is about ``1f603``."""
    return key.split("/")[2]


@pytest.fixture(scope="package")
def prepared(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    """The text-to-image and image-to-text rows of some concepts, and a test row that must be left alone."""
    folder = tmp_path_factory.mktemp("emoji")
    rows = pq.read_table(EMOJI / "rows" / "train.parquet").to_pylist()
    wanted = sorted({concept(row["key"]) for row in rows})[::12][:CONCEPTS]
    chosen = [
        row for row in rows if row["task"] in ("text_to_image", "image_to_text") and concept(row["key"]) in wanted
    ]
    chosen[0]["negatives"] = [{"text": "something that was there before"}]
    chosen.append(chosen[1] | {"split": "test", "key": "text_to_image/noto/test/label/1"})
    with zipfile.ZipFile(EMOJI / "images.zip") as archive:
        for name in {name for row in chosen for name in (*row["query_images"], *row["target_images"])}:
            archive.extract(name, folder / "raw" / "images")
    write_rows(folder / "raw" / "rows.jsonl", chosen)
    prepare(str(folder / "raw"), str(folder / "prepared"), load_config("micro"))
    return str(folder / "prepared")


@pytest.fixture(scope="package")
def mined(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MineSummary]:
    out = tmp_path_factory.mktemp("mined")
    return out, mine(MODEL, prepared, str(out), config("mine.keep_vectors=true"))
