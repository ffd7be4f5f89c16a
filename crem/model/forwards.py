"""The half of ``crem.Crem`` that runs the model: prepared sequences and memories become vectors and answers.

Nothing here decodes or tokenises an item; a server or a pipeline does that elsewhere and calls these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from crem.config import ModelConfig
from crem.data.collator import Collator
from crem.data.items import Item
from crem.data.prompts import Segment
from crem.data.sequence import PreparedSequence
from crem.model.answers import Answer, Answering
from crem.model.crem import CremModel
from crem.model.encoding import Encoded, encode
from crem.model.generation import GREEDY, Context, Sampling, prefill
from crem.model.memory import ChorusMemory, MemoryType
from crem.model.recall import recalled, require_own

__all__ = ["Forwards"]


class Forwards:
    """A loaded model and the collator that prepares its sequences. Not thread-safe: one call at a time."""

    def __init__(self, model: CremModel, collator: Collator, fingerprint: str):
        self.model = model
        self.collator = collator
        self.fingerprint = fingerprint

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

    @torch.inference_mode()
    def embed_prepared(
        self,
        sequences: Sequence[PreparedSequence],
        *,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        before_batch: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings of prepared sequences, float32 [N, D], each of unit length, in the order given.

        Sequences of similar length share a forward, so that there is little padding among them.

        Args:
            batch_size: most items of a forward.
            batch_tokens: most tokens of a forward, padding included; one item may have more. By default 4,096 on a
                CPU and 16,384 on a GPU.
            before_batch: called before every forward with the number of its items.
        """
        return self.encode_prepared(
            sequences, batch_size=batch_size, batch_tokens=batch_tokens, before_batch=before_batch
        ).vectors

    @torch.inference_mode()
    def encode_prepared(
        self,
        sequences: Sequence[PreparedSequence],
        *,
        batch_size: int = 64,
        batch_tokens: int | None = None,
        states: bool = False,
        memory: MemoryType | None = None,
        before_batch: Callable[[int], None] | None = None,
    ) -> Encoded:
        """``embed_prepared``, with the chorus states and the memories of the same forwards.

        Raises:
            ConfigError: a memory is asked of a model without chorus tokens.
        """
        return encode(
            self.model,
            self.collator,
            sequences,
            fingerprint=self.fingerprint,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            states=states,
            memory=memory,
            before_batch=before_batch,
        )

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
        counts = [s.tokens + len(q.input_ids) for s, q in zip(sequences, questions, strict=True)]
        context = self._context(sequences, compressed)
        return self._answering(max_new_tokens, sampling).all(context, questions, counts)

    @torch.inference_mode()
    def answer_memories(
        self,
        memories: Sequence[ChorusMemory],
        prompts: Sequence[str | None],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        batch_size: int = 32,
    ) -> list[Answer]:
        """Answer one prompt about each memory, in batches; memories of different items share a batch.

        Raises:
            CheckpointError: a memory is of another model. ValueError: the numbers of prompts and memories differ.
        """
        if isinstance(prompts, str) or len(prompts) != len(memories):
            raise ValueError(f"{len(memories)} memories and prompts {prompts!r}; give a list with one for each")
        answering = self._answering(max_new_tokens, sampling)
        answers: list[Answer] = []
        for start in range(0, len(memories), batch_size):
            context = self._recalled(memories[start : start + batch_size])
            questions = [self.collator.prompts.question(p) for p in prompts[start : start + batch_size]]
            read = context.visible_BC.shape[1]
            answers += answering.all(context, questions, [read + len(q.input_ids) for q in questions])
        return answers

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
        context, question = self._context([sequence], compressed), self.collator.prompts.question(prompt)
        read = sequence.tokens + len(question.input_ids)
        yield from self._answering(max_new_tokens, sampling).stream(context, question, read)

    @torch.inference_mode()
    def stream_memory(
        self,
        memory: ChorusMemory,
        prompt: str | None = None,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
    ) -> Iterator[str | Answer]:
        """``stream`` from a memory. Every step of the iterator runs one forward.

        Raises:
            CheckpointError: the memory is of another model.
        """
        context, question = self._recalled([memory]), self.collator.prompts.question(prompt)
        read = context.visible_BC.shape[1] + len(question.input_ids)
        yield from self._answering(max_new_tokens, sampling).stream(context, question, read)

    def prompt_tokens(self, sequence: PreparedSequence, prompt: str | None = None) -> int:
        """Tokens read to answer ``prompt`` about the sequence."""
        return sequence.tokens + len(self.collator.prompts.question(prompt).input_ids)

    def _answering(self, max_new_tokens: int, sampling: Sampling) -> Answering:
        return Answering(self.model, self.collator.prompts, max_new_tokens, sampling)

    def _context(self, sequences: Sequence[PreparedSequence], compressed: bool) -> Context:
        context = prefill(self.model, self.collator.pad(sequences).to(self.device))
        return context.compressed(template_visible=self.config.prompt.template_visible) if compressed else context

    def _recalled(self, memories: Sequence[ChorusMemory]) -> Context:
        require_own(memories, self.fingerprint)
        return recalled(memories, self._template, like=self.model.core.lm_head.weight)

    @cached_property
    def _template(self) -> Context | None:
        """Keys and values of the template before the sample, which are those of every item; computed once."""
        if not self.config.prompt.template_visible:
            return None
        return prefill(self.model, self.collator.items([Item("a")]).to(self.device)).only(Segment.S)
