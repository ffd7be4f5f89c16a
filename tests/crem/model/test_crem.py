"""The network: no leak past the chorus tokens, pruning equals masking, padding and neighbours change nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from crem.data.collator import Batch, Collator
from crem.data.collator import Sequence as TokenSequence
from crem.data.items import Item, TrainingExample
from crem.data.prompts import Segment
from crem.model.attention import compression_aware_mask
from crem.model.build import build_model
from crem.model.chorus import pool
from crem.model.crem import CremModel
from crem.model.generation import decode, prefill
from crem.model.memory import MemoryLayout
from crem.model.recall import memories_of
from tests.conftest import TEXTS, lively, tiny_config

RED = Image.new("RGB", (80, 40), (255, 0, 0))
GREEN = Image.new("RGB", (64, 64), (0, 255, 0))
STRIPES = Image.fromarray((np.indices((64, 64)).sum(0) % 16 * 16).astype(np.uint8)).convert("RGB")
ITEMS = [
    Item("a red apple"),
    Item(images=[RED]),
    Item("what is this green thing among the animals?", [STRIPES]),
    Item("two of them", [RED, STRIPES]),
    Item.of_parts(["what is ", RED, " beside ", STRIPES, GREEN, " among the animals?"]),
    Item.of_parts(["a red apple", RED]),
]
QUESTION, ANSWER = "what is this?", "a red apple"


@pytest.fixture(scope="module", params=["", "You are a helpful assistant."], ids=["no-system", "system"])
def tiny(request: pytest.FixtureRequest) -> tuple[CremModel, Collator]:
    model, collator = build_model(tiny_config(f"model.prompt.system={request.param!r}"), texts=TEXTS)
    lively(model)
    return model.eval(), collator


def sequences(collator: Collator, z: bool) -> list[TokenSequence]:
    return [collator.prepare(item, question=QUESTION, answer=ANSWER, z=z) for item in ITEMS]


def logits(model: CremModel, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.core.lm_head(model.encode(batch)[0])


def test_mask_is_the_formula_of_the_paper() -> None:
    segments = torch.tensor([[0, 1, 1, 2, 3, 3, 4, 5, -1]])
    ids = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 0, -1]])
    for z, template in [(True, True), (True, False), (False, True)]:
        mask = compression_aware_mask(segments, ids, torch.tensor([z]), template_visible=template)[0, 0]
        for i in range(8):
            for j in range(8):
                si, sj = segments[0, i].item(), segments[0, j].item()
                blocked = z and si in (4, 5) and (sj in (1, 2) or (sj == 0 and not template))
                assert bool(mask[i, j]) == (j <= i and not blocked), (z, template, i, j)
        assert not mask[:8, 8].any() and mask[8].any(), "nothing attends to padding, and padding attends to something"


def test_packed_sequences_do_not_see_each_other() -> None:
    segments = torch.tensor([[2, 3, 2, 3, -1]])
    ids = torch.tensor([[0, 0, 1, 1, -1]])
    mask = compression_aware_mask(segments, ids, torch.tensor([False, False]))[0, 0]
    assert mask[2:4, :2].any().item() is False
    assert mask.int().tolist()[:4] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]


@pytest.mark.parametrize("number", [2, 4], ids=["images first", "interleaved"])
@pytest.mark.parametrize("z", [True, False])
def test_no_leak_past_the_chorus_tokens(tiny: tuple[CremModel, Collator], z: bool, number: int) -> None:
    """With fixed chorus states, changing a V or T token must not move Q/A logits when z = 1, and must when z = 0."""
    model, collator = tiny
    batch = collator.pad([sequences(collator, z)[number]])
    segments = batch.segments[0]
    fixed: dict[int, torch.Tensor] = {}

    def hold(layer: int):  # type: ignore[no-untyped-def]
        def hook(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            output = output[0] if isinstance(output, tuple) else output
            if layer not in fixed:
                fixed[layer] = output[:, segments == Segment.U].clone()
            output = output.clone()
            output[:, segments == Segment.U] = fixed[layer]
            return output

        return hook

    handles = [block.register_forward_hook(hold(i)) for i, block in enumerate(model.core.model.language_model.layers)]
    try:
        before = logits(model, batch)
        for segment in (Segment.V, Segment.T):
            changed = replace(batch, input_ids=batch.input_ids.clone())
            if segment == Segment.V:
                assert batch.pixel_values is not None
                changed.pixel_values = batch.pixel_values.flip(0) + 1
            else:
                at = int((segments == Segment.T).nonzero()[0])
                changed.input_ids[0, at] = (batch.input_ids[0, at] + 1) % 200
            after = logits(model, changed)
            answering = segments >= Segment.Q
            moved = (after - before)[:, answering].abs().max().item()
            assert (moved == 0) if z else (moved > 1e-3), (segment, moved)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("compressed", "template_visible"), [(False, True), (True, True), (True, False)])
def test_pruned_cache_equals_masked_forward(compressed: bool, template_visible: bool) -> None:
    """Teacher-forced: every hidden state of Q and A from the (pruned) cache is that of one masked forward."""
    model, collator = build_model(
        tiny_config(f"model.prompt.template_visible={template_visible}", "model.prompt.system=hello"), texts=TEXTS
    )
    lively(model)
    model.eval()
    whole = collator.pad(sequences(collator, compressed))
    expected = logits(model, whole)
    context = prefill(model, collator.items(ITEMS))
    if compressed:
        context = context.compressed(template_visible=template_visible)
    question, answer = collator.prompts.question(QUESTION), collator.prompts.answer(ANSWER)
    turn = question + answer
    length = len(turn.input_ids)
    ids = torch.from_numpy(turn.input_ids).expand(len(ITEMS), -1)
    positions = context.next_position_B[:, None] + torch.arange(length)
    mask = torch.cat(
        [
            context.visible_BC[:, None, :].expand(-1, length, -1),
            torch.ones(length, length, dtype=torch.bool).tril().expand(len(ITEMS), -1, -1),
        ],
        dim=2,
    )
    with torch.no_grad():
        out = model.core.model(
            input_ids=ids,
            attention_mask={"full_attention": mask[:, None]},
            position_ids=positions.expand(3, -1, -1),
            past_key_values=context.cache,
        )
        got = model.core.lm_head(out.last_hidden_state)
    for row in range(len(ITEMS)):
        answering = whole.segments[row] >= Segment.Q
        torch.testing.assert_close(got[row], expected[row][answering], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("compressed", [False, True])
def test_decoding_takes_the_tokens_of_the_masked_forward(tiny: tuple[CremModel, Collator], compressed: bool) -> None:
    model, collator = tiny
    context = prefill(model, collator.items(ITEMS))
    if compressed:
        context = context.compressed(template_visible=True)
    texts = ["what?", QUESTION, "describe it", "animals and nature?", "food?", ""]
    questions = [collator.prompts.question(q) for q in texts]
    stop = collator.prompts.stop_ids
    tokens = torch.stack(list(decode(model, context, questions, stop_ids=stop, max_new_tokens=6)), 1)
    for row, item in enumerate(ITEMS):
        made = collator.prepare(item, question=texts[row], z=compressed)
        for step in range(6):
            choice = int(logits(model, collator.pad([made]))[0, -1].argmax())
            assert choice == tokens[row, step], (row, step)
            if choice in stop:
                break
            ids = np.append(made.prompt.input_ids, choice)
            prompt = type(made.prompt)(ids, np.append(made.prompt.segments, Segment.A).astype(np.int8))
            last = made.positions_3T[:, -1:] + 1
            made = replace(made, prompt=prompt, positions_3T=np.concatenate([made.positions_3T, last], 1))


def test_native_generation_is_the_backbones(tiny: tuple[CremModel, Collator]) -> None:
    """transformers' own ``generate`` on the same prompt gives the same tokens."""
    model, collator = tiny
    for item in ITEMS:
        batch = collator.pad([collator.prepare(item, question=QUESTION)])
        image_id = model.core.config.image_token_id
        pixels = {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid_thw} if item.images else {}
        theirs = model.core.generate(
            input_ids=batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            mm_token_type_ids=(batch.input_ids == image_id).int(),
            **pixels,
            max_new_tokens=8,
            do_sample=False,
        )[0, batch.input_ids.shape[1] :]
        context = prefill(model, collator.items([item]))
        question = [collator.prompts.question(QUESTION)]
        stop = collator.prompts.stop_ids
        ours = torch.cat(list(decode(model, context, question, stop_ids=stop, max_new_tokens=8)))
        assert ours.tolist() == theirs.tolist()


def test_padding_batch_and_neighbours_do_not_change_a_result(tiny: tuple[CremModel, Collator]) -> None:
    model, collator = tiny
    alone = torch.cat([prefill(model, collator.items([item])).embeddings() for item in ITEMS])
    together = prefill(model, collator.items(ITEMS)).embeddings()
    crowded = prefill(model, collator.items([*ITEMS[::-1], *ITEMS * 3])).embeddings()[: len(ITEMS)].flip(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(crowded, alone, atol=1e-5, rtol=0)
    assert (alone @ alone.T).fill_diagonal_(0).max() < 0.999, "different items have different embeddings"


def test_the_order_of_text_and_images_is_part_of_an_item(tiny: tuple[CremModel, Collator]) -> None:
    """The same tokens in another order, or the same images at other places, are another embedding."""
    model, collator = tiny
    text = "what is beside the animals?"
    orders = [(0, 0), (0, 8), (8, 8), (8, 15), (15, len(text)), (len(text), len(text))]
    items = [Item(text, [RED, STRIPES], image_at=places) for places in orders]
    items += [Item(text, [STRIPES, RED], image_at=(8, 15)), Item(text, [RED, STRIPES])]
    vectors = model(collator.items(items)).embeddings
    similar = vectors @ vectors.T
    assert torch.equal(vectors[0], vectors[-1]), "places of zero mean that the images precede the text"
    assert similar[:-1, :-1].fill_diagonal_(0).max() < 0.999, similar


def test_left_padding_does_not_change_a_result(tiny: tuple[CremModel, Collator]) -> None:
    """The mask, not the side of the padding, decides what is seen."""
    model, collator = tiny
    whole = collator.pad(sequences(collator, True))
    width = whole.input_ids.shape[1]
    rolled = [width - int((whole.segments[i] >= 0).sum()) for i in range(len(ITEMS))]
    left = replace(
        whole,
        input_ids=torch.stack([r.roll(n) for r, n in zip(whole.input_ids, rolled, strict=True)]),
        segments=torch.stack([r.roll(n) for r, n in zip(whole.segments, rolled, strict=True)]),
        sequence_ids=torch.stack([r.roll(n) for r, n in zip(whole.sequence_ids, rolled, strict=True)]),
        position_ids=torch.stack([whole.position_ids[:, i].roll(n, 1) for i, n in enumerate(rolled)], 1),
    )
    assert rolled != [0] * len(ITEMS)
    a, b = model(whole), model(left)
    torch.testing.assert_close(a.embeddings, b.embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.lm_loss_sum, b.lm_loss_sum, atol=1e-4, rtol=1e-5)


def test_one_forward_gives_embedding_and_lm_loss_and_packing_changes_neither(tiny: tuple[CremModel, Collator]) -> None:
    model, collator = tiny
    pairs = [
        TrainingExample(item, Item(f"target {i}"), (), QUESTION, ANSWER, z=i % 2 == 0) for i, item in enumerate(ITEMS)
    ]
    pairs.append(TrainingExample(ITEMS[0], None, (), "describe it", "food and drink", z=True))
    packed = collator.examples(pairs)
    assert packed.packed and packed.two_part is not None and packed.padding_share < 0.25
    out = model(packed)
    total = torch.tensor(0.0)
    for number, pair in enumerate(pairs):
        alone = model(
            collator.pad([collator.prepare(pair.query, question=pair.question, answer=pair.answer, z=pair.z)])
        )
        total = total + alone.lm_loss_sum
        if pair.target is not None:
            torch.testing.assert_close(out.embeddings[packed.queries[number]], alone.embeddings[0], atol=1e-5, rtol=0)
            prefix = model(collator.items([pair.query]))  # the embedding does not depend on question or z
            torch.testing.assert_close(prefix.embeddings[0], alone.embeddings[0], atol=1e-5, rtol=0)
            target = model(collator.items([pair.target]))
            torch.testing.assert_close(out.embeddings[packed.targets[number]], target.embeddings[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.lm_loss_sum, total, atol=1e-4, rtol=1e-5)
    assert int(out.answer_tokens) == sum(len(collator.prompts.answer(p.answer or "").input_ids) for p in pairs)


@pytest.mark.parametrize("template_visible", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_two_part_attention_is_the_dense_mask(seed: int, template_visible: bool) -> None:
    """Embeddings, loss and every gradient, for mixed lengths, z and rows without answers; with the blank image too."""
    torch.manual_seed(seed)
    visible = f"model.prompt.template_visible={str(template_visible).lower()}"
    model, collator = build_model(tiny_config("model.prompt.system=Be brief.", visible), texts=TEXTS)
    lively(model)
    draw = random.Random(seed)
    words = ["a", "red", "apple", "what", "is", "this", "green", "square", "animals", "and", "nature"]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 30)))

    pairs = [
        TrainingExample(
            Item(text(), [Image.new("RGB", (64, 64), (9 * i, 3, 7))], image_at=(i % 2,))
            if seed and i % 3
            else Item(text()),
            Item(text()) if i % 4 else None,
            (Item(text()),) if i % 5 == 1 else (),
            text() if i % 2 else None,
            text() if i % 2 else None,
            z=draw.random() < 0.5,
        )
        for i in range(12)
    ]
    batch = collator.examples(pairs, chorus_tokens=2 if seed == 3 else None)
    results = []
    for fast in (True, False):
        model.zero_grad()
        out = model.train()(batch if fast else replace(batch, two_part=None))
        weights = torch.randn(out.embeddings.shape, generator=torch.Generator().manual_seed(1))
        ((out.embeddings * weights).sum() + out.lm_loss_sum).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.embeddings.detach(), out.lm_loss_sum.detach(), gradients))
    (fast_embeddings, fast_loss, fast_gradients), (embeddings, loss, gradients) = results
    torch.testing.assert_close(fast_embeddings, embeddings, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(fast_loss, loss, atol=1e-5, rtol=1e-6)
    assert fast_gradients.keys() == gradients.keys() and len(gradients) > 40
    for name, gradient in gradients.items():
        scale = max(float(gradient.abs().max()), 1.0)
        assert float((fast_gradients[name] - gradient).abs().max()) < 2e-5 * scale, name
    changed = model(replace(batch, z=~batch.z, two_part=None))
    assert abs(float(changed.lm_loss_sum) - float(loss)) > 1e-2, "z decides"


def test_nested_chorus_tokens_are_a_prefix(tiny: tuple[CremModel, Collator]) -> None:
    """The first K' chorus states do not depend on the rest; the embedding is their mean."""
    model, collator = tiny
    batch = collator.items(ITEMS)
    hidden, _ = model.encode(batch)
    whole = hidden[batch.segments == Segment.U].unflatten(0, (-1, 4))
    for count in (1, 2, 3):
        few = collator.items(ITEMS, chorus_tokens=count)
        assert few.chorus_tokens == count and int((few.segments == Segment.U).sum()) == count * len(ITEMS)
        expected = torch.nn.functional.normalize(whole[:, :count].mean(1), dim=-1)
        torch.testing.assert_close(model(few).embeddings, expected, atol=1e-5, rtol=0)


def test_the_vision_tower_sees_each_distinct_image_once(tiny: tuple[CremModel, Collator]) -> None:
    model, collator = tiny
    red, green = (Image.new("RGB", (64, 64), colour) for colour in ("red", "green"))
    items = [Item(images=[red]), Item("two", [green, red]), Item("again", [red.copy()])]
    batch = collator.items(items)
    assert batch.image_index is not None and batch.image_index.tolist() == [0, 1, 0, 0]
    assert batch.pixel_values is not None and batch.image_grid_thw is not None and len(batch.image_grid_thw) == 2
    alone = torch.cat([model(collator.items([item])).embeddings for item in items])
    torch.testing.assert_close(model(batch).embeddings, alone, atol=1e-5, rtol=0)


def test_pool_is_the_normalised_mean_of_the_chorus_states() -> None:
    hidden = torch.randn(2, 5, 3)
    segments = torch.tensor([[2, 3, 3, 4, 5], [0, 2, 3, 3, -1]])
    expected = torch.stack([hidden[0, 1:3].mean(0), hidden[1, 2:4].mean(0)])
    torch.testing.assert_close(pool(hidden, segments, 2), torch.nn.functional.normalize(expected, dim=-1))


def test_positions_are_the_backbones(tiny: tuple[CremModel, Collator]) -> None:
    model, collator = tiny
    batch = collator.pad(sequences(collator, False))
    assert batch.image_grid_thw is not None and batch.image_index is not None
    expected, _ = model.core.model.get_rope_index(
        input_ids=batch.input_ids,
        mm_token_type_ids=(batch.input_ids == model.core.config.image_token_id).int(),
        image_grid_thw=batch.image_grid_thw[batch.image_index],
        attention_mask=(batch.segments >= 0).long(),
    )
    real = (batch.segments >= 0).expand(3, -1, -1)
    assert torch.equal(batch.position_ids[real], expected[real])


def test_fast_vision_is_the_backbones(tiny: tuple[CremModel, Collator]) -> None:
    model, collator = tiny
    sizes = [(80, 40), (64, 64), (80, 40), (16, 150)]
    batch = collator.items([Item(images=[Image.effect_noise(size, 90).convert("RGB")]) for size in sizes])
    visual = model.core.model.visual
    with torch.no_grad():
        ours = visual(batch.pixel_values, grid_thw=batch.image_grid_thw).pooler_output
        stock = Qwen2VLForConditionalGeneration(model.core.config)
        stock.load_state_dict(model.core.state_dict(), strict=True)
        stock.model.visual.config._attn_implementation = "sdpa"
        assert isinstance(stock.model.visual.patch_embed.proj, torch.nn.Conv3d)
        theirs = stock.model.visual(batch.pixel_values, grid_thw=batch.image_grid_thw).pooler_output
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_cache_size_of_the_paper() -> None:
    """Qwen2-VL-2B: 448 KiB for K = 16 in bf16 (method.md §5), computed by the code that reports it."""
    from transformers import DynamicCache

    from crem.model.generation import Context

    cache = DynamicCache()
    for layer in range(28):
        cache.update(
            torch.zeros(1, 2, 20, 128, dtype=torch.bfloat16), torch.zeros(1, 2, 20, 128, dtype=torch.bfloat16), layer
        )
    segments = torch.tensor([[0, 0] + [1] * 2 + [3] * 16])
    context = Context(cache, segments >= 0, segments, torch.tensor([20]))
    assert context.compressed(template_visible=True).item_bytes() == [448 * 1024]
    (memory,) = memories_of(context, "", "bf16")
    assert memory.layout == MemoryLayout("", 28, 2, 16, 128, "bf16")
    assert memory.layout.size_bytes == len(memory.to_bytes()) == 448 * 1024 + 4


def test_plain_transformers_class_loads_a_checkpoint(tiny_model_dir: str) -> None:
    _, info = Qwen2VLForConditionalGeneration.from_pretrained(tiny_model_dir, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
