"""Prepared sequences: exact pixels, compact pickles, preparing in threads and processes."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
from PIL import Image

import crem
from crem import Item
from crem.config import BackboneShape, ImageConfig
from crem.data.collator import Collator
from crem.data.sequence import PixelTable, PreparedSequence
from crem.model.backbone import image_processor

SIZES = [(90, 50), (64, 64), (1, 1), (400, 300)]
IMAGES = [Image.effect_noise(size, 90).convert("RGB") for size in SIZES] + [Image.new("RGB", (70, 30), (1, 2, 253))]
ITEMS = [Item(f"text {i} 漢字 <|image_pad|>", IMAGES[i % 5 :][:2] if i % 3 else ()) for i in range(30)]


@pytest.fixture(scope="module")
def collator(tiny_model_dir: str) -> Collator:
    return crem.load(tiny_model_dir).collator


def assert_same(a: PreparedSequence, b: PreparedSequence) -> None:
    assert (a.grids, a.z, a.tokens, a.chorus_tokens) == (b.grids, b.z, b.tokens, b.chorus_tokens)
    for left, right in [*zip(a.prompt, b.prompt, strict=True), (a.positions_3T, b.positions_3T)]:
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(a.patches_PCN, b.patches_PCN)


@pytest.mark.parametrize("patch_size", [4, 14, 16])
def test_pixels_are_those_of_the_image_processor_to_the_last_bit(patch_size: int) -> None:
    processor = image_processor(BackboneShape(patch_size=patch_size), None, ImageConfig(max_pixels=50_000))
    table = PixelTable(processor)
    patches, grids = table.patches(IMAGES)
    whole = processor(images=IMAGES, return_tensors="np")
    assert patches.dtype == np.uint8 and [list(g) for g in grids] == whole["image_grid_thw"].tolist()
    values = table.values(patches)
    assert values.dtype == np.float32 and np.array_equal(values, whole["pixel_values"])
    assert len(np.unique(values)) > 256, "the channels are normalised apart"


def test_a_pickled_sequence_is_as_small_as_its_pixels(collator: Collator) -> None:
    item = Item("a red apple", [Image.effect_noise((300, 200), 90).convert("RGB")])
    sequence = collator.prepare(item)
    size = len(pickle.dumps(sequence))
    pixels = sum(h * w for _, h, w in sequence.grids) * 3 * collator.processor.patch_size**2
    assert sequence.patches_PCN.nbytes == pixels and size < pixels + 40 * sequence.tokens + 2000
    batch = collator.pad([sequence])
    assert batch.pixel_values is not None and batch.pixel_values.nbytes == 8 * pixels
    assert_same(pickle.loads(pickle.dumps(sequence)), sequence)


def test_sequences_are_prepared_side_by_side(collator: Collator) -> None:
    expected = [collator.prepare(item) for item in ITEMS]
    for _ in range(5):
        fresh = pickle.loads(pickle.dumps(collator))  # as an actor gets it: its tokenizer and texts start anew
        fresh.prompts._known.clear()
        with ThreadPoolExecutor(8) as threads:
            for sequence, wanted in zip(threads.map(fresh.prepare, ITEMS), expected, strict=True):
                assert_same(sequence, wanted)


def test_sequences_of_different_chorus_counts_are_not_mixed(collator: Collator) -> None:
    two, four = (collator.prepare(Item("a"), chorus_tokens=count) for count in (2, 4))
    assert (two.chorus_tokens, four.chorus_tokens) == (2, 4) and four.tokens == two.tokens + 2
    with pytest.raises(ValueError, match=r"\[2, 4\] chorus tokens"):
        collator.pad([two, four])


def test_preparing_leaves_the_item_alone(collator: Collator) -> None:
    image = IMAGES[0].copy()
    before = deepcopy(np.asarray(image))
    first = collator.prepare(Item(None, [image]))
    np.testing.assert_array_equal(np.asarray(image), before)
    assert_same(collator.prepare(Item(None, [image])), first)
