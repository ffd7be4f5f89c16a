"""The public face: a loaded CREM model that embeds and answers.

    model = crem.load("out/demo/model")
    vectors = model.embed(["a red apple", Path("apple.png")])           # [2, D], unit length
    model.generate([Path("apple.png")], "What is this?")                # from the full context
    model.generate_compressed([Path("apple.png")], "What is this?")     # from K chorus tokens per item

Batch actors, online replicas and notebooks all use this class, which makes their results equal. ``embed`` and
``answer`` have two halves: ``prepare`` (CPU, no model) makes a ``PreparedSequence`` of an item; ``embed_prepared`` and
``answer_prepared`` run the model on sequences. A server or a pipeline calls the halves itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crem.checkpoint import check_chorus_tokens, read_model
from crem.config import ModelConfig
from crem.data.collator import Collator
from crem.data.items import as_item
from crem.data.prompts import Prompt
from crem.data.sequence import CutCount, PreparedSequence
from crem.model.chorus import pool
from crem.model.crem import CremModel
from crem.model.generation import GREEDY, Context, Sampling, decode, prefill

__all__ = ["Answer", "Crem", "batches_by_length", "load"]

logger = logging.getLogger(__name__)


def batches_by_length(lengths: Sequence[int], most: int, most_tokens: int | None) -> Iterator[list[int]]:
    """Places of sequences, the shortest first, in batches of at most so many items and padded tokens."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = len(batch) == most or (most_tokens is not None and (len(batch) + 1) * lengths[place] > most_tokens)
        if batch and full:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    cache_bytes: int
    """keys and values kept of the item after prefill: of its prefix (native) or of its K chorus tokens (compressed)"""


def load(
    path_or_uri: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    chorus_tokens: int | None = None,
) -> Crem:
    """Load a CREM checkpoint from a folder, an fsspec URI (``s3://…``) or a hub name.

    Args:
        device: by default a GPU if there is one, else the CPU.
        dtype: of the weights; by default the checkpoint's. Part of the fingerprint.
        chorus_tokens: how many chorus tokens a nested checkpoint uses, by default K. Part of the fingerprint.

    Raises:
        CheckpointError: missing, damaged, or not a CREM checkpoint. ResourceError: too little memory. ConfigError: the
            model was not trained with that many chorus tokens.
    """
    model = read_model(path_or_uri, device=device, dtype=dtype, chorus_tokens=chorus_tokens)
    return Crem(*model, chorus_tokens=chorus_tokens)


class Crem:
    """A loaded model with its tokenizer and image processor.

    ``prepare`` may be called from any thread. Everything else is not thread-safe: one call at a time.
    """

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

    def prepare(
        self, item: Any, *, instruction: str | None = None, chorus_tokens: int | None = None
    ) -> PreparedSequence:
        """Decode and tokenise one item, ready for ``embed_prepared``, ``answer_prepared`` and ``stream_prepared``.

        Runs on the CPU without the model, and may run on any thread, also while the model computes.

        Args:
            item: ``crem.Item``, or a plain text, image, image bytes or ``Path``.
            instruction: embedding instruction of an item without one.
            chorus_tokens: K' of a nested checkpoint.

        Raises:
            ItemError: the item cannot be used. ConfigError: not trained with that many chorus tokens.
        """
        item = as_item(item)
        if item.instruction is None and instruction is not None:
            item = replace(item, instruction=instruction)
        return self.collator.prepare(item, chorus_tokens=self._count(chorus_tokens) or None)

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
            instruction: embedding instruction of the items without one.
            chorus_tokens: K' of a nested checkpoint for this call; vectors of different K' are not comparable.

        Where texts are cut to the model's limit of tokens, one warning says how many.

        Raises:
            ItemError: the first item that cannot be used. ConfigError: not trained with that many chorus tokens.
        """
        count, cuts = self._count(chorus_tokens), CutCount()
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        window = batch_size * 8  # bounds the memory; sorted by length within
        for start in range(0, len(items), window):
            sequences = [
                self.prepare(item, instruction=instruction, chorus_tokens=count)
                for item in items[start : start + window]
            ]
            out[start : start + window] = self.embed_prepared(sequences, batch_size=batch_size)
            cuts += CutCount.of(sequences)
        self._warn_of(cuts)
        return out

    @torch.inference_mode()
    def embed_prepared(
        self, sequences: Sequence[PreparedSequence], *, batch_size: int = 64, batch_tokens: int | None = None
    ) -> NDArray[np.float32]:
        """Embeddings of prepared sequences, float32 [N, D], each of unit length, in the order given.

        Sequences of similar length share a forward, so that there is little padding among them.

        Args:
            batch_size: most items of a forward.
            batch_tokens: most tokens of a forward, padding included; one item may have more.
        """
        out = np.zeros((len(sequences), self.dim), dtype=np.float32)
        for rows in batches_by_length([sequence.tokens for sequence in sequences], batch_size, batch_tokens):
            batch = self.collator.pad([sequences[i] for i in rows]).to(self.device)
            hidden_BTD, _ = self.model.encode(batch)
            out[rows] = pool(hidden_BTD, batch.segments, batch.chorus_tokens).cpu().numpy()
        return out

    def generate(self, items: Sequence[Any], prompt: str | Sequence[str] | None = None, **options: Any) -> list[str]:
        """Answers from the full context, as the backbone generates them; options as in ``answer``."""
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
            prompt: the generation instruction; by default the checkpoint's.
            temperature: 0 takes the most likely token.
            chorus_tokens: K' of a nested checkpoint for this call.

        Raises:
            ItemError: the first item that cannot be used. ValueError: the numbers of prompts and items differ.
            ConfigError: not trained with that many chorus tokens.
        """
        count = self._count(chorus_tokens)
        prompts = [prompt] * len(items) if prompt is None or isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(items):
            raise ValueError(f"{len(items)} items and {len(prompts)} prompts; give one prompt, or one for each item")
        answers: list[Answer] = []
        cuts = CutCount()
        for start in range(0, len(items), batch_size):
            stop = start + batch_size
            sequences = [self.prepare(item, chorus_tokens=count) for item in items[start:stop]]
            cuts += CutCount.of(sequences)
            answers += self.answer_prepared(
                sequences,
                prompts[start:stop],
                compressed=compressed,
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature, top_p, seed),
            )
        self._warn_of(cuts)
        return answers

    @torch.inference_mode()
    def answer_prepared(
        self,
        sequences: Sequence[PreparedSequence],
        prompts: Sequence[str | None],
        *,
        compressed: bool = False,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> list[Answer]:
        """Answer one prompt about each prepared sequence, all in one batch."""
        questions = [self.collator.prompts.question(p) for p in prompts]
        context = self._context(sequences, compressed)
        sizes = context.item_bytes()
        steps = list(self._decode(context, questions, max_new_tokens, sampling))
        tokens = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in sequences]
        counts = [s.tokens + len(q.input_ids) for s, q in zip(sequences, questions, strict=True)]
        return [self._answer(*row) for row in zip(tokens, counts, sizes, strict=True)]

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
        """A piece of text for every decoded token, "" where it completes no character; last, the ``Answer``.

        Raises:
            ItemError: the item cannot be used.
        """
        return self.stream_prepared(
            self.prepare(item),
            prompt,
            compressed=compressed,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, seed),
        )

    @torch.inference_mode()
    def stream_prepared(
        self,
        sequence: PreparedSequence,
        prompt: str | None = None,
        *,
        compressed: bool = False,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str | Answer]:
        """``stream`` of a prepared sequence. Every step of the iterator runs one forward."""
        question = self.collator.prompts.question(prompt)
        context = self._context([sequence], compressed)
        size = context.item_bytes()[0]
        ids: list[int] = []
        # the text of ids[begin:end] has been yielded; decoding from ``begin`` on keeps the cost of a step constant
        begin = end = 0
        for token_B in self._decode(context, [question], max_new_tokens, sampling):
            ids.append(int(token_B[0]))
            before, now = self._text(ids[begin:end]), self._text(ids[begin:])
            if len(now) > len(before) and not now.endswith("\ufffd"):  # a character may span several tokens
                yield now[len(before) :]
                begin, end = end, len(ids)
            else:
                yield ""
        if len(rest := self._text(ids[begin:])) > len(before := self._text(ids[begin:end])):
            yield rest[len(before) :]
        yield self._answer(ids, sequence.tokens + len(question.input_ids), size)

    def prompt_tokens(self, sequence: PreparedSequence, prompt: str | None = None) -> int:
        """Tokens read to answer ``prompt`` about the sequence."""
        return sequence.tokens + len(self.collator.prompts.question(prompt).input_ids)

    def _warn_of(self, cuts: CutCount) -> None:
        if (sentence := cuts.sentence("items", self.config.prompt.max_text_tokens)) is not None:
            logger.warning("%s", sentence)

    def _context(self, sequences: Sequence[PreparedSequence], compressed: bool) -> Context:
        context = prefill(self.model, self.collator.pad(sequences).to(self.device))
        return context.compressed(template_visible=self.config.prompt.template_visible) if compressed else context

    def _decode(
        self, context: Context, questions: list[Prompt], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[Tensor]:
        stops = self.collator.prompts.stop_ids
        return decode(self.model, context, questions, stop_ids=stops, max_new_tokens=max_new_tokens, sampling=sampling)

    def _answer(self, ids: list[int], prompt_tokens: int, cache_bytes: int) -> Answer:
        end = self._end(ids)
        if end is None:
            return Answer(self._text(ids), prompt_tokens, len(ids), "length", cache_bytes)
        return Answer(self._text(ids), prompt_tokens, end + 1, "stop", cache_bytes)

    def _text(self, ids: list[int]) -> str:
        tokenizer = self.collator.prompts.tokenizer
        text: str = tokenizer.decode(ids[: self._end(ids)], skip_special_tokens=True)
        return text

    def _end(self, ids: list[int]) -> int | None:
        """Place of the first stop token."""
        stops = set(self.collator.prompts.stop_ids)
        return next((i for i, token in enumerate(ids) if token in stops), None)

    def _count(self, chorus_tokens: int | None) -> int:
        return self.chorus_tokens if chorus_tokens is None else check_chorus_tokens(self.config, chorus_tokens)
