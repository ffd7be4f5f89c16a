"""The compression-based prompt, token by token (method.md §2).

    system:    You are a helpful assistant.                                                  S
    user:      <image> [text] [embedding instruction] <chorus_0> … <chorus_{K-1}>            V, T, U
               or [text] <image> [text] … where the item says so (``Item.image_at``)         T, V, T, …, U
               [generation instruction]                                                      Q
    assistant: <answer>                                                                      A

Every token carries its segment, and everything downstream (mask, pooling, loss, cache pruning) reads segments, never
offsets. Segments are tokenised one by one, so the tokens of a prefix do not depend on what follows: an item has the
same embedding with and without a question. So are the pieces of a text between images, because nothing may merge across
an image; its limit holds for all pieces together. Texts are tokenised in NFC and with special tokens split:
``<|image_pad|>`` in a text is plain text. A prompt counts the texts of it that were cut.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crem.config import PromptConfig

__all__ = ["Prompt", "PromptBuilder", "Segment"]

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
    """One sequence, or a part of one."""

    input_ids: NDArray[np.int64]
    """[T]"""
    segments: NDArray[np.int8]
    """[T] of ``Segment``"""
    cut_texts: int = 0
    """Texts that were longer than their limit and lost their end."""
    longest_text: int = 0
    """Tokens of the longest text, before any was cut."""

    def __add__(self, other: Prompt) -> Prompt:  # type: ignore[override]
        return Prompt(
            np.concatenate([self.input_ids, other.input_ids]),
            np.concatenate([self.segments, other.segments]),
            self.cut_texts + other.cut_texts,
            max(self.longest_text, other.longest_text),
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
        self._longest = max(config.max_text_tokens, config.max_answer_tokens)
        self._known: dict[str, tuple[list[int], int]] = {}

    def prefix(
        self,
        text: str | None,
        instruction: str | None,
        image_tokens: Sequence[int],
        chorus_tokens: int | None = None,
        image_at: Sequence[int] = (),
    ) -> Prompt:
        """``[S V T U]`` of one item, with V and T in the item's order.

        Args:
            image_tokens: the number of vision tokens of each image.
            chorus_tokens: how many of the K chorus tokens; all of them where None.
            image_at: how many characters of the text precede each image; empty where all images precede it.
        """
        instruction = self.config.embedding_instruction if instruction is None else instruction
        text = text or ""
        text_cut, instruction_cut = _Cut(self.config.max_text_tokens), _Cut(self.config.max_text_tokens)
        parts: list[tuple[list[int], Segment]] = [(self._head, Segment.S)]
        at = 0
        for count, place in zip(image_tokens, image_at or [0] * len(image_tokens), strict=True):
            if place > at:
                parts.append((self._text(text[at:place], text_cut), Segment.T))
                at = place
            parts.append(([self._vision_start, *[self.image_id] * count, self._vision_end], Segment.V))
        if at < len(text):
            parts.append((self._text(text[at:], text_cut), Segment.T))
        # after a text the instruction starts a new line, as in VLM2Vec's prompts
        instruction = ("\n" if at < len(text) else "") + instruction
        parts.append((self._text(instruction, instruction_cut), Segment.T))
        return _joined(*parts, (self.chorus_ids[:chorus_tokens], Segment.U), cuts=(text_cut, instruction_cut))

    def question(self, text: str | None) -> Prompt:
        """``[Q]``: the generation instruction and the template up to the answer."""
        text = self.config.generation_instruction if text is None else text
        cut = _Cut(self.config.max_text_tokens)
        return _joined((self._text(text, cut) + self._turn, Segment.Q), cuts=(cut,))

    def answer(self, text: str) -> Prompt:
        """``[A]``: the answer and its end token."""
        cut = _Cut(self.config.max_answer_tokens)
        return _joined((self._text(text, cut) + self._end, Segment.A), cuts=(cut,))

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        return [*self._end, self.tokenizer.convert_tokens_to_ids("<|endoftext|>")]

    def _template(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _text(self, text: str, cut: _Cut) -> list[int]:
        """Tokens of a text, or of its next piece, up to its limit."""
        known = self._known.get(text)
        if known is None:  # instructions, questions and labels recur
            normal = unicodedata.normalize("NFC", text)
            ids = list(self.tokenizer(normal, add_special_tokens=False, split_special_tokens=True).input_ids)
            known = ids[: self._longest], len(ids)
            if len(self._known) >= _KNOWN_TEXTS:
                self._known.clear()
            self._known[text] = known
        ids, count = known
        kept = ids[: max(0, cut.limit - cut.tokens)]
        cut.tokens += count
        return kept


@dataclass
class _Cut:
    """The tokens of one text, whose pieces share a limit."""

    limit: int
    tokens: int = 0
    """of its pieces so far, before any was cut"""


def _joined(*parts: tuple[list[int], Segment], cuts: Sequence[_Cut]) -> Prompt:
    return Prompt(
        np.array([i for part, _ in parts for i in part], dtype=np.int64),
        np.repeat(np.array([segment for _, segment in parts], dtype=np.int8), [len(part) for part, _ in parts]),
        sum(cut.tokens > cut.limit for cut in cuts),
        max(cut.tokens for cut in cuts),
    )
