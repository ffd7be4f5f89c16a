"""``crem train --dry-run``: what a run needs, before a device is asked for. Starts no Ray and reads no weights.

Rows, their mixing and the epochs are counted in the prepared tables. Tokens are those of some hundred rows of the run's
own first steps, through the run's own collator where the tokenizer is on this machine; else they are estimated, and the
report says so. Memory and time are arithmetic over them (``crem.forecast``).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from crem.config import BackboneShape, RunConfig
from crem.data.sequence import CutCount
from crem.fetch import shipped
from crem.forecast.estimate import Forecast, TaskShare, forecast, rows_of_chunk
from crem.forecast.flops import Load
from crem.forecast.shapes import image_patches, shape_of
from pipelines.tables.manifest import read_manifest
from pipelines.tables.prepared import index_images, index_rows, item_of, load_rows
from pipelines.tables.richness import too_small_images
from pipelines.tables.row_index import RowIndex
from pipelines.tables.storage import Folder
from pipelines.training.held_out import training_texts

if TYPE_CHECKING:
    from crem.data.collator import Collator
    from crem.data.mixing import MixingPlan

__all__ = ["dry_run"]

SAMPLE_ROWS = 256
MARGIN = 1.1
"""A run of thousands of chunks meets a larger one than a sample of some dozen does. An assumption."""
_CHARS_PER_TOKEN = 4.0
"""Where there is no tokenizer: English text in a vocabulary of 150,000. An assumption."""
_TEMPLATE_TOKENS = 20
"""System turn and marks of a sequence."""


def dry_run(prepared: str | None, config: RunConfig) -> Forecast:
    """Forecast a run.

    Args:
        prepared: folder or URI written by ``crem prepare``; None forecasts the preset alone.

    Raises:
        ConfigError: no training rows there, or a backbone of unknown shape. CheckpointError: one that is no Qwen2-VL.
    """
    if prepared is None:
        note = (
            "no tables were named: rows are unknown. A row is taken as 1,430 tokens of context (the paper's mean) with "
            "a short target; memory is that of a chunk with an image of full size in every query and every target."
        )
        return forecast(config, notes=[note])
    shape = shape_of(config.model)  # an unknown backbone is refused before tables are read
    rows = index_rows(prepared, split_prefix="train")
    plan = rows.plan(config)
    tasks, epochs = _task_shares(rows, plan, config)
    row, chunk, notes = _sample(prepared, rows, plan, config, shape)
    poor = too_small_images(read_manifest(Folder.at(prepared)), config.model.image.max_pixels)
    notes = ([f"WARNING: {poor}."] if poor else []) + notes
    return forecast(config, row, chunk, tasks=tasks, epochs=epochs, notes=notes)


def _task_shares(rows: RowIndex, plan: MixingPlan, config: RunConfig) -> tuple[list[TaskShare], tuple[float, float]]:
    """Rows, shares and epochs by task, from the plan that the run will follow; then the epochs of both streams."""
    steps, batch, power = config.train.steps, config.train.global_batch, 1 / config.data.source_temperature
    answered = rows.answered & (config.loss.alpha_g > 0)
    per_step = (plan.retrieval_per_step, batch - plan.retrieval_per_step)
    streams = (plan.retrieval, plan.heterogeneous)
    weights = [(np.unique(plan.tasks[of], return_counts=True)[1] ** power).sum() for of in streams]
    shares = []
    for task in np.unique(plan.tasks):
        retrieval, heterogeneous = (of[plan.tasks[of] == task] for of in streams)
        taken = [
            count * len(of) ** power / weight if len(of) else 0.0
            for of, count, weight in zip((retrieval, heterogeneous), per_step, weights, strict=True)
        ]
        if not len(retrieval) and not len(heterogeneous):
            continue
        first, of_task = (0, retrieval) if len(retrieval) else (1, heterogeneous)
        shares.append(
            TaskShare(
                task=str(rows.task.names[rows.task.codes[of_task[0]]]),
                retrieval=len(retrieval),
                with_turn=int(answered[retrieval].sum()),
                heterogeneous=len(heterogeneous),
                share=sum(taken) / batch,
                epochs=steps * taken[first] / len(of_task),
            )
        )
    epochs = [steps * count / max(1, len(of)) for of, count in zip(streams, per_step, strict=True)]
    return sorted(shares, key=lambda s: -s.share), (epochs[0], epochs[1])


def _sample(
    prepared: str, rows: RowIndex, plan: MixingPlan, config: RunConfig, shape: BackboneShape
) -> tuple[Load, Load, list[str]]:
    """An average row and a large chunk, from the rows that the run's first steps take."""
    size = rows_of_chunk(config)
    count = max(size, SAMPLE_ROWS // size * size)
    steps = [plan.step(s) for s in range(min(config.train.steps, math.ceil(count / config.train.global_batch)))]
    numbers = np.concatenate([s.rows for s in steps])[:count]
    z = np.concatenate([s.z for s in steps])[:count]
    chosen = load_rows(rows.select(numbers), index_images(prepared))
    collator = _collator(config, rows)
    starts = range(0, max(1, len(numbers) - size + 1), size)
    if collator is None:
        patches = _stored_patches(chosen.images, config, shape)
        listed = chosen.table.to_pylist()
        chunks = [_estimated(listed[at : at + size], patches, config, shape) for at in starts]
        cuts = _estimated_cuts(listed, config.model.prompt.max_text_tokens)
        notes = [
            f"the tokenizer of {config.model.backbone} is not on this machine: texts are taken as {_CHARS_PER_TOKEN:g} "
            "characters a token. Images are counted from their stored sizes."
        ]
    else:
        retrieval, generation = config.loss.alpha_r > 0, config.loss.alpha_g > 0
        examples = chosen.examples(np.arange(len(numbers)), z, retrieval=retrieval, generation=generation)
        visible = config.model.prompt.template_visible
        batches = [collator.examples(examples[at : at + size]) for at in starts]
        chunks = [Load.of(batch, template_visible=visible) for batch in batches]
        cuts = sum((batch.cuts for batch in batches), CutCount())
        notes = []
    notes.append(
        f"tokens are those of {len(chunks)} chunks of the first steps; memory is that of the largest, and "
        f"{100 * (MARGIN - 1):.0f} % more."
    )
    if (sentence := cuts.sentence("sampled sequences", config.model.prompt.max_text_tokens)) is not None:
        notes.append(f"{sentence}: {cuts.cut / cuts.sequences:.1%}.")
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    largest = max(chunks, key=lambda c: c.tokens + c.patches)
    return total.scaled(1 / min(len(numbers), size * len(chunks))), largest.scaled(MARGIN), notes


def _sides(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (side for side in (row["query"], row["target"], *(row["negatives"] or ())) if side is not None)


def _collator(config: RunConfig, rows: RowIndex) -> Collator | None:
    """The run's own collator, if that takes no download."""
    from crem.model.build import build_collator

    backbone = config.model.backbone
    if backbone is not None and not (os.path.isdir(backbone) or shipped(backbone)):
        from huggingface_hub import try_to_load_from_cache

        cached = "://" not in backbone and all(
            isinstance(try_to_load_from_cache(backbone, name), str) for name in ("tokenizer.json", "config.json")
        )
        if not cached:
            return None
    texts = training_texts(rows) if backbone is None else None
    return build_collator(config.model, texts=texts)


def _stored_patches(images: Mapping[int, bytes], config: RunConfig, shape: BackboneShape) -> dict[int, int]:
    """Patches of each image, from its stored size."""
    patches: dict[int, int] = {}
    for image_id, data in images.items():
        with Image.open(io.BytesIO(data)) as image:
            patches[image_id] = image_patches(*image.size, config.model.image, shape)
    return patches


def _estimated(rows: list[dict[str, Any]], patches: dict[int, int], config: RunConfig, shape: BackboneShape) -> Load:
    """A chunk of rows, from the lengths of its texts and the sizes of its images."""
    prompt, merged = config.model.prompt, shape.spatial_merge_size**2
    lengths: list[float] = []
    answers = 0
    distinct: set[int] = set()
    for row in rows:
        for side in _sides(row):
            item = item_of({**side, "images": None, "image_at": None}, lambda _: b"")
            instruction = prompt.embedding_instruction if item.instruction is None else item.instruction
            distinct.update(images := side["images"] or [])
            length = _tokens(item.text, prompt.max_text_tokens) + _tokens(instruction, 10**6)
            length += _TEMPLATE_TOKENS + config.model.chorus_tokens + sum(patches[i] // merged + 2 for i in images)
            if side is row["query"] and row["answer"] is not None and config.loss.alpha_g > 0:
                answer = _tokens(row["answer"], prompt.max_answer_tokens) + 1
                answers += answer
                length += answer + _tokens(row["question"], prompt.max_text_tokens) + 5
            lengths.append(length)
    return Load(
        tokens=sum(lengths),
        patches=sum(patches[i] for i in distinct),
        answer_tokens=answers,
        sequences=len(lengths),
        images=len(distinct),
        text_pairs=sum(n * n / 2 for n in lengths),
        vision_pairs=sum(patches[i] ** 2 for i in distinct),
    )


def _estimated_cuts(rows: list[dict[str, Any]], limit: int) -> CutCount:
    tokens = [_tokens(side["text"], 10**9) for row in rows for side in _sides(row)]
    return CutCount(len(tokens), sum(count > limit for count in tokens), max(tokens, default=0))


def _tokens(text: str | None, limit: int) -> int:
    return min(limit, math.ceil(len(text) / _CHARS_PER_TOKEN)) if text else 0
