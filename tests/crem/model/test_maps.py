"""Attention maps: the recomputed weights are the model's own, and the two numbers have their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import crem
from crem.data.items import as_item
from crem.data.prompts import Segment
from crem.model.maps import chorus_attention, coverage, image_maps, overlap


def _batch(model: crem.Crem, *items: object):
    return model.collator.pad([model.collator.prepare(as_item(item)) for item in items])


def _image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8))


def test_weights_are_those_of_eager_attention(tiny_model_dir: str) -> None:
    """Two items of different length, one of them padded; transformers' eager attention is the oracle."""
    from crem.model.backbone import _attend_by

    model = crem.load(tiny_model_dir)
    batch = _batch(model, _image(1), crem.Item(text="a red apple on a table", images=(_image(2),)))
    assert (batch.segments == Segment.PAD).any()
    before = model.model.encode(batch)[0]
    ours = chorus_attention(model.model, batch)
    assert ours.shape == (2, 2, 4, model.chorus_tokens, batch.input_ids.shape[1])
    assert torch.allclose(ours.sum(-1), torch.ones(()), atol=1e-6)
    assert torch.equal(model.model.encode(batch)[0], before), "the model attends as before"

    eager: list[torch.Tensor] = []
    _attend_by(model.model.core.model.language_model, "eager")
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, out: eager.append(out[1]))
        for layer in model.model.core.model.language_model.layers
    ]
    length = batch.input_ids.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)[None, None].expand(2, 1, -1, -1)
    with torch.inference_mode():
        model.model.core.model(
            input_ids=batch.input_ids,
            attention_mask={"full_attention": causal},
            position_ids=batch.position_ids,
            mm_encoder_outputs=_features(model, batch),
            use_cache=False,
        )
    for hook in hooks:
        hook.remove()
    is_chorus = batch.segments == Segment.U
    for layer, weights in enumerate(eager):
        theirs = torch.stack([w[:, rows] for w, rows in zip(weights, is_chorus, strict=True)])
        assert torch.allclose(ours[:, layer], theirs, atol=1e-5), layer


def _features(model: crem.Crem, batch):
    from crem.model.backbone import image_features

    return image_features(model.model.core, batch.pixel_values, batch.image_grid_thw, batch.image_index)


def test_a_map_is_over_the_vision_tokens_of_its_image(tiny_model_dir: str) -> None:
    model = crem.load(tiny_model_dir)
    batch = _batch(model, _image(1), crem.Item(text="a red apple", images=(_image(2),)))
    attention = chorus_attention(model.model, batch)
    made = image_maps(model.model, batch, attention)
    for row, (maps, share) in enumerate(made):
        assert maps.shape == (4, 16) and torch.allclose(maps.sum(1), torch.ones(()), atol=1e-6)
        marks = (batch.segments[row] == Segment.V) & (batch.input_ids[row] != model.model.core.config.image_token_id)
        whole = attention[row, ..., (batch.segments[row] == Segment.V)].sum(-1).mean()
        assert share == pytest.approx(float(whole - attention[row, ..., marks].sum(-1).mean()), abs=1e-6)
    last = image_maps(model.model, batch, attention, layers=[1])[0].maps_Kn
    alone = attention[0, 1].mean(0)[:, batch.input_ids[0] == model.model.core.config.image_token_id]
    assert torch.allclose(last, alone / alone.sum(1, keepdim=True), atol=1e-6)


def test_maps_at_a_smaller_chorus_count(tiny_model_dir: str) -> None:
    model = crem.load(tiny_model_dir)
    batch = model.collator.pad([model.collator.prepare(as_item(_image(1)), chorus_tokens=2)])
    assert chorus_attention(model.model, batch).shape[3] == 2


def test_closed_forms() -> None:
    even = torch.full((3, 8), 1 / 8)
    assert coverage(even) == pytest.approx(1) and overlap(even) == pytest.approx(1)
    same = torch.zeros(3, 8)
    same[:, 5] = 1
    assert coverage(same) == pytest.approx(1 / 8) and overlap(same) == pytest.approx(1)
    apart = torch.eye(8)[:3]
    assert coverage(apart) == pytest.approx(3 / 8) and overlap(apart) == pytest.approx(0)
    whole = torch.eye(8)
    assert coverage(whole) == pytest.approx(1) and overlap(whole) == pytest.approx(0), "spread and complementary"
    half = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert overlap(half) == pytest.approx(0.5)
    assert coverage(half) == pytest.approx(math.exp(0.5 * math.log(4) + 0.5 * math.log(2)) / 3)
    assert overlap(even[:1]) is None
