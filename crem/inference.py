"""The public face: a loaded CREM model that embeds and answers.

    model = crem.load("out/demo/model")
    vectors = model.embed(["a red apple", Path("apple.png")])           # [2, D], unit length
    model.generate([Path("apple.png")], "What is this?")                # from the full context
    model.generate_compressed([Path("apple.png")], "What is this?")     # from K chorus tokens per item

Batch actors, online replicas and notebooks all go through this class, which is what makes their results equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crem.checkpoint import check_chorus_tokens, read_model
from crem.config import ModelConfig
from crem.data.collator import Collator, PreparedSequence
from crem.data.items import as_item
from crem.data.prompts import Prompt
from crem.model.chorus import pool
from crem.model.crem import CremModel
from crem.model.generation import Sampling, decode, prefill

__all__ = ["Answer", "Crem", "load"]


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    cache_bytes: int
    """keys and values kept of the item after prefill: whole prefix (native) or K chorus tokens (compressed)"""


def load(
    path_or_uri: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    chorus_tokens: int | None = None,
) -> Crem:
    """Load a CREM checkpoint from a folder, an fsspec URI (``s3://…``) or a hub name.

    Args:
        device: a GPU if there is one, else the CPU.
        dtype: of the weights; the checkpoint's own by default. It is part of the fingerprint.
        chorus_tokens: how many chorus tokens a nested checkpoint uses, K by default. Part of the fingerprint.

    Raises:
        CheckpointError: missing, damaged, or not a CREM checkpoint. ResourceError: too little memory. ConfigError: the
            model was not trained with so many chorus tokens.
    """
    model = read_model(path_or_uri, device=device, dtype=dtype, chorus_tokens=chorus_tokens)
    return Crem(*model, chorus_tokens=chorus_tokens)


class Crem:
    """A loaded model with its tokenizer and processor. Not thread-safe: one call at a time."""

    def __init__(self, model: CremModel, collator: Collator, fingerprint: str, *, chorus_tokens: int | None = None):
        self.model = model
        self.collator = collator
        self.fingerprint = fingerprint
        self.chorus_tokens = check_chorus_tokens(model.config, chorus_tokens)

    @property
    def config(self) -> ModelConfig:
        """Settings of the checkpoint."""
        return self.model.config

    @property
    def dim(self) -> int:
        """Length D of an embedding."""
        return int(self.model.core.config.text_config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def check(self, item: Any) -> None:
        """Raise the ``ItemError`` that embedding or asking about this item would raise, without running the model."""
        self.collator.sequence(as_item(item))

    def count_tokens(self, item: Any, prompt: str | None = None) -> int:
        """Tokens of the item's prompt, vision and chorus tokens included, and of ``prompt`` where one is given."""
        count = self.chorus_tokens or None
        return len(self.collator.sequence(as_item(item), question=prompt, chorus_tokens=count).prompt.input_ids)

    @torch.inference_mode()
    def embed(
        self,
        items: Sequence[Any],
        *,
        batch_size: int = 64,
        instruction: str | None = None,
        chorus_tokens: int | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings of items, float32 [N, D], each of unit length, in the order given.

        Args:
            items: ``crem.Item``, or a plain text, image, image bytes or ``Path``.
            batch_size: items per forward; the result does not depend on it.
            instruction: embedding instruction of the items that bring none.
            chorus_tokens: K' of a nested checkpoint for this call; vectors of different K' do not compare.

        Raises:
            ItemError: the first item that cannot be used. ConfigError: not trained with so many chorus tokens.
        """
        count = self._count(chorus_tokens)
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        window = batch_size * 8  # sorted by length within a window: little padding, bounded memory
        for start in range(0, len(items), window):
            sequences = [self._sequence(item, count, instruction) for item in items[start : start + window]]
            order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].prompt.input_ids))
            for at in range(0, len(order), batch_size):
                rows = order[at : at + batch_size]
                batch = self.collator.pad([sequences[i] for i in rows]).to(self.device)
                hidden_BTD, _ = self.model.encode(batch)
                embeddings_BD = pool(hidden_BTD, batch.segments, batch.chorus_tokens)
                out[[start + i for i in rows]] = embeddings_BD.cpu().numpy()
        return out

    def generate(self, items: Sequence[Any], prompt: str | Sequence[str] | None = None, **options: Any) -> list[str]:
        """Answers from the full context, as the backbone gives them; options as in ``answer``."""
        return [a.text for a in self.answer(items, prompt, compressed=False, **options)]

    def generate_compressed(
        self, items: Sequence[Any], prompt: str | Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """Answers from the K chorus tokens of each item alone; options as in ``answer``."""
        return [a.text for a in self.answer(items, prompt, compressed=True, **options)]

    def answer(
        self,
        items: Sequence[Any],
        prompt: str | Sequence[str] | None = None,
        *,
        compressed: bool = False,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        batch_size: int = 32,
        chorus_tokens: int | None = None,
    ) -> list[Answer]:
        """Answer one prompt about every item, or one prompt each, with token counts and cache sizes.

        Args:
            prompt: the generation instruction; the checkpoint's own where None.
            temperature: 0 takes the most likely token.
            chorus_tokens: K' of a nested checkpoint for this call.

        Raises:
            ItemError: the first item that cannot be used. ValueError: as many prompts as items are needed.
            ConfigError: not trained with so many chorus tokens.
        """
        count = self._count(chorus_tokens)
        prompts = [prompt] * len(items) if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(items):
            raise ValueError(f"{len(items)} items and {len(prompts)} prompts; give one prompt, or one for each item")
        sampling = Sampling(temperature, top_p, seed)
        answers: list[Answer] = []
        for start in range(0, len(items), batch_size):
            sequences = [self._sequence(item, count) for item in items[start : start + batch_size]]
            questions = [self.collator.prompts.question(p) for p in prompts[start : start + batch_size]]
            tokens, sizes = self._decode(sequences, questions, compressed, max_new_tokens, sampling)
            for row, (sequence, question) in enumerate(zip(sequences, questions, strict=True)):
                used = len(sequence.prompt.input_ids) + len(question.input_ids)
                answers.append(self._answer(tokens[row], used, sizes[row]))
        return answers

    @torch.inference_mode()
    def stream(
        self,
        item: Any,
        prompt: str | None = None,
        *,
        compressed: bool = False,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str | Answer]:
        """A piece of text for every decoded token, "" where it completes no character; last, the whole ``Answer``."""
        sequence, question = self._sequence(item, self.chorus_tokens), self.collator.prompts.question(prompt)
        context = prefill(self.model, self.collator.pad([sequence]).to(self.device))
        if compressed:
            context = context.compressed(template_visible=self.config.prompt.template_visible)
        size = context.item_bytes()[0]
        steps = decode(
            self.model,
            context,
            [question],
            stop_ids=self.collator.prompts.stop_ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, seed),
        )
        ids: list[int] = []
        begin = said = 0  # text of ids[begin:said] has been yielded; decoding from ``begin`` keeps the cost constant
        for token_B in steps:
            ids.append(int(token_B[0]))
            before, now = self._text(ids[begin:said]), self._text(ids[begin:])
            if len(now) > len(before) and not now.endswith("\ufffd"):  # a character may span several tokens
                yield now[len(before) :]
                begin, said = said, len(ids)
            else:
                yield ""
        if len(rest := self._text(ids[begin:])) > len(before := self._text(ids[begin:said])):
            yield rest[len(before) :]
        yield self._answer(ids, len(sequence.prompt.input_ids) + len(question.input_ids), size)

    @torch.inference_mode()
    def _decode(
        self,
        sequences: list[PreparedSequence],
        questions: list[Prompt],
        compressed: bool,
        max_new_tokens: int,
        sampling: Sampling,
    ) -> tuple[list[list[int]], list[int]]:
        """Token ids and cache bytes of each sequence."""
        context = prefill(self.model, self.collator.pad(sequences).to(self.device))
        if compressed:
            context = context.compressed(template_visible=self.config.prompt.template_visible)
        sizes = context.item_bytes()
        steps = list(
            decode(
                self.model,
                context,
                questions,
                stop_ids=self.collator.prompts.stop_ids,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
            )
        )
        return torch.stack(steps, dim=1).tolist() if steps else [[] for _ in sequences], sizes

    def _answer(self, ids: list[int], prompt_tokens: int, cache_bytes: int) -> Answer:
        stops = set(self.collator.prompts.stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), None)
        completion = len(ids) if end is None else end + 1
        return Answer(self._text(ids), prompt_tokens, completion, "length" if end is None else "stop", cache_bytes)

    def _text(self, ids: list[int]) -> str:
        stops = set(self.collator.prompts.stop_ids)
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        text: str = self.collator.prompts.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text

    def _count(self, chorus_tokens: int | None) -> int:
        return self.chorus_tokens if chorus_tokens is None else check_chorus_tokens(self.config, chorus_tokens)

    def _sequence(self, item: Any, chorus_tokens: int, instruction: str | None = None) -> PreparedSequence:
        item = as_item(item)
        if item.instruction is None and instruction is not None:
            item = replace(item, instruction=instruction)
        return self.collator.sequence(item, chorus_tokens=chorus_tokens or None)
