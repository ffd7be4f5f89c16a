"""The compression-based prompt, token by token (method.md §2).

    system:    You are a helpful assistant.                                                  S
    user:      <image> [text] [embedding instruction] <chorus_0> … <chorus_{K-1}>            V, T, U
               [generation instruction]                                                      Q
    assistant: <answer>                                                                      A

Every token carries its segment, and everything downstream (mask, pooling, loss, cache pruning) reads segments, never
offsets. Segments are tokenised one by one, so the tokens of a prefix do not depend on what follows: an item has the
same embedding with and without a question. Texts are tokenised with special tokens split: ``<|image_pad|>`` in a text
is plain text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crem.config import PromptConfig

__all__ = ["Prompt", "PromptBuilder", "Segment"]

logger = logging.getLogger(__name__)

_KNOWN_TEXTS = 50_000
"""Texts whose tokens are kept in memory."""


class Segment(IntEnum):
    """Part of the prompt that a token belongs to."""

    PAD = -1
    S = 0
    """chat template before the sample"""
    V = 1
    """vision tokens with their start and end tokens"""
    T = 2
    """text and embedding instruction"""
    U = 3
    """chorus tokens"""
    Q = 4
    """generation instruction and the template up to the answer"""
    A = 5
    """answer, with its end token"""


class Prompt(NamedTuple):
    """One sequence: ``input_ids`` int64 [T] and ``segments`` int8 [T]."""

    input_ids: NDArray[np.int64]
    segments: NDArray[np.int8]

    def __add__(self, other: Prompt) -> Prompt:  # type: ignore[override]
        return Prompt(
            np.concatenate([self.input_ids, other.input_ids]), np.concatenate([self.segments, other.segments])
        )


class PromptBuilder:
    """Builds prompts for one tokenizer, chorus and prompt configuration. May be used by several threads at once."""

    def __init__(self, tokenizer: Any, chorus_ids: Sequence[int], config: PromptConfig):
        self.tokenizer = tokenizer
        self.chorus_ids = list(chorus_ids)
        self.config = config
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._vision_start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
        self._vision_end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
        system = f"<|im_start|>system\n{config.system}<|im_end|>\n" if config.system else ""
        self._head = self._template(f"{system}<|im_start|>user\n")
        self._turn = self._template("<|im_end|>\n<|im_start|>assistant\n")
        self._end = self._template("<|im_end|>")
        self._cut_warned = False
        self._known: dict[tuple[str, int], list[int]] = {}

    def prefix(
        self, text: str | None, instruction: str | None, image_tokens: Sequence[int], chorus_tokens: int | None = None
    ) -> Prompt:
        """``[S V T U]`` of one item.

        Args:
            image_tokens: the number of vision tokens of each image.
            chorus_tokens: how many of the K chorus tokens; all of them where None.
        """
        instruction = self.config.embedding_instruction if instruction is None else instruction
        vision: list[int] = []
        for count in image_tokens:
            vision += [self._vision_start, *[self.image_id] * count, self._vision_end]
        content = self._text(text, self.config.max_text_tokens) if text else []
        # after a text the instruction starts a new line, as in VLM2Vec's prompts
        content = content + self._text(("\n" if text else "") + instruction, self.config.max_text_tokens)
        chorus = self.chorus_ids[:chorus_tokens]
        return _joined((self._head, Segment.S), (vision, Segment.V), (content, Segment.T), (chorus, Segment.U))

    def question(self, text: str | None) -> Prompt:
        """``[Q]``: the generation instruction and the template up to the answer."""
        text = self.config.generation_instruction if text is None else text
        return _joined((self._text(text, self.config.max_text_tokens) + self._turn, Segment.Q))

    def answer(self, text: str) -> Prompt:
        """``[A]``: the answer and its end token."""
        return _joined((self._text(text, self.config.max_answer_tokens) + self._end, Segment.A))

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        return [*self._end, self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]

    def _template(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _text(self, text: str, limit: int) -> list[int]:
        # instructions, questions and labels recur
        if (known := self._known.get((text, limit))) is not None:
            return known
        ids = list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)
        if len(ids) > limit and not self._cut_warned:
            self._cut_warned = True
            logger.warning(
                "a text of %d tokens was cut to %d (model.prompt.max_text_tokens or max_answer_tokens); this process "
                "logs no further cuts",
                len(ids),
                limit,
            )
        if len(self._known) >= _KNOWN_TEXTS:
            self._known.clear()
        self._known[text, limit] = ids[:limit]
        return ids[:limit]


def _joined(*parts: tuple[list[int], Segment]) -> Prompt:
    ids = np.array([i for part, _ in parts for i in part], dtype=np.int64)
    segments = np.array([segment for part, segment in parts for _ in part], dtype=np.int8)
    return Prompt(ids, segments)
