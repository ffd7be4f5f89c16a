"""``crem plan``: what ``crem embed`` of an input takes, from a sample of its items and the speed of the model.

Files are opened for a sample of their rows, and their rows are counted where the input is small; of a large input the
number is reckoned from the bytes of the files that were opened, or given. Nothing is written and no job started.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import islice

import pyarrow.compute as pc

import crem
from crem.checkpoint import describe, read_collator
from crem.config import RunConfig
from crem.data.sequence import PreparedSequence
from crem.errors import ConfigError
from crem.forecast.embedding import EmbeddingForecast, EmbeddingNeeds, ModelSizes, TokenSample, forecast_embedding
from crem.forecast.index_needs import IndexForecast, forecast_index
from pipelines.corpus.work_plan import draft_plan
from pipelines.embedding.item_table import item_files, load_item
from pipelines.formats.detection import detect_source
from pipelines.formats.record_reader import RecordReader
from pipelines.formats.sampling import chosen_files
from pipelines.sources import sources
from pipelines.sources.image_reader import ImageReader
from pipelines.sources.records import RowRange
from pipelines.sources.sources import SourceFiles

__all__ = ["CostPlan", "plan_cost"]

_FILES = 16
"""Files of a large input that are opened."""


@dataclass(frozen=True)
class CostPlan:
    """A forecast and what it rests on."""

    needs: EmbeddingNeeds
    sample: TokenSample
    forecast: EmbeddingForecast
    index: IndexForecast
    assumptions: tuple[str, ...]

    def described(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @property
    def text(self) -> str:
        """For a person to read."""
        needs, sample, found, index = self.needs, self.sample, self.forecast, self.index
        quantiles = ", ".join(f"{q} %: {tokens:,}" for q, tokens in sample.quantiles)
        cost = "" if found.cost is None else f"   cost {found.cost:,.2f}"
        lines = [
            f"items        {needs.items:,}   tokens {found.tokens:,.0f}, {sample.mean:.1f} an item ({quantiles})",
            f"accelerators {needs.accelerators} of {needs.tokens_per_s:,.0f} tokens/s each",
            f"time         {_time(found.hours)}   {found.accelerator_hours:,.2f} accelerator-hours{cost}",
            f"preparing    {found.cores:.1f} cores keep up ({needs.prepare_s * 1e6:,.0f} µs an item on one)",
            *(f"storage      {_size(size):>9}  {name}" for name, size in found.stored.items()),
            f"index        {_size(index.memory_bytes)} in memory to search fast ({index.kind}), "
            f"{index.core_hours:,.1f} core-hours to build, in {index.segments:,} tasks",
            "assumed:",
            *(f"- {line}" for line in self.assumptions),
        ]
        return "\n".join(lines)


def plan_cost(
    source: str,
    model: str,
    config: RunConfig,
    *,
    items: int | None,
    tokens_per_s: float | None,
    accelerators: int,
    price_per_hour: float | None,
    sampled: int,
) -> CostPlan:
    """Forecast ``crem embed``.

    Args:
        items: their number; counted, or reckoned from a sample of the files, where None.
        tokens_per_s: of one accelerator; where None it is measured on this machine with the sampled items.

    Raises:
        ConfigError: the input has no rows or its format is not known, or no sampled item can be embedded.
    """
    table = item_files(source)
    counted, ranges, how = _counted(table, config)
    sequences, errors, prepare_s = _sampled(table, ranges, model, config, sampled)
    if not sequences:
        raise ConfigError(f"none of {errors} sampled items of {source!r} can be embedded; crem embed says why for each")
    sample = TokenSample.of([sequence.tokens for sequence in sequences], errors)
    assumptions = [
        how if items is None else "the number of items was given",
        f"tokens are those of {sample.items:,} sampled items, {sample.errors} of which cannot be embedded",
    ]
    if tokens_per_s is None:
        tokens_per_s, device = _measured(model, sequences, config)
        assumptions.append(f"tokens/s were measured on this machine ({device}) with the sampled items")
    else:
        assumptions.append("tokens/s were given")
    needs = EmbeddingNeeds(items or counted, tokens_per_s, prepare_s, accelerators, price_per_hour)
    assumptions.append(
        f"accelerators compute {needs.busy:.0%} of the time, the goal of the job; its start is not counted"
    )
    assumptions.append("sizes are without ids, kept columns and Parquet's compression")
    sizes = _sizes(model, config)
    forecast = forecast_embedding(needs, sample, sizes)
    dim = config.embed.dims or sizes.dim
    index = forecast_index(needs.items * sample.good, dim, config.index)
    if index.segments:
        assumptions.append("a core that builds the index computes 8.5 GFLOP/s, as one measured here did")
    return CostPlan(needs, sample, forecast, index, tuple(assumptions))


def _counted(table: SourceFiles, config: RunConfig) -> tuple[int, list[RowRange], str]:
    """The number of items, some ranges of rows, and how they were counted."""
    draft = draft_plan(table, config.embed.rows_per_task, None)
    if draft is not None:
        ranges = [part for chunk in draft.chunks for piece in chunk for part in piece]
        return draft.records, ranges, "items were counted in all files"
    chosen = set(chosen_files(table.names, _FILES))
    places = [place for place, name in enumerate(table.names) if name in chosen]
    ranges = [part for place in places for part in sources.split(table.chunk(place, place + 1), None, 4096)]
    sizes = table.table["size"].to_pylist()
    share = sum(sizes[place] for place in places) / max(1, pc.sum(table.table["size"]).as_py())
    rows = round(sum(part.rows for part in ranges) / max(share, 1e-12))
    return rows, ranges, f"items were reckoned from the rows and bytes of {len(places)} of {len(table):,} files"


def _sampled(
    table: SourceFiles, ranges: list[RowRange], model: str, config: RunConfig, count: int
) -> tuple[list[PreparedSequence], int, float]:
    """Prepared items, how many others cannot be, and seconds for each item; spread over the ranges."""
    if not ranges:
        raise ConfigError(f"{table.folder.uri} has no rows; there is nothing to embed")
    collator, detection = read_collator(model), detect_source(table, config.embed, section="embed")
    reader = ImageReader.of(table.root, config.model.image, config.embed, table.archives)
    records = RecordReader(detection, "items")
    chosen = ranges[:: max(1, len(ranges) // _FILES)]
    each = -(-count // len(chosen))
    sequences: list[PreparedSequence] = []
    errors = 0
    chorus_tokens = config.embed.chorus_tokens or None
    began = time.process_time()
    for part in chosen:
        for row in islice(sources.read(part), 0, None, max(1, part.rows // each)):
            item = load_item(
                row, records, reader, collator.limits, lambda item: collator.prepare(item, chorus_tokens=chorus_tokens)
            )
            if item.sequence is None:
                errors += 1
            else:
                sequences.append(item.sequence)
    return sequences, errors, (time.process_time() - began) / max(1, len(sequences) + errors)


def _measured(model: str, sequences: list[PreparedSequence], config: RunConfig) -> tuple[float, str]:
    """Tokens a second of one actor on this machine, as ``crem embed`` batches them; after one batch to warm up."""
    import torch

    settings = config.embed
    torch.set_num_threads(settings.threads_per_actor)
    device = "cuda" if torch.cuda.is_available() and settings.gpus_per_actor else "cpu"
    loaded = crem.load(model, device=device, chorus_tokens=settings.chorus_tokens)
    loaded.embed_prepared(sequences[: settings.batch_size], batch_size=settings.batch_size)
    began = time.perf_counter()
    loaded.embed_prepared(sequences, batch_size=settings.batch_size, batch_tokens=settings.batch_tokens)
    seconds = time.perf_counter() - began
    return sum(sequence.tokens for sequence in sequences) / seconds, device


def _sizes(model: str, config: RunConfig) -> ModelSizes:
    from transformers import AutoConfig

    from crem.fetch import local_copy

    info = describe(model, config.embed.chorus_tokens)
    backbone = AutoConfig.from_pretrained(local_copy(model))
    text = backbone.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSizes(info.dim, info.chorus_tokens, text.num_hidden_layers, text.num_key_value_heads, head)


def _time(hours: float) -> str:
    if hours < 1:
        return f"{hours * 3600:,.1f} s" if hours < 1 / 60 else f"{hours * 60:,.1f} min"
    return f"{hours:,.1f} h" if hours < 100 else f"{hours / 24:,.1f} days"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.1f} {unit}"
        size /= 1000
    raise AssertionError
