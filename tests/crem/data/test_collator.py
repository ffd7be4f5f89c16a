"""Batches: bad items, positions of the parts, packing, and which sequence is whose target."""

from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

import crem
from crem import Item
from crem.data.collator import Batch, Collator
from crem.data.items import TrainingExample
from crem.data.prompts import Segment
from crem.data.sequence import CutCount
from crem.errors import ItemError

WORDS = ["a", "red", "apple", "what", "is", "this", "green", "animals", "and", "nature", "food", "drink", "describe"]


@pytest.fixture(scope="module")
def collator(tiny_model_dir: str) -> Collator:
    return crem.load(tiny_model_dir).collator


@pytest.mark.parametrize("item", [Item(), Item(""), Item(" \n\t"), Item(None, [], "Represent.")])
def test_an_empty_item_is_refused(collator: Collator, item: Item) -> None:
    with pytest.raises(ItemError, match="text that is not blank") as error:
        collator.prepare(item)
    assert error.value.reason == "empty_item"


def test_too_many_images_are_refused(collator: Collator) -> None:
    images = [Image.new("RGB", (8, 8))] * 17
    with pytest.raises(ItemError, match="max_images_per_item=16") as error:
        collator.prepare(Item("x", images))
    assert error.value.reason == "too_many_images"
    assert len(collator.prepare(Item("x", images[:16])).grids) == 16


def random_examples(seed: int) -> list[TrainingExample]:
    draw = random.Random(seed)

    def item() -> Item:
        words = " ".join(draw.choices(WORDS, k=draw.randint(1, 25)))
        shade = draw.randrange(256)
        images = [Image.new("RGB", (64, 64), (shade, i, 0)) for i in range(draw.choice([0, 0, 1, 2]))]
        return Item(words, images)

    examples = []
    for number in range(draw.randint(1, 12)):
        paired = draw.random() < 0.7
        answer = draw.choice(WORDS) if draw.random() < 0.5 or not paired else None
        examples.append(
            TrainingExample(
                item(),
                item() if paired else None,
                tuple(item() for _ in range(draw.randint(0, 2))) if paired else (),
                "what?" if answer else None,
                answer,
                z=draw.random() < 0.5,
                target_key=number + 100,
            )
        )
    return examples


def tokens_of(batch: Batch, number: int) -> list[int]:
    return batch.input_ids[batch.sequence_ids == number].tolist()


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_keeps_every_sequence_exactly_once(collator: Collator, seed: int) -> None:
    examples = random_examples(seed)
    batch = collator.examples(examples, flat=seed % 2 == 0)
    queries = [
        collator.prepare(p.query, question=p.question if p.answer else None, answer=p.answer, z=p.z) for p in examples
    ]
    paired = [i for i, p in enumerate(examples) if p.target is not None]
    targets = [collator.prepare(examples[i].target) for i in paired]  # type: ignore[arg-type]
    negatives = [collator.prepare(n) for i in paired for n in examples[i].negatives]
    expected = queries + targets + negatives
    placed = [tokens_of(batch, n) for n in range(len(batch.z))]
    assert sorted(placed) == sorted(s.prompt.input_ids.tolist() for s in expected)
    assert set(batch.sequence_ids.unique().tolist()) - {-1} == set(range(len(expected)))

    # each index names the sequence that it should, with its pixels in the order of the sequences
    assert [placed[n] for n in batch.queries] == [queries[i].prompt.input_ids.tolist() for i in paired]
    assert [placed[n] for n in batch.targets] == [s.prompt.input_ids.tolist() for s in targets]
    assert [placed[n] for n in batch.negatives] == [s.prompt.input_ids.tolist() for s in negatives]
    assert batch.target_keys.tolist() == [examples[i].target_key for i in paired]
    assert batch.negative_keys.tolist() == [-1] * len(negatives)
    images = int((batch.input_ids == collator.prompts.image_id).sum())
    if batch.pixel_values is None:
        assert images == 0
    else:
        assert batch.image_grid_thw is not None and batch.image_index is not None
        assert images == int(batch.image_grid_thw[batch.image_index].prod(1).sum()) // 4
        by_tokens = {tuple(s.prompt.input_ids.tolist()): s for s in expected}
        pixels = torch.cat([torch.from_numpy(collator.pixels.values(by_tokens[tuple(h)].patches_PCN)) for h in placed])
        distinct = batch.pixel_values.split(batch.image_grid_thw.prod(1).tolist())
        assert torch.equal(torch.cat([distinct[i] for i in batch.image_index.tolist()]), pixels)
        assert len({image.numpy().tobytes() for image in distinct}) == len(distinct)

    # a row holds its sequences one after the other, and its padding at the end
    for ids, segments in zip(batch.sequence_ids, batch.segments, strict=True):
        real = ids[ids >= 0]
        assert (real[1:] >= real[:-1]).all() and (ids[len(real) :] == -1).all()
        assert torch.equal(ids == -1, segments == Segment.PAD)
    lengths = [len(s.prompt.input_ids) for s in expected]
    if seed % 2 == 0:
        assert batch.input_ids.shape == (1, sum(lengths)), "no padding"
    else:
        assert batch.input_ids.shape == (len(lengths), max(lengths)) and batch.two_part is None


def test_a_hard_negative_brings_its_content(collator: Collator) -> None:
    known = TrainingExample(Item("a"), Item("b"), (Item("c"), Item("d")), target_key=4, negative_keys=(5, 6))
    unknown = TrainingExample(Item("e"), Item("f"), (Item("g"),), target_key=7)
    batch = collator.examples([known, unknown])
    assert (batch.target_keys.tolist(), batch.negative_keys.tolist()) == ([4, 7], [5, 6, -1])


def test_a_batch_counts_the_sequences_that_lost_text(collator: Collator) -> None:
    long = "q z x j " * 50  # over 64 tokens, and over the 32 of an answer
    examples = [
        TrainingExample(Item(long), Item("short"), (Item(long),), "what?", "short"),
        TrainingExample(Item("short"), None, (), long, long),  # two texts of one sequence
        TrainingExample(Item("short"), Item("short")),
    ]
    cuts = collator.examples(examples).cuts
    longest = len(collator.prompts.tokenizer(long).input_ids)
    assert cuts == CutCount(sequences=6, cut=3, longest=longest)
    assert cuts + CutCount(4, 1, longest + 1) == CutCount(10, 4, longest + 1)
    assert collator.examples(examples[2:]).cuts.sentence("rows", 64) is None


def test_z_stays_with_its_row(collator: Collator) -> None:
    examples = [TrainingExample(Item(f"{w} thing"), None, (), "what?", w, z=i % 3 == 0) for i, w in enumerate(WORDS)]
    batch = collator.examples(examples)
    marked = {tuple(tokens_of(batch, n)) for n in batch.z.nonzero()[:, 0].tolist()}
    expected = {
        tuple(collator.prepare(p.query, question="what?", answer=p.answer).prompt.input_ids) for p in examples if p.z
    }
    assert marked == expected


def test_an_inference_batch_is_one_sequence_a_row(collator: Collator) -> None:
    batch = collator.items([Item("a"), Item("a red apple what is this"), Item(images=[Image.new("RGB", (64, 64))])])
    assert not batch.packed and batch.input_ids.shape[0] == 3 and not batch.z.any()
    assert [(row >= 0).sum().item() for row in batch.sequence_ids] == [len(tokens_of(batch, n)) for n in range(3)]
    assert (batch.input_ids[batch.segments == Segment.PAD] == collator.pad_id).all()
    assert batch.padding_share == pytest.approx((batch.segments == Segment.PAD).sum().item() / batch.segments.numel())
    moved = batch.to("cpu")
    assert torch.equal(moved.input_ids, batch.input_ids) and moved.pixel_values is not None


def test_bytes_become_the_same_pixels_where_the_batch_is_moved(collator: Collator) -> None:
    images = [Image.effect_noise((56 + 28 * n, 56), 90).convert("RGB") for n in range(3)]
    sequences = [collator.prepare(Item("a", [image])) for image in (*images, images[0])]
    batch, as_bytes = collator.pad(sequences), collator.pad(sequences, pixels_as_bytes=True)
    assert as_bytes.pixel_values is None and as_bytes.pixel_bytes is not None and batch.pixel_values is not None
    assert 8 * as_bytes.pixel_bytes.patches_PCN.nbytes == batch.pixel_values.nbytes
    moved = as_bytes.to("cpu")
    assert moved.pixel_values is not None and torch.equal(moved.pixel_values, batch.pixel_values)
    assert (
        moved.pixel_bytes is None
        and collator.pad([collator.prepare(Item("a"))], pixels_as_bytes=True).to("cpu").pixel_values is None
    )
