"""The computation of one replica: plain Python over ``crem.Crem``, without Ray and without HTTP.

Choices:

- **A bad item fails alone.** Items are prepared (decoded and tokenised) one by one before the forward; those that
  cannot be prepared get their error, all others share one forward.
- **Generation is an iterator of steps**, so that the caller decides on which thread each step runs, may compute
  something else between two steps, and stops decoding by closing the iterator.
- **Stop strings** are cut here, on text: a piece that may be the start of a stop string is buffered until that is
  known, so a streamed answer and an unstreamed one have the same text.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

import crem
from crem.data.sequence import CutCount, PreparedSequence
from crem.errors import ItemError
from crem.inference import Answer
from crem.model.generation import Sampling

__all__ = ["Delta", "Embedded", "Ending", "Engine", "GenerationRequest", "StopCutter"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedded:
    """``vector`` float32 [D] of unit length, and the number of tokens of its item."""

    vector: NDArray[np.float32]
    tokens: int


@dataclass(frozen=True)
class GenerationRequest:
    """One question about one item."""

    item: crem.Item
    prompt: str
    compressed: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ending:
    """Why an answer ended, and its token counts."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Delta:
    """A piece of an answer, possibly empty; the last one has the ``ending``."""

    text: str
    ending: Ending | None = None


class Engine:
    """Embeds and answers with one model."""

    def __init__(self, model: crem.Crem):
        self._model = model
        self._cut_said = False

    def embed(self, items: Sequence[crem.Item]) -> list[Embedded | Exception]:
        """One result per item, in order; an ``Exception`` for an item that cannot be embedded."""
        prepared = [self._prepared(item) for item in items]
        sequences = [p for p in prepared if isinstance(p, PreparedSequence)]
        try:
            vectors = iter(self._model.embed_prepared(sequences, batch_size=len(items)))
        except Exception as error:  # not the fault of one item: all items of this forward fail
            logger.exception("a batch of %d items could not be embedded", len(sequences))
            return [error if isinstance(p, PreparedSequence) else p for p in prepared]
        return [Embedded(next(vectors), p.tokens) if isinstance(p, PreparedSequence) else p for p in prepared]

    def _prepared(self, item: crem.Item) -> PreparedSequence | Exception:
        try:
            return self._prepare(item)
        except ItemError as error:
            return error
        except Exception as error:
            logger.exception("an item could not be prepared")
            return error

    def _prepare(self, item: crem.Item) -> PreparedSequence:
        sequence = self._model.prepare(item)
        limit = self._model.config.prompt.max_text_tokens
        if not self._cut_said and (sentence := CutCount.of([sequence]).sentence("items", limit)):
            self._cut_said = True
            logger.warning("%s; this replica logs no further cuts", sentence)
        return sequence

    def generate(self, request: GenerationRequest) -> Generator[Delta]:
        """The answer, one decoding step at a time; closing the iterator ends the decoding.

        Raises:
            ItemError: from the first step.
        """
        cutter, steps = StopCutter(request.stop), 0
        sequence = self._prepare(request.item)
        with closing(self._pieces(request, sequence)) as pieces:
            for piece in pieces:
                if isinstance(piece, Answer):
                    ending = Ending(piece.finish_reason, piece.prompt_tokens, piece.completion_tokens)
                    yield Delta(cutter.flush(), ending)
                    return
                steps += 1
                text = cutter.push(piece)
                if cutter.stopped:
                    prompt_tokens = self._model.prompt_tokens(sequence, request.prompt)
                    yield Delta(text, Ending("stop", prompt_tokens, steps))
                    return
                yield Delta(text)

    def _pieces(self, request: GenerationRequest, sequence: PreparedSequence) -> Generator[str | Answer]:
        yield from self._model.stream_prepared(
            sequence,
            request.prompt,
            compressed=request.compressed,
            max_new_tokens=request.max_new_tokens,
            sampling=Sampling(request.temperature, request.top_p, request.seed),
        )


class StopCutter:
    """Passes text on up to the first stop string, buffering what may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._buffer = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that may be sent after ``piece``; sets ``stopped`` when a stop string is complete."""
        text = self._buffer + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._buffer = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._buffer = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The buffered text, once the answer has ended."""
        rest, self._buffer = self._buffer, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
