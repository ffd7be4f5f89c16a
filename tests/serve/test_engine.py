"""One replica's work on a tiny real model, without Ray."""

from __future__ import annotations

import io
import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import crem
from crem.config import ImageConfig
from crem.data.images import load_image
from crem.errors import ItemError
from serve.engine import Embedded, Engine, GenerationRequest, StopCutter


@pytest.fixture(scope="module")
def model(tiny_model_dir: str) -> crem.Crem:
    return crem.load(tiny_model_dir)


@pytest.fixture(scope="module")
def engine(model: crem.Crem) -> Engine:
    return Engine(model)


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(out, "PNG")
    return out.getvalue()


def test_a_bad_item_fails_alone(model: crem.Crem, engine: Engine) -> None:
    good = [crem.Item(text="a red apple"), crem.Item(images=[png("red")]), crem.Item(text="food and drink")]
    bad = [crem.Item(images=[b"no image"]), crem.Item(text="")]
    results = engine.embed([good[0], bad[0], good[1], bad[1], good[2]])
    assert [r.reason for r in results if isinstance(r, ItemError)] == ["image_corrupt", "empty_item"]
    assert isinstance(results[1], ItemError)
    assert isinstance(results[3], ItemError)
    vectors = np.stack([r.vector for r in results if isinstance(r, Embedded)])
    np.testing.assert_allclose(vectors, model.embed(good), atol=1e-5)


def test_a_cut_text_is_logged_once(model: crem.Crem, caplog: pytest.LogCaptureFixture) -> None:
    engine, long = Engine(model), crem.Item(text="q z x j " * 50)
    with caplog.at_level(logging.WARNING, logger="serve.engine"):
        engine.embed([crem.Item(text="short")])
        assert not caplog.messages
        for _ in range(2):
            engine.embed([long])
            next(engine.generate(GenerationRequest(long, "what?")))
    assert len(caplog.messages) == 1 and "lost the end of a text, which is cut to 64 tokens" in caplog.text


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The images that are decoded, one entry each time."""
    seen: list[object] = []

    def counted(source: object, limits: ImageConfig) -> Image.Image:
        seen.append(source)
        return load_image(source, limits)  # type: ignore[arg-type]

    monkeypatch.setattr("crem.data.collator.load_image", counted)
    return seen


def test_neighbours_of_bad_items_share_one_forward(
    model: crem.Crem, engine: Engine, decodes: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [png("red"), png("green"), png("blue")]
    items = [crem.Item(images=[image]) for image in (images[0], b"no image", images[1], b"", images[2])]
    forwards: list[int] = []
    encode = model.model.encode
    monkeypatch.setattr(model.model, "encode", lambda batch: forwards.append(len(batch.z)) or encode(batch))
    results = engine.embed(items)
    assert forwards == [3]
    assert [decodes.count(image) for image in images] == [1, 1, 1] and len(decodes) == 5
    vectors = np.stack([r.vector for r in results if isinstance(r, Embedded)])
    assert np.array_equal(vectors, model.embed([items[0], items[2], items[4]]))
    assert [isinstance(r, ItemError) for r in results] == [False, True, False, True, False]
    assert all(isinstance(r, ItemError) for r in engine.embed([items[1], items[3]]))


def test_a_request_decodes_each_image_once(engine: Engine, decodes: list[object]) -> None:
    images = [png("red"), png("green")]
    request = GenerationRequest(crem.Item(images=images), "describe it", max_new_tokens=24, temperature=1.0, seed=3)
    text = "".join(delta.text for delta in engine.generate(request))
    assert decodes == images
    stopped = list(engine.generate(replace(request, stop=(text[2:4],))))  # needs the count of tokens, too
    assert stopped[-1].ending is not None and stopped[-1].ending.prompt_tokens > 0
    assert decodes == images * 2


def test_a_failing_forward_fails_the_items_in_it(
    model: crem.Crem, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.model, "encode", lambda batch: 1 / 0)
    results = engine.embed([crem.Item(text="a"), crem.Item(text=""), crem.Item(text="b")])
    assert [type(r) for r in results] == [ZeroDivisionError, ItemError, ZeroDivisionError]


def test_embedding_counts_tokens(model: crem.Crem, engine: Engine) -> None:
    (result,) = engine.embed([crem.Item(images=[png("red")])])
    assert isinstance(result, Embedded)
    assert result.tokens == model.prepare(crem.Item(images=[png("red")])).tokens
    assert result.tokens > model.config.chorus_tokens


@pytest.mark.parametrize("compressed", [False, True])
def test_the_deltas_are_the_librarys_answer(model: crem.Crem, engine: Engine, compressed: bool) -> None:
    item, prompt = crem.Item(images=[png("green")]), "what is this?"
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}
    (answer,) = model.answer([item], prompt, compressed=compressed, **sampling)
    deltas = list(engine.generate(GenerationRequest(item, prompt, compressed, **sampling)))
    assert answer.text
    ending = deltas[-1].ending
    assert "".join(d.text for d in deltas) == answer.text
    assert ending is not None
    assert (ending.finish_reason, ending.completion_tokens) == (answer.finish_reason, answer.completion_tokens)
    assert ending.prompt_tokens == answer.prompt_tokens
    assert all(d.ending is None for d in deltas[:-1])


def test_answers_side_by_side_do_not_touch_each_other(model: crem.Crem, engine: Engine) -> None:
    texts = ["a red apple", "animals and nature", "a green square"]
    requests = [
        GenerationRequest(crem.Item(text=t), "describe it", i == 1, max_new_tokens=16, temperature=1.0, seed=i)
        for i, t in enumerate(texts)
    ]
    alone = ["".join(d.text for d in engine.generate(r)) for r in requests]
    running = [engine.generate(r) for r in requests]
    together = ["", "", ""]
    for _ in range(40):
        for i, steps in enumerate(running):
            if (delta := next(steps, None)) is not None:
                together[i] += delta.text
        engine.embed([crem.Item(text="in between")])
    assert together == alone
    assert all(alone)


def test_a_stop_string_cuts_and_ends_the_answer(model: crem.Crem, engine: Engine) -> None:
    item, prompt = crem.Item(text="a red apple"), "describe it"
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}
    (whole,) = model.generate([item], prompt, **sampling)
    stop = whole[len(whole) // 2 :][:3]
    assert stop
    deltas = list(engine.generate(GenerationRequest(item, prompt, **sampling, stop=(stop,))))
    assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].ending is not None
    assert deltas[-1].ending.finish_reason == "stop"
    assert deltas[-1].ending.completion_tokens < 24


def test_a_bad_item_raises_from_the_first_step(engine: Engine) -> None:
    with pytest.raises(ItemError, match="image_corrupt"):
        next(engine.generate(GenerationRequest(crem.Item(images=[b"no image"]), "what?")))


@pytest.mark.parametrize(
    ("stops", "pieces", "sent", "stopped"),
    [
        (("END",), ["abEN", "Dcd"], ["ab", ""], True),
        (("END",), ["abE", "Ncd"], ["ab", "ENcd"], False),
        (("b", "ab"), ["xab"], ["x"], True),
        (("aab",), ["aa", "ab"], ["", "a"], True),
        ((), ["ab", ""], ["ab", ""], False),
    ],
)
def test_stop_cutter(stops: tuple[str, ...], pieces: list[str], sent: list[str], stopped: bool) -> None:
    cutter = StopCutter(stops)
    assert [cutter.push(piece) for piece in pieces] == sent
    assert cutter.stopped == stopped


def test_stop_cutter_gives_back_what_did_not_become_a_stop() -> None:
    cutter = StopCutter(["END"])
    assert cutter.push("abEN") == "ab"
    assert cutter.flush() == "EN"
