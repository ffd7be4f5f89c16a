"""The public face: a loaded CREM model that embeds and answers.

    model = crem.load("out/demo/model")
    vectors = model.embed(["a red apple", Path("apple.png")])           # [2, D], unit length
    model.generate([Path("apple.png")], "What is this?")                # from the full context
    model.generate_compressed([Path("apple.png")], "What is this?")     # from K chorus tokens per item

Batch actors, online replicas and notebooks all use this class, which makes their results equal. ``embed`` and
``answer`` have two halves: ``prepare`` (CPU, no model) makes a ``PreparedSequence`` of an item; ``embed_prepared`` and
``answer_prepared`` run the model on sequences. A server or a pipeline calls the halves itself.

An item can be answered about later, without it, from its memory (``crem.model.memory``):

    memories = model.remember([Path("apple.png")])
    model.answer_memories(memories, ["What is this?"])                  # as generate_compressed
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crem.checkpoint import check_chorus_tokens, read_model
from crem.data.collator import Collator
from crem.data.items import as_item
from crem.data.sequence import CutCount, PreparedSequence
from crem.model.answers import Answer
from crem.model.crem import CremModel
from crem.model.encoding import Encoded
from crem.model.forwards import Forwards
from crem.model.generation import Sampling
from crem.model.memory import ChorusMemory, MemoryType

__all__ = ["Answer", "Crem", "Encoded", "load"]

logger = logging.getLogger(__name__)


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


class Crem(Forwards):
    """A loaded model with its tokenizer and image processor.

    ``prepare`` may be called from any thread. Everything else is not thread-safe: one call at a time.
    """

    def __init__(self, model: CremModel, collator: Collator, fingerprint: str, *, chorus_tokens: int | None = None):
        super().__init__(model, collator, fingerprint)
        self.chorus_tokens = check_chorus_tokens(model.config, chorus_tokens)

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
            batch_size: most items of a forward; the result does not depend on it.
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

    def remember(self, items: Sequence[Any], *, dtype: MemoryType = "fp32", batch_size: int = 64) -> list[ChorusMemory]:
        """The memories of items, from which ``answer_memories`` answers without them.

        Args:
            dtype: ``fp32`` gives the answers of ``generate_compressed``; ``bf16`` and ``int8`` are smaller.

        Raises:
            ItemError: the first item that cannot be used. ConfigError: the model has no chorus tokens.
        """
        memories: list[ChorusMemory] = []
        for start in range(0, len(items), batch_size):
            sequences = [self.prepare(item) for item in items[start : start + batch_size]]
            memories += self.encode_prepared(sequences, batch_size=batch_size, memory=dtype).memories or []
        return memories

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

    def _warn_of(self, cuts: CutCount) -> None:
        if (sentence := cuts.sentence("items", self.config.prompt.max_text_tokens)) is not None:
            logger.warning("%s", sentence)

    def _count(self, chorus_tokens: int | None) -> int:
        return self.chorus_tokens if chorus_tokens is None else check_chorus_tokens(self.config, chorus_tokens)
