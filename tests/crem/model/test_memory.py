"""Memories: answers from them are those of the images, bytes come back as they were, other models are refused."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import crem
from crem import Item
from crem.checkpoint import save_model
from crem.errors import CheckpointError, ConfigError
from crem.inference import Answer, Crem
from crem.model.build import build_model
from crem.model.generation import Sampling, prefill
from crem.model.memory import ChorusMemory, MemoryLayout
from crem.model.recall import recalled
from tests.conftest import TEXTS, lively, tiny_config

RED = Image.new("RGB", (64, 64), (255, 0, 0))
NOISE = Image.effect_noise((90, 50), 90).convert("RGB")
ITEMS = [
    Item("a red apple"),
    Item(images=[RED]),
    Item("what is this green square?", [NOISE]),
    Item.of_parts(["what is ", RED, " beside ", NOISE]),
    Item("food", instruction="Find it."),
]
PROMPTS = ["what?", "describe it", None, "animals", "food and drink"]


@pytest.fixture(scope="module", params=[True, False], ids=["template", "no-template"])
def model(request: pytest.FixtureRequest) -> Crem:
    config = tiny_config(f"model.prompt.template_visible={request.param}".lower(), "model.prompt.system='Be brief.'")
    network, collator = build_model(config, texts=TEXTS)
    lively(network)
    return Crem(network.eval(), collator, "f" * 16)


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_answers_from_memories_are_those_from_the_items(model: Crem) -> None:
    memories = pickle.loads(pickle.dumps(model.remember(ITEMS, batch_size=2)))
    expected = [model.generate_compressed([i], p, max_new_tokens=8)[0] for i, p in zip(ITEMS, PROMPTS, strict=True)]
    assert texts(model.answer_memories(memories, PROMPTS, max_new_tokens=8)) == expected and len(set(expected)) > 2
    assert texts(model.answer_memories(memories, PROMPTS, max_new_tokens=8, batch_size=2)) == expected
    *pieces, last = model.stream_memory(memories[3], PROMPTS[3], max_new_tokens=8)
    assert isinstance(last, Answer) and "".join(map(str, pieces)) == last.text == expected[3]
    sampling = Sampling(temperature=2.0, seed=3)
    sampled = model.answer_memories(memories, PROMPTS, max_new_tokens=8, sampling=sampling)
    sequences = [model.prepare(item) for item in ITEMS]
    own = model.answer_prepared(sequences, PROMPTS, compressed=True, max_new_tokens=8, sampling=sampling)
    assert texts(sampled) == texts(own) != expected
    assert [a.cache_bytes for a in sampled] == [a.cache_bytes for a in own] == [4 * 2 * 2 * 2 * 12 * 4] * 5
    template = len(model.collator.prompts.prefix("x", "", []).input_ids) - 4 - len("x\n")
    question = len(model.collator.prompts.question("what?").input_ids)
    assert sampled[0].prompt_tokens == 4 + question + template * model.config.prompt.template_visible
    assert model.answer_memories([], []) == []


def test_a_recalled_context_is_the_compressed_one(model: Crem) -> None:
    visible = model.config.prompt.template_visible
    made = prefill(model.model, model.collator.items(ITEMS)).compressed(template_visible=visible)
    back = recalled(model.remember(ITEMS), model._template, like=model.model.core.lm_head.weight)
    for name in ("visible_BC", "segments_BC", "next_position_B"):
        assert torch.equal(getattr(made, name), getattr(back, name)), name
    assert len(made.cache.layers) == len(back.cache.layers) == 2
    for one, other in zip(made.cache.layers, back.cache.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-6, rtol=0)
        torch.testing.assert_close(one.values, other.values, atol=1e-6, rtol=0)


def test_stored_types_round_as_numpy_does(model: Crem) -> None:
    full, half, small = (model.remember(ITEMS[:2], dtype=dtype) for dtype in ("fp32", "bf16", "int8"))  # type: ignore[arg-type]
    for whole, rounded, eighth in zip(full, half, small, strict=True):
        exact = whole.keys_and_values()
        assert exact.shape == (2, 2, 2, 4, 12) and exact.dtype == np.float32
        bits = exact.view(np.uint32)
        nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)  # round to nearest, ties to even
        assert np.array_equal(rounded.keys_and_values(), nearest) and not np.array_equal(nearest, exact)
        keys, values = exact[:, 0], exact[:, 1]
        steps = np.stack(
            [
                np.broadcast_to(np.float16(np.abs(keys).max(2, keepdims=True) / 127).astype(np.float32), keys.shape),
                np.broadcast_to(np.float16(np.abs(values).max(3, keepdims=True) / 127).astype(np.float32), keys.shape),
            ],
            axis=1,
        )
        whole_steps = np.clip(np.rint(exact / steps), -127, 127)
        np.testing.assert_allclose(eighth.keys_and_values(), whole_steps * steps, rtol=1e-6)
        numbers = 2 * 2 * 2 * 4 * 12
        sizes = [len(memory.to_bytes()) for memory in (whole, rounded, eighth)]
        assert sizes == [4 + 4 * numbers, 4 + 2 * numbers, 4 + numbers + 2 * (2 * 2 * 12 + 2 * 2 * 4)]
        for memory in (whole, rounded, eighth):
            layout = MemoryLayout.of(memory.layout.metadata())
            back = ChorusMemory.from_bytes(layout, memory.to_bytes())
            assert layout == memory.layout and layout.size_bytes == len(memory.to_bytes())
            assert (back.next_position, back.data) == (whole.next_position, memory.data)
    assert json.loads(full[0].layout.metadata()[b"crem_memory"]) == asdict(full[0].layout)
    with pytest.raises(CheckpointError, match=r"a memory of 7 bytes, and one of MemoryLayout\(.*has \d+"):
        ChorusMemory.from_bytes(full[0].layout, b"1234567")
    with pytest.raises(ConfigError, match="the table has no memories"):
        MemoryLayout.of(None)


def test_states_and_vectors_of_one_forward(model: Crem) -> None:
    sequences = [model.prepare(item) for item in ITEMS]
    made = model.encode_prepared(sequences, batch_size=2, states=True, memory="fp32")
    assert np.array_equal(made.vectors, model.embed_prepared(sequences, batch_size=2))
    assert made.states is not None and made.states.dtype == np.float16 and made.memories is not None
    for sequence, states, vector in zip(sequences, made.states, made.vectors, strict=True):
        batch = model.collator.pad([sequence])
        with torch.no_grad():
            hidden = model.model.encode(batch)[0][0, -4:].float().numpy()  # the chorus tokens are the last
        np.testing.assert_allclose(states, hidden / np.linalg.norm(hidden, axis=1, keepdims=True), atol=1e-3)
        mean = hidden.mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    plain = model.encode_prepared(sequences)
    assert plain.states is None and plain.memories is None
    empty = model.encode_prepared([], states=True, memory="int8")
    assert empty.memories == [] and empty.states is not None and len(empty.states) == 0


def test_what_cannot_be_answered_is_refused(model: Crem) -> None:
    memories = model.remember(ITEMS[:2])
    other = replace(memories[1], layout=replace(memories[1].layout, fingerprint="e" * 16))
    with pytest.raises(CheckpointError, match=f"a memory is of model {'e' * 16}, and this model is {'f' * 16}"):
        model.answer_memories([memories[0], other], ["a", "b"])
    for prompts in (["a"], "ab"):
        with pytest.raises(ValueError, match="2 memories and prompts"):
            model.answer_memories(memories, prompts)
    baseline, collator = build_model(tiny_config("model.chorus_tokens=0"), texts=TEXTS)
    with pytest.raises(ConfigError, match="has no chorus tokens"):
        Crem(baseline.eval(), collator, "").remember(ITEMS[:1])


def test_a_smaller_count_of_a_nested_model_remembers_less(tmp_path: object) -> None:
    network, collator = build_model(tiny_config("model.nested_chorus=[2,4]"), texts=TEXTS)
    lively(network)
    save_model(network, collator, f"{tmp_path}/model")
    two, four = crem.load(f"{tmp_path}/model", chorus_tokens=2), crem.load(f"{tmp_path}/model")
    memories = two.remember(ITEMS)
    assert memories[0].layout.chorus_tokens == 2 and memories[0].layout.fingerprint == two.fingerprint
    answers = texts(two.answer_memories(memories, ["what?"] * 5, max_new_tokens=6))
    assert answers == two.generate_compressed(ITEMS, "what?", max_new_tokens=6)
    with pytest.raises(CheckpointError, match="at the same number of chorus tokens"):
        four.answer_memories(memories, ["what?"] * 5)
