"""Prefill once, keep the keys and values that the mode needs, decode (method.md §5).

``prefill`` runs ``[S V T U]`` and returns a ``Context``: keys and values, which of them are padding, and the next
position. ``Context.compressed`` drops all but the chorus tokens (and the template before the sample, which is the
same for every item and carries nothing of it). Positions are those of the full sequence in both cases, which is what
makes pruning the cache equal to masking.

The decoding loop is ours, because ``GenerationMixin.generate`` derives M-RoPE positions from the length of the cache,
which is wrong for a pruned cache. It uses transformers' logits warpers, and its native mode is tested to give
the tokens of ``generate``. Shape suffixes: B sequences, C cached tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from crem.data.collator import Batch
from crem.data.prompts import Prompt, Segment
from crem.model.chorus import chorus_states, embedding_of
from crem.model.crem import CremModel

__all__ = ["GREEDY", "Context", "Prefilled", "Sampling", "decode", "prefill"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``temperature`` 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


GREEDY = Sampling()


@dataclass
class Context:
    """The part of a prefilled batch that decoding continues from."""

    cache: DynamicCache
    visible_BC: Tensor
    """bool: the cached keys that are not padding"""
    segments_BC: Tensor
    """int8 ``Segment`` of each cached key"""
    next_position_B: Tensor
    """int64: first position after the prefix, the same on the three axes"""

    def compressed(self, *, template_visible: bool) -> Context:
        """The context with the keys and values of the chorus tokens only, at their original positions."""
        return self.only(Segment.S, Segment.U) if template_visible else self.only(Segment.U)

    def only(self, *segments: Segment) -> Context:
        """The context with the keys and values of some segments, of which every sequence has the same number."""
        keep_BC = torch.isin(self.segments_BC, torch.tensor(segments, device=self.segments_BC.device))
        count = int(keep_BC[0].sum())
        index_BK = keep_BC.nonzero()[:, 1].view(-1, count)  # the same number in every row, in order
        cache = DynamicCache()
        for number, layer in enumerate(self.cache.layers):
            assert layer.keys is not None and layer.values is not None
            index = index_BK[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            cache.update(layer.keys.gather(2, index), layer.values.gather(2, index), number)
        return replace(
            self,
            cache=cache,
            visible_BC=torch.ones_like(index_BK, dtype=torch.bool),
            segments_BC=self.segments_BC.gather(1, index_BK),
        )

    def item_bytes(self) -> list[int]:
        """Bytes of each item's own keys and values: without padding and without the template."""
        per_token = sum(
            t.shape[1] * t.shape[3] * t.element_size()
            for layer in self.cache.layers
            for t in (layer.keys, layer.values)
            if t is not None
        )
        own_BC = self.visible_BC & (self.segments_BC != Segment.S)
        return [int(n) * per_token for n in own_BC.sum(1).tolist()]


@dataclass
class Prefilled(Context):
    """A context fresh from ``prefill``, with what the embedding is pooled from."""

    states_BKD: Tensor
    """last-layer states of the chorus tokens"""

    def embeddings(self) -> Tensor:
        """float32 [B, D], unit length"""
        return embedding_of(self.states_BKD)


@torch.no_grad()
def prefill(model: CremModel, batch: Batch) -> Prefilled:
    """Run the prefixes ``[S V T U]`` and keep all of their keys and values."""
    cache = DynamicCache()
    hidden_BTD, _ = model.encode(batch, cache)
    visible_BC = batch.segments != Segment.PAD
    last_B = batch.position_ids.masked_fill(~visible_BC, -1).amax(dim=(0, 2))
    return Prefilled(
        cache=cache,
        visible_BC=visible_BC,
        segments_BC=batch.segments,
        next_position_B=last_B + 1,
        states_BKD=chorus_states(hidden_BTD, batch.segments, batch.chorus_tokens),
    )


@torch.no_grad()
def decode(
    model: CremModel,
    context: Context,
    questions: Sequence[Prompt],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[Tensor]:
    """Continue a context with its questions, one token of every sequence at a time.

    Yields:
        int64 [B], at most ``max_new_tokens`` times; a sequence that has ended repeats its stop id. The context's cache
        grows in place, so a context is decoded once.
    """
    device = context.visible_BC.device
    ids_BT, real_BT = _padded(questions, device)
    lengths_B = real_BT.sum(1)
    choose = _chooser(sampling, device)

    offsets_BT = torch.arange(ids_BT.shape[1], device=device).expand_as(ids_BT)
    positions_BT = context.next_position_B[:, None] + offsets_BT
    causal_TT = torch.ones(ids_BT.shape[1], ids_BT.shape[1], dtype=torch.bool, device=device).tril()
    # padding queries keep the context visible, so no softmax is empty; their result is not used
    among_BTT = causal_TT & real_BT[:, None, :]
    before_BTC = context.visible_BC[:, None, :].expand(-1, ids_BT.shape[1], -1)
    hidden_BTD = _step(model, context, ids_BT, positions_BT, torch.cat([before_BTC, among_BTT], dim=2))
    last_BD = hidden_BTD[torch.arange(len(questions), device=device), lengths_B - 1]

    visible_BC = torch.cat([context.visible_BC, real_BT], dim=1)
    position_B = context.next_position_B + lengths_B
    stops = torch.tensor(list(stop_ids), device=device)
    ended_B = torch.zeros(len(questions), dtype=torch.bool, device=device)
    token_B = torch.full((len(questions),), int(stop_ids[0]), device=device)
    for remaining in range(max_new_tokens, 0, -1):
        chosen_B = choose(model.core.lm_head(last_BD).float())
        token_B = torch.where(ended_B, token_B, chosen_B)
        ended_B = ended_B | torch.isin(token_B, stops)
        yield token_B
        if remaining == 1 or bool(ended_B.all()):
            return
        visible_BC = torch.cat([visible_BC, torch.ones_like(ended_B)[:, None]], dim=1)
        last_BD = _step(model, context, token_B[:, None], position_B[:, None], visible_BC[:, None, :])[:, -1]
        position_B = position_B + 1


def _step(model: CremModel, context: Context, ids_BT: Tensor, positions_BT: Tensor, mask_BTC: Tensor) -> Tensor:
    out = model.core.model(
        input_ids=ids_BT,
        attention_mask={"full_attention": mask_BTC[:, None]},
        position_ids=positions_BT.expand(3, -1, -1),
        past_key_values=context.cache,
        use_cache=True,
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


def _padded(prompts: Sequence[Prompt], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids int64 [B, T] and which of them are not padding, bool [B, T]."""
    length = max(len(p.input_ids) for p in prompts)
    ids = np.zeros((len(prompts), length), dtype=np.int64)
    real = np.zeros((len(prompts), length), dtype=bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt.input_ids)] = prompt.input_ids
        real[row, : len(prompt.input_ids)] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from logits [B, V] to token ids [B]."""
    if sampling.temperature <= 0:
        return partial(torch.argmax, dim=-1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    generator = torch.Generator(device=device)
    if sampling.seed is not None:
        generator.manual_seed(sampling.seed)
    else:
        generator.seed()

    def choose(logits_BV: Tensor) -> Tensor:
        probabilities_BV: Tensor = warpers(None, logits_BV).softmax(-1)
        return torch.multinomial(probabilities_BV, 1, generator=generator)[:, 0]

    return choose
