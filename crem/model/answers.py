"""Answers as text: a context and its questions are decoded, all in one batch or one of them as a stream of pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from crem.data.prompts import Prompt, PromptBuilder
from crem.model.crem import CremModel
from crem.model.generation import Context, Sampling, decode

__all__ = ["Answer", "Answering"]


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str
    prompt_tokens: int
    """Tokens read for it: of the item or of its memory, and of the question."""
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    cache_bytes: int
    """keys and values kept of the item after prefill: of its prefix (native) or of its K chorus tokens (compressed)"""


@dataclass(frozen=True)
class Answering:
    """What decoding needs of a model, and for how long and how it decodes."""

    model: CremModel
    prompts: PromptBuilder
    max_new_tokens: int
    sampling: Sampling

    @torch.inference_mode()
    def all(self, context: Context, questions: Sequence[Prompt], prompt_tokens: Sequence[int]) -> list[Answer]:
        """The answers of a batch, in its order."""
        sizes = context.item_bytes()
        steps = list(self._decode(context, questions))
        tokens = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in questions]
        return [self._answer(*row) for row in zip(tokens, prompt_tokens, sizes, strict=True)]

    @torch.inference_mode()
    def stream(self, context: Context, question: Prompt, prompt_tokens: int) -> Iterator[str | Answer]:
        """A piece of text for every decoded token of a batch of one, and last the ``Answer``."""
        size = context.item_bytes()[0]
        ids: list[int] = []
        # the text of ids[begin:end] has been yielded; decoding from ``begin`` on keeps the cost of a step constant
        begin = end = 0
        for token_B in self._decode(context, [question]):
            ids.append(int(token_B[0]))
            before, now = self._text(ids[begin:end]), self._text(ids[begin:])
            if len(now) > len(before) and not now.endswith("\ufffd"):  # a character may span several tokens
                yield now[len(before) :]
                begin, end = end, len(ids)
            else:
                yield ""
        if len(rest := self._text(ids[begin:])) > len(before := self._text(ids[begin:end])):
            yield rest[len(before) :]
        yield self._answer(ids, prompt_tokens, size)

    def _decode(self, context: Context, questions: Sequence[Prompt]) -> Iterator[torch.Tensor]:
        return decode(
            self.model,
            context,
            questions,
            stop_ids=self.prompts.stop_ids,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )

    def _answer(self, ids: list[int], prompt_tokens: int, cache_bytes: int) -> Answer:
        end = self._end(ids)
        if end is None:
            return Answer(self._text(ids), prompt_tokens, len(ids), "length", cache_bytes)
        return Answer(self._text(ids), prompt_tokens, end + 1, "stop", cache_bytes)

    def _text(self, ids: list[int]) -> str:
        text: str = self.prompts.tokenizer.decode(ids[: self._end(ids)], skip_special_tokens=True)
        return text

    def _end(self, ids: list[int]) -> int | None:
        """Place of the first stop token."""
        stops = set(self.prompts.stop_ids)
        return next((i for i, token in enumerate(ids) if token in stops), None)
