"""The checkpoints that come with crem: small, stock, nested, and as good as their model card says."""

from __future__ import annotations

import csv
import os

import numpy as np
import pytest
from transformers import Qwen2VLForConditionalGeneration

import crem
from crem.checkpoint import describe
from crem.errors import ConfigError
from crem.fetch import SHIPPED
from pipelines.emoji import corpus_path
from pipelines.sources.image_reader import ImageReader
from pipelines.tables.storage import Folder
from tests.conftest import tiny_config

MiB = 2**20


@pytest.fixture(scope="module")
def micro() -> crem.Crem:
    return crem.load("crem-micro")


@pytest.mark.parametrize("name", ["crem-micro", "crem-micro-base"])
def test_a_shipped_checkpoint_is_small_and_stock(name: str) -> None:
    files = [file for file in (SHIPPED / name).rglob("*") if file.is_file()]
    assert 1 * MiB < sum(file.stat().st_size for file in files) < 12 * MiB
    _, info = Qwen2VLForConditionalGeneration.from_pretrained(SHIPPED / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def drawings(vendor: str, count: int) -> tuple[list[crem.Item], list[str]]:
    """An even spread of a vendor's drawings with their labels."""
    with open(os.path.join(corpus_path(), "concepts.csv"), encoding="utf-8") as file:
        concepts = list(csv.DictReader(file))
    concepts = concepts[:: len(concepts) // count][:count]
    reader = ImageReader.of(Folder.at(corpus_path()), tiny_config().image)
    items = [crem.Item(images=[reader.read(f"{vendor}/{c['hexcode']}.webp")]) for c in concepts]
    return items, [c["label"] for c in concepts]


@pytest.mark.parametrize("chorus_tokens", [1, 4, 8, 16, 32])
def test_it_finds_drawings_of_a_vendor_that_it_never_saw(micro: crem.Crem, chorus_tokens: int) -> None:
    """Among 100 concepts, at every chorus count; chance is 0.01."""
    items, labels = drawings("twemoji", 100)
    vectors = micro.embed(items, chorus_tokens=chorus_tokens)
    queries = micro.embed(labels, chorus_tokens=chorus_tokens)
    right = np.mean((queries @ vectors.T).argmax(1) == np.arange(100))
    assert right > {1: 0.1}.get(chorus_tokens, 0.2), right


def test_another_count_is_refused_and_each_has_its_fingerprint(micro: crem.Crem) -> None:
    with pytest.raises(ConfigError, match=r"1, 4, 8, 16, 32 chorus tokens, not with 5"):
        micro.embed(["apple"], chorus_tokens=5)
    fingerprints = {describe("crem-micro", count).fingerprint for count in (1, 4, 8, 16, 32)}
    assert len(fingerprints) == 5 and describe("crem-micro").fingerprint == micro.fingerprint in fingerprints
