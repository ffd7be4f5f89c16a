"""The public face: shorthand, order, batch size, streaming, sampling, errors."""

from __future__ import annotations

import io
import logging
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import crem
from crem import Item
from crem.data.items import TrainingExample
from crem.errors import ItemError
from crem.inference import Answer, Crem
from crem.model.build import build_model
from crem.train.step import train_step
from tests.conftest import TEXTS, tiny_config
from tests.crem.train.runs import PlainEngine, run_config

RED = Image.new("RGB", (64, 64), (255, 0, 0))
NOISE = Image.effect_noise((90, 50), 90).convert("RGB")
ITEMS = [Item("a red apple"), RED, Item("what is this green square?", [NOISE]), "food", Item(images=[RED, NOISE])]


@pytest.fixture(scope="module")
def model(tiny_model_dir: str) -> crem.Crem:
    return crem.load(tiny_model_dir)


@pytest.fixture(scope="module")
def spelling() -> crem.Crem:
    """A tiny model that has learnt two answers, whose characters take several tokens each."""
    config = run_config("optim.lr=2e-2", "train.steps=90", "optim.warmup_steps=5", "loss.compression_probability=1")
    network, collator = build_model(tiny_config(), texts=TEXTS)
    pairs = [TrainingExample(Item(w), None, (), "say it", a, z=True) for w, a in SPELLINGS.items()] * 2
    batch = collator.examples(pairs)
    engine = PlainEngine(network.train(), config)
    losses = [train_step(engine, [batch], config.loss).loss for _ in range(85)]
    assert losses[-1] < 0.1 < losses[0], losses[-1]
    return Crem(network.eval(), collator, "")


SPELLINGS = {"apple": "🍎 naïve 苹果 ✓", "animals": "🦊🦊 ok"}


def test_shorthand(model: crem.Crem, tmp_path: Path) -> None:
    NOISE.save(tmp_path / "noise.png")
    buffer = io.BytesIO()
    NOISE.save(buffer, "PNG")
    path = tmp_path / "noise.png"
    embeddings = model.embed(
        [NOISE, buffer.getvalue(), path, Item(images=[str(path)]), Item(images=[f"file://{path}"])]
    )
    assert np.abs(embeddings - embeddings[0]).max() < 1e-6
    for one in (NOISE, buffer.getvalue(), str(path), path):
        assert Item(images=one) == Item(images=[one]), "one image without the list around it"  # type: ignore[arg-type]
    assert np.abs(np.diff(model.embed(["food", Item("food"), Item(text="food", images=[])]), axis=0)).max() < 1e-6
    assert np.abs(model.embed([str(path)]) - embeddings[:1]).max() > 1e-3, "a plain string is a text, even a path"


def test_embeddings_are_in_order_unit_length_and_independent_of_the_batch(model: crem.Crem) -> None:
    many = ITEMS * 5
    whole = model.embed(many)
    assert whole.shape == (25, model.dim) and whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    for batch_size in (1, 2, 7):
        np.testing.assert_allclose(model.embed(many, batch_size=batch_size), whole, atol=1e-5)
    singles = np.concatenate([model.embed([item]) for item in ITEMS])
    np.testing.assert_allclose(whole, np.tile(singles, (5, 1)), atol=1e-5)
    assert (singles @ singles.T - np.eye(5)).max() < 0.999
    assert model.embed([]).shape == (0, model.dim)


def test_forwards_have_few_tokens_where_nobody_says_how_many(model: crem.Crem) -> None:
    sequences = [model.prepare(Item("a red apple " * 20)) for _ in range(200)]
    for settings, most in (({}, 4096), ({"batch_tokens": 500}, 500)):
        sizes: list[int] = []
        model.embed_prepared(sequences, batch_size=200, before_batch=sizes.append, **settings)
        assert sum(sizes) == 200 and sizes[0] == most // sequences[0].tokens > 1


def test_instructions(model: crem.Crem) -> None:
    own, given, default = Item("food", instruction="Find it."), Item("food"), "Represent."
    np.testing.assert_allclose(model.embed([own]), model.embed([given], instruction="Find it."), atol=1e-6)
    np.testing.assert_allclose(model.embed([given]), model.embed([given], instruction=default), atol=1e-6)
    np.testing.assert_allclose(model.embed([own], instruction="Else."), model.embed([own]), atol=1e-6)
    assert np.abs(model.embed([own]) - model.embed([given])).max() > 1e-3


@pytest.mark.parametrize("compressed", [False, True], ids=["native", "compressed"])
def test_generation_is_independent_of_the_batch(model: crem.Crem, compressed: bool) -> None:
    generate = model.generate_compressed if compressed else model.generate
    whole = generate(ITEMS, "what?", max_new_tokens=8)
    assert whole == generate(ITEMS, "what?", max_new_tokens=8, batch_size=2)
    assert whole == [generate([item], "what?", max_new_tokens=8)[0] for item in ITEMS]
    answers = model.answer(ITEMS, "what?", compressed=compressed, max_new_tokens=8)
    assert [a.text for a in answers] == whole and len(set(whole)) > 1
    assert generate([], "what?") == []


def test_one_prompt_or_one_for_each(model: crem.Crem) -> None:
    prompts = ["what?", "describe it", "animals", "food and drink", "a"]
    one_by_one = [model.generate([i], p, max_new_tokens=8)[0] for i, p in zip(ITEMS, prompts, strict=True)]
    assert model.generate(ITEMS, prompts, max_new_tokens=8) == one_by_one
    assert model.generate(ITEMS, ["a"] * 5, max_new_tokens=8) == model.generate(ITEMS, "a", max_new_tokens=8)
    default = model.config.prompt.generation_instruction
    assert model.generate(ITEMS, max_new_tokens=8) == model.generate(ITEMS, default, max_new_tokens=8)
    with pytest.raises(ValueError, match="5 items and 2 prompts"):
        model.generate(ITEMS, ["a", "b"])


def test_answers_count_tokens_and_bytes(model: crem.Crem) -> None:
    native = model.answer(ITEMS, "what?", max_new_tokens=3)
    compressed = model.answer(ITEMS, "what?", compressed=True, max_new_tokens=3)
    per_token = 2 * 2 * 2 * 12 * 4  # keys and values, layers, heads, width, bytes
    template = len(model.collator.prompts.prefix("x", "", []).input_ids) - 4 - len("x\n")
    for item, n, c in zip(ITEMS, native, compressed, strict=True):
        sequence = model.prepare(item)
        assert n.prompt_tokens == c.prompt_tokens == model.prompt_tokens(sequence, "what?")
        assert c.cache_bytes == 4 * per_token
        assert n.cache_bytes == (sequence.tokens - template) * per_token
        for answer in (n, c):
            assert answer.completion_tokens == 3 if answer.finish_reason == "length" else answer.completion_tokens <= 3
    food = model.prepare("food")
    assert model.prompt_tokens(food, "what?") > food.tokens


def test_texts_that_are_cut_are_counted_in_one_warning(model: crem.Crem, caplog: pytest.LogCaptureFixture) -> None:
    long = "q z x j " * 50
    tokens = len(model.collator.prompts.tokenizer(long).input_ids)
    cut = rf"2 of 9 items lost the end of a text, which is cut to 64 tokens .*; the longest had {tokens}$"
    with caplog.at_level(logging.WARNING, logger="crem.inference"):
        model.embed(["short", RED] * 10, batch_size=2)
        assert not caplog.messages
        model.embed([*["short"] * 7, long, Item(long, [RED])], batch_size=1)
        model.generate([*["short"] * 7, long, Item(long, [RED])], "what?", batch_size=3, max_new_tokens=1)
    assert len(caplog.messages) == 2 and all(re.search(cut, message) for message in caplog.messages)


def test_the_halves_are_the_whole_to_the_last_bit(model: crem.Crem) -> None:
    shell = Crem(SimpleNamespace(config=model.config), model.collator, "")  # type: ignore[arg-type]
    sequences = pickle.loads(pickle.dumps([shell.prepare(item, instruction="Find it.") for item in ITEMS]))
    whole = model.embed(ITEMS, instruction="Find it.", batch_size=2)
    assert np.array_equal(model.embed_prepared(sequences, batch_size=2), whole), "preparing needs no weights"
    assert np.array_equal(model.embed_prepared([]), np.zeros((0, model.dim)))
    plain = [shell.prepare(item) for item in ITEMS]
    for compressed in (False, True):
        answers = model.answer(ITEMS, "what?", compressed=compressed, max_new_tokens=5)
        prompts = ["what?"] * len(ITEMS)
        assert model.answer_prepared(plain, prompts, compressed=compressed, max_new_tokens=5) == answers
        *_, last = model.stream_prepared(plain[2], "what?", compressed=compressed, max_new_tokens=5)
        assert last == answers[2]


def streamed(model: crem.Crem, *args: object, **options: object) -> tuple[list[str], Answer]:
    *pieces, last = model.stream(*args, **options)  # type: ignore[arg-type]
    assert isinstance(last, Answer) and all(isinstance(piece, str) for piece in pieces)
    assert last.completion_tokens <= len(pieces) <= last.completion_tokens + 1, "a piece for every token"
    return pieces, last  # type: ignore[return-value]


@pytest.mark.parametrize("compressed", [False, True], ids=["native", "compressed"])
def test_streamed_pieces_are_the_answer(model: crem.Crem, compressed: bool) -> None:
    answers = model.answer(ITEMS, "what?", compressed=compressed, max_new_tokens=12)
    for item, answer in zip(ITEMS, answers, strict=True):
        pieces, last = streamed(model, item, "what?", compressed=compressed, max_new_tokens=12)
        assert last == answer and "".join(pieces) == answer.text
    for seed in range(20):  # random bytes: broken characters of all kinds
        pieces, last = streamed(model, RED, "what?", compressed=compressed, temperature=5.0, seed=seed)
        assert "".join(pieces) == last.text


@pytest.mark.parametrize("word", SPELLINGS)
def test_characters_of_several_tokens_are_streamed_whole(spelling: crem.Crem, word: str) -> None:
    pieces, last = streamed(spelling, word, "say it", compressed=True)
    assert last.text == "".join(pieces) == SPELLINGS[word] and last.finish_reason == "stop"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "" in pieces, "several tokens make one character"
    pieces, cut = streamed(spelling, word, "say it", compressed=True, max_new_tokens=2)
    assert (cut.finish_reason, cut.completion_tokens, "".join(pieces)) == ("length", 2, cut.text)


def test_the_end_mark_ends_an_answer_in_a_batch(spelling: crem.Crem) -> None:
    answers = spelling.answer(list(SPELLINGS), "say it", compressed=True, max_new_tokens=60)
    assert [a.text for a in answers] == list(SPELLINGS.values())
    tokens = [len(spelling.collator.prompts.answer(text).input_ids) for text in SPELLINGS.values()]
    assert [a.completion_tokens for a in answers] == tokens and {a.finish_reason for a in answers} == {"stop"}


def test_sampling(model: crem.Crem) -> None:
    def sampled(seed: int | None, **options: float) -> list[str]:
        return model.generate(ITEMS, "what?", max_new_tokens=8, temperature=2.0, seed=seed, **options)

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4) and sampled(None) != sampled(None)
    greedy = model.generate(ITEMS, "what?", max_new_tokens=8)
    assert sampled(3, top_p=1e-6) == greedy, "the likeliest token alone is left"
    assert sampled(3) != greedy
    *_, last = model.stream(RED, "what?", temperature=2.0, seed=3, max_new_tokens=8)
    assert last == model.answer([RED], "what?", temperature=2.0, seed=3, max_new_tokens=8)[0]


def test_bad_items(model: crem.Crem, tmp_path: Path) -> None:
    for item, reason in [
        ("", "empty_item"),
        (Item(), "empty_item"),
        (b"not an image", "image_corrupt"),
        (tmp_path / "none.png", "image_missing"),
        (Item(images=["http://host/a.png"]), "uri_refused"),
        (3, "bad_item"),
        (Item("x", [RED] * 17), "too_many_images"),
    ]:
        for call in (
            lambda i: model.prepare(i),
            lambda i: model.embed(["fine", i]),
            lambda i: model.generate(["fine", i], "what?"),
            lambda i: next(model.stream(i, "what?")),
        ):
            with pytest.raises(ItemError) as error:
                call(item)
            assert error.value.reason == reason
    model.prepare("fine")
