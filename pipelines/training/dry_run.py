"""``crem train --dry-run``: what a run would take, before a device is asked for. Starts no Ray and reads no weights.

Rows, their mixing and the epochs are counted in the prepared tables. Tokens are those of some hundred rows of the run's
own first steps, through the run's own collator where the tokenizer is here; else they are estimated, and the report
says so. Memory and time are arithmetic over them (``crem.forecast.memory``, ``crem.forecast.devices``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crem.config import BackboneShape, RunConfig
from crem.fetch import shipped
from crem.forecast.devices import (
    CPU_THREAD_FLOPS,
    DEVICES,
    UTILISATION,
    Need,
    RowSize,
    assumed_row,
    full_chunk,
    needs,
    scaled,
    step_flops,
)
from crem.forecast.memory import Chunk, DeviceMemory, Weights, activations, device_memory, weights_of
from pipelines.tables.prepared import ImageTable, PreparedRows, item_of, read_part, read_table, texts_of
from pipelines.tables.storage import Folder

if TYPE_CHECKING:
    from crem.data.collator import Batch, Collator
    from crem.data.mixing import MixingPlan

__all__ = ["Forecast", "Mix", "dry_run"]

SAMPLE_ROWS = 256
MARGIN = 1.1
"""A run of thousands of chunks meets a larger one than a sample of some dozen does. An assumption."""
_CHARS_A_TOKEN = 4.0
"""Where there is no tokenizer: English text in a vocabulary of 150,000. An assumption."""
_TEMPLATE_TOKENS = 20
"""System turn and marks of a sequence."""


@dataclass(frozen=True)
class Mix:
    """Rows of one task, and what a step takes of them."""

    task: str
    retrieval: int
    with_turn: int
    """of the retrieval rows, those with a homogeneous generation turn"""
    heterogeneous: int
    share: float
    """of a batch"""
    epochs: float
    """of its retrieval rows, or of its heterogeneous rows where it has no others"""


@dataclass(frozen=True)
class Forecast:
    """What a run would take; ``text`` shows it."""

    config: RunConfig
    weights: Weights
    row: RowSize
    chunk: Chunk
    chunk_rows: int
    memory: DeviceMemory
    """on each worker of the configuration"""
    needs: list[Need]
    step_flops: float
    seconds: float
    need_seconds: list[float] = field(default_factory=list)
    """of the run on each of ``needs``"""
    mix: list[Mix] = field(default_factory=list)
    epochs: tuple[float, float] | None = None
    """of all retrieval rows and of all heterogeneous rows"""
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The report."""
        return "\n".join([*_run_lines(self), *_mix_lines(self), *_size_lines(self), *_need_lines(self), *_notes(self)])


def dry_run(prepared: str | None, config: RunConfig) -> Forecast:
    """Forecast a run.

    Args:
        prepared: folder or URI written by ``crem prepare``; None forecasts the preset alone.

    Raises:
        ConfigError: no training rows there, or a backbone of unknown shape.
    """
    from crem.forecast.shapes import meta_model, shape_of

    shape = shape_of(config.model)
    weights = weights_of(meta_model(config.model))
    workers = config.train.workers
    chunk_rows = config.train.chunk_rows or config.train.global_batch // workers
    mix: list[Mix] = []
    epochs = None
    if prepared is None:
        row, chunk = assumed_row(config, shape), full_chunk(config, shape, chunk_rows)
        notes = [
            "no tables were named: rows are unknown. A row is taken as 1,430 tokens of context (the paper's mean) with "
            "a short target; memory is that of a chunk with an image of full size in every query and every target."
        ]
    else:
        table, _ = read_table(prepared, "train")
        plan = PreparedRows(table, ImageTable.of([], [])).plan(config)
        mix, epochs = _mixing(table, plan, config)
        row, chunk, notes = _sampled(prepared, table, plan, config, shape, chunk_rows)
    on_gpu = config.train.gpus_per_worker > 0
    acts = activations(shape, chunk, config, cuda=on_gpu)
    operations = step_flops(shape, row, config, workers)
    peak = DEVICES[0].peak_flops if on_gpu else _cpu_flops(config)
    wanted = [needs(config, shape, weights, chunk, d, rows=chunk_rows) for d in DEVICES] if on_gpu else []
    return Forecast(
        config=config,
        weights=weights,
        row=row,
        chunk=chunk,
        chunk_rows=chunk_rows,
        memory=device_memory(config, weights, acts, workers, cuda=on_gpu),
        needs=wanted,
        step_flops=operations,
        seconds=config.train.steps * operations / (workers * peak * UTILISATION),
        need_seconds=[_seconds(need, shape, row, config) for need in wanted],
        mix=mix,
        epochs=epochs,
        notes=notes,
    )


def _seconds(need: Need, shape: BackboneShape, row: RowSize, config: RunConfig) -> float:
    count = need.workers or config.train.global_batch
    train = config.train.model_copy(update={"chunk_rows": need.chunk_rows})
    operations = step_flops(shape, row, config.model_copy(update={"train": train}), count)
    return config.train.steps * operations / (count * need.device.peak_flops * UTILISATION)


def _cpu_flops(config: RunConfig) -> float:
    return CPU_THREAD_FLOPS[config.train.precision] * min(config.train.threads_per_worker, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------------------------ the rows


def _mixing(table: pa.Table, plan: MixingPlan, config: RunConfig) -> tuple[list[Mix], tuple[float, float]]:
    """Rows, shares and epochs by task, from the plan that the run will follow."""
    steps, batch, temperature = config.train.steps, config.train.global_batch, config.data.source_temperature
    answered = table.column("answer").is_valid().to_numpy() & (config.loss.alpha_g > 0)
    paired = plan.retrieval_per_step
    names = table.column("task").to_pylist()
    mix = []
    streams = ((plan.retrieval, paired), (plan.heterogeneous, batch - paired))
    totals = []
    for rows, _ in streams:
        _, sizes = np.unique(plan.tasks[rows], return_counts=True)
        totals.append((sizes ** (1 / temperature)).sum())
    for task in np.unique(plan.tasks):
        of_task = [rows[plan.tasks[rows] == task] for rows, _ in streams]
        counts = [
            per_step * len(mine) ** (1 / temperature) / total if len(mine) else 0.0
            for mine, (_, per_step), total in zip(of_task, streams, totals, strict=True)
        ]
        retrieval, heterogeneous = of_task
        if not len(retrieval) and not len(heterogeneous):
            continue
        first = 0 if len(retrieval) else 1
        mix.append(
            Mix(
                task=str(names[int(np.flatnonzero(plan.tasks == task)[0])]),
                retrieval=len(retrieval),
                with_turn=int(answered[retrieval].sum()),
                heterogeneous=len(heterogeneous),
                share=sum(counts) / batch,
                epochs=steps * counts[first] / len(of_task[first]),
            )
        )
    whole = tuple(steps * per_step / max(1, len(rows)) for rows, per_step in streams)
    return sorted(mix, key=lambda m: -m.share), (whole[0], whole[1])


def _sampled(
    prepared: str, table: pa.Table, plan: MixingPlan, config: RunConfig, shape: BackboneShape, chunk_rows: int
) -> tuple[RowSize, Chunk, list[str]]:
    """An average row and a large chunk, from the rows that the run's first steps take."""
    count = max(chunk_rows, SAMPLE_ROWS // chunk_rows * chunk_rows)
    steps = [plan.step(s) for s in range(min(config.train.steps, math.ceil(count / config.train.global_batch)))]
    numbers = np.concatenate([s.rows for s in steps])[:count]
    z = np.concatenate([s.z for s in steps])[:count]
    chosen = table.take(pa.array(numbers))
    wanted = pa.array(sorted({i for row in chosen.to_pylist() for i in _images_of(row)}), pa.int64())
    images = Folder.at(prepared).child("images")
    collator = _collator(config, table)
    if collator is None:
        chunks = _estimated(images, wanted, chosen, config, shape, chunk_rows)
        notes = [
            f"the tokenizer of {config.model.backbone} is not on this machine: texts are taken as {_CHARS_A_TOKEN:g} "
            "characters a token. Images are counted from their stored sizes."
        ]
    else:
        parts = [read_part(images, name, wanted) for name in images.files(".parquet")]
        rows = PreparedRows(table, ImageTable.of([ids for ids, _ in parts], [part for _, part in parts]))
        pairs = rows.examples(numbers, z, retrieval=config.loss.alpha_r > 0, generation=config.loss.alpha_g > 0)
        chunks = [
            _measured(collator.examples(pairs[at : at + chunk_rows]))
            for at in range(0, len(pairs) - chunk_rows + 1, chunk_rows)
        ] or [_measured(collator.examples(pairs))]
        notes = []
    notes.append(
        f"tokens are those of {len(chunks)} chunks of the first steps; memory is that of the largest, and "
        f"{100 * (MARGIN - 1):.0f} % more."
    )
    sampled = min(len(numbers), chunk_rows * len(chunks))
    total = {
        name: sum(getattr(c, name) for c, _ in chunks) for name in ("tokens", "patches", "answer_tokens", "sequences")
    }
    row = RowSize(**{k: v / sampled for k, v in total.items()}, images=sum(n for _, n in chunks) / sampled)
    largest = max((c for c, _ in chunks), key=lambda c: c.tokens + c.patches)
    return row, scaled(largest, MARGIN), notes


def _images_of(row: dict[str, Any]) -> Iterable[int]:
    for side in (row["query"], row["target"], *(row["negatives"] or ())):
        yield from (side or {}).get("images") or ()


def _collator(config: RunConfig, table: pa.Table) -> Collator | None:
    """The run's own collator, if that takes no download."""
    from crem.model.build import build_collator

    backbone = config.model.backbone
    if backbone is not None and not (os.path.isdir(backbone) or shipped(backbone)):
        from huggingface_hub import try_to_load_from_cache

        found = "://" not in backbone and isinstance(try_to_load_from_cache(backbone, "tokenizer.json"), str)
        if not found:
            return None
    texts = texts_of(PreparedRows(table, ImageTable.of([], []))) if backbone is None else None
    return build_collator(config.model, texts=texts)


def _measured(batch: Batch) -> tuple[Chunk, int]:
    """A chunk as the model gets it, and its distinct images."""
    groups = batch.two_part.groups if batch.two_part else ()
    images = 0 if batch.image_grid_thw is None else len(batch.image_grid_thw)
    chunk = Chunk(
        tokens=batch.tokens,
        patches=0 if batch.pixel_values is None else len(batch.pixel_values),
        answer_tokens=int(batch.answer_tokens),
        sequences=len(batch.z),
        attended=sum(group.queries_GQ.numel() for group in groups) or None,
    )
    return chunk, images


def _estimated(
    images: Folder, wanted: pa.Array, chosen: pa.Table, config: RunConfig, shape: BackboneShape, chunk_rows: int
) -> list[tuple[Chunk, int]]:
    """As ``_measured``, from the lengths of texts and the sizes of images."""
    patches: dict[int, int] = {}
    for name in images.files(".parquet"):
        sizes = pq.read_table(images.path(name), columns=["id", "width", "height"], filesystem=images.fs)
        sizes = sizes.filter(pc.is_in(sizes.column("id"), value_set=wanted))
        for row in sizes.to_pylist():
            patches[row["id"]] = _patches(row["width"], row["height"], config, shape)
    merged = shape.spatial_merge_size**2
    rows = chosen.to_pylist()
    chunks = []
    for at in range(0, len(rows), chunk_rows):
        tokens = answers = sequences = 0
        distinct: set[int] = set()
        for row in rows[at : at + chunk_rows]:
            for side in (row["query"], row["target"], *(row["negatives"] or ())):
                if side is None:
                    continue
                item = item_of({**side, "images": None}, lambda _: b"")
                instruction = (
                    config.model.prompt.embedding_instruction if item.instruction is None else item.instruction
                )
                held = side["images"] or []
                distinct.update(held)
                sequences += 1
                tokens += _tokens(item.text, config.model.prompt.max_text_tokens) + _tokens(instruction, 10**6)
                tokens += _TEMPLATE_TOKENS + config.model.chorus_tokens + sum(patches[i] // merged + 2 for i in held)
            if row["answer"] is not None and config.loss.alpha_g > 0:
                answer = _tokens(row["answer"], config.model.prompt.max_answer_tokens) + 1
                tokens += answer + _tokens(row["question"], config.model.prompt.max_text_tokens) + 5
                answers += answer
        chunk = Chunk(tokens, sum(patches[i] for i in distinct), answers, sequences)
        chunks.append((chunk, len(distinct)))
    return chunks


def _tokens(text: str | None, limit: int) -> int:
    return min(limit, math.ceil(len(text) / _CHARS_A_TOKEN)) if text else 0


def _patches(width: int, height: int, config: RunConfig, shape: BackboneShape) -> int:
    """Patches of an image after Qwen2-VL's resize: sides in whole merged patches, area within the bounds."""
    unit = shape.patch_size * shape.spatial_merge_size
    bounds = config.model.image
    across, down = (max(1, round(side / unit)) for side in (width, height))
    if across * down * unit**2 > bounds.max_pixels:
        shrink = math.sqrt(width * height / bounds.max_pixels) * unit
        across, down = (max(1, math.floor(side / shrink)) for side in (width, height))
    elif across * down * unit**2 < bounds.min_pixels:
        grow = math.sqrt(bounds.min_pixels / (width * height)) / unit
        across, down = (math.ceil(side * grow) for side in (width, height))
    return across * down * shape.spatial_merge_size**2


# ---------------------------------------------------------------------------------------------------------- the report


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _count(number: float) -> str:
    for unit, name in ((1e9, " B"), (1e6, " M")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:,.0f}"


def _work(operations: float) -> str:
    return f"{operations / 1e15:,.1f} PFLOP" if operations >= 1e15 else f"{operations / 1e12:,.2f} TFLOP"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _run_lines(f: Forecast) -> list[str]:
    model, train = f.config.model, f.config.train
    trained = "full fine-tuning" if model.lora is None else f"LoRA r {model.lora.r}"
    away = "" if train.offload == "none" else f" with offload ({train.offload})"
    chunks, share = train.chunks(train.workers), train.global_batch // train.workers
    return [
        f"run       {f.config.preset}: {trained}, ZeRO {train.zero_stage}{away}, {train.precision}, "
        f"{train.workers} workers",
        f"model     {_count(f.weights.trained + f.weights.frozen)} parameters, {_count(f.weights.trained)} trained, "
        f"K = {model.chorus_tokens}",
        f"steps     {train.steps:,} of {train.global_batch:,} rows; a worker takes {share} in "
        f"{chunks} chunk{'s' * (chunks > 1)} of {f.chunk_rows}",
    ]


def _mix_lines(f: Forecast) -> list[str]:
    data = f.config.data
    if not f.mix or f.epochs is None:
        return []
    retrieval, heterogeneous = sum(m.retrieval for m in f.mix), sum(m.heterogeneous for m in f.mix)
    turns = sum(m.with_turn for m in f.mix)
    lines = [
        "",
        f"rows      {retrieval:,} retrieval ({turns:,} with a homogeneous turn), {heterogeneous:,} heterogeneous; "
        f" {f.epochs[0]:.1f} and {f.epochs[1]:.1f} epochs of them",
        f"mixing    data.retrieval_share {data.retrieval_share:g}, data.source_temperature "
        f"{data.source_temperature:g}, data.sub_batch {data.sub_batch}",
        f"          {'task':<28} {'retrieval':>10} {'with turn':>10} {'heterog.':>10} {'of batch':>11} {'epochs':>8}",
    ]
    lines += [
        f"          {m.task:<28} {m.retrieval:>10,} {m.with_turn:>10,} {m.heterogeneous:>10,} {m.share:>11.1%} "
        f"{m.epochs:>8.2f}"
        for m in f.mix
    ]
    return lines


def _size_lines(f: Forecast) -> list[str]:
    m, batch = f.memory, f.config.train.global_batch
    part = {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "buffers": m.buffers,
        "activations": m.activations,
        "overhead": m.overhead,
    }
    lines = [
        "",
        f"tokens    {f.row.tokens:,.0f} a row ({f.row.patches:,.0f} patches of {f.row.images:.2f} images, "
        f"{f.row.answer_tokens:.1f} of answers), {_count(f.row.tokens * batch)} a step, "
        f"{_count(f.row.tokens * batch * f.config.train.steps)} in all",
        f"memory    {_gb(m.total)} on each of {f.config.train.workers} workers, for a chunk of "
        f"{f.chunk.tokens:,} tokens, {f.chunk.patches:,} patches and {f.chunk.answer_tokens:,} answer tokens",
    ]
    lines += [f"          {name:<12} {_gb(size):>10}" for name, size in part.items()]
    return lines + ([f"          in the host's memory, for each worker: {_gb(m.host)}"] if m.host else [])


def _need_lines(f: Forecast) -> list[str]:
    train = f.config.train
    lines = [""]
    for need, seconds in zip(f.needs, f.need_seconds, strict=True):
        if need.workers is None:
            lines.append(
                f"needs     {need.device.name}: does not fit, {_gb(need.memory.total)} with chunks of "
                f"{need.chunk_rows}; lower model.image.max_pixels, or choose a preset with offload"
            )
            continue
        smaller = f", with train.chunk_rows={need.chunk_rows}" if need.chunk_rows != f.chunk_rows else ""
        lines.append(
            f"needs     {need.workers} GPU{'s' * (need.workers > 1)} of {need.device.name}{smaller}: "
            f"{_gb(need.memory.total)} of each{_host(need)}; {_duration(seconds)}"
        )
    speed = f"{UTILISATION:.0%} of {DEVICES[0].peak_flops / 1e12:.0f} TFLOP/s ({DEVICES[0].name})"
    if not train.gpus_per_worker:
        speed = f"{UTILISATION:.0%} of {_cpu_flops(f.config) / 1e9:.0f} GFLOP/s (CPU)"
    return [
        *lines,
        f"time      {_duration(f.seconds)}: {_work(f.step_flops)} a step, {f.seconds / train.steps:.3g} s at "
        f"{speed} on each of {train.workers} workers",
    ]


def _host(need: Need) -> str:
    assert need.workers is not None
    return f" and {_gb(need.memory.host * need.workers)} of the hosts' memory together" if need.memory.host else ""


def _notes(f: Forecast) -> list[str]:
    away = ", and of what is kept in the hosts' memory" if f.config.train.offload != "none" else ""
    estimates = [
        *f.notes,
        f"time assumes its utilisation, and does not count transfers between workers{away}.",
        "memory counts as estimates: the workspace of the backward pass, the process with its CUDA context and NCCL, "
        "and 5 % of fragmentation.",
    ]
    return ["", *(f"note      {note}" for note in estimates)]
