"""The forecast of a run as lines of text (``crem train --dry-run``)."""

from __future__ import annotations

from crem.forecast.estimate import ASKED_DEVICES, UTILISATION, Forecast, Need

__all__ = ["summary"]


def summary(f: Forecast) -> str:
    """The report of a forecast."""
    return "\n".join([*_run(f), *_tasks(f), *_sizes(f), *_needs(f), *_notes(f)])


def _run(f: Forecast) -> list[str]:
    model, train = f.config.model, f.config.train
    trained = "full fine-tuning" if model.lora is None else f"LoRA r {model.lora.r}"
    offload = "" if train.offload == "none" else f" with offload ({train.offload})"
    chunks, share = train.chunks(train.workers), train.global_batch // train.workers
    return [
        f"run       {f.config.preset}: {trained}, ZeRO {train.zero_stage}{offload}, {train.precision}, "
        f"{train.workers} workers",
        f"model     {_count(f.weights.trained + f.weights.frozen)} parameters, {_count(f.weights.trained)} trained, "
        f"K = {model.chorus_tokens}",
        f"steps     {train.steps:,} of {train.global_batch:,} rows; a worker takes {share} in "
        f"{chunks} chunk{'s' * (chunks > 1)} of {f.chunk_rows}",
    ]


def _tasks(f: Forecast) -> list[str]:
    data = f.config.data
    if not f.tasks or f.epochs is None:
        return []
    retrieval, heterogeneous = sum(t.retrieval for t in f.tasks), sum(t.heterogeneous for t in f.tasks)
    turns = sum(t.with_turn for t in f.tasks)
    lines = [
        "",
        f"rows      {retrieval:,} retrieval ({turns:,} with a homogeneous turn), {heterogeneous:,} heterogeneous; "
        f" {f.epochs[0]:.1f} and {f.epochs[1]:.1f} epochs of them",
        f"mixing    data.retrieval_share {data.retrieval_share:g}, data.source_temperature "
        f"{data.source_temperature:g}, data.sub_batch {data.sub_batch}",
        f"          {'task':<28} {'retrieval':>10} {'with turn':>10} {'heterog.':>10} {'of batch':>11} {'epochs':>8}",
    ]
    return lines + [
        f"          {t.task:<28} {t.retrieval:>10,} {t.with_turn:>10,} {t.heterogeneous:>10,} {t.share:>11.1%} "
        f"{t.epochs:>8.2f}"
        for t in f.tasks
    ]


def _sizes(f: Forecast) -> list[str]:
    row, memory, batch = f.row, f.memory, f.config.train.global_batch
    parts = ("weights", "gradients", "optimizer", "buffers", "activations", "overhead")
    lines = [
        "",
        f"tokens    {row.tokens:,.0f} a row ({row.patches:,.0f} patches of {row.images:.2f} images, "
        f"{row.answer_tokens:.1f} of answers), {_count(row.tokens * batch)} a step, "
        f"{_count(row.tokens * batch * f.config.train.steps)} in all",
        f"memory    {_bytes(memory.total)} on each of {f.config.train.workers} workers, for a chunk of "
        f"{f.chunk.tokens:,.0f} tokens, {f.chunk.patches:,.0f} patches and {f.chunk.answer_tokens:,.0f} answer tokens",
    ]
    lines += [f"          {part:<12} {_bytes(getattr(memory, part)):>10}" for part in parts]
    return lines + ([f"          in the host's memory, for each worker: {_bytes(memory.host)}"] if memory.host else [])


def _needs(f: Forecast) -> list[str]:
    train = f.config.train
    device = f"TFLOP/s ({ASKED_DEVICES[0].label})" if train.gpus_per_worker else "GFLOP/s (CPU)"
    peak = f.worker_peak / (1e12 if train.gpus_per_worker else 1e9)
    return [
        "",
        *(_need(need, f.chunk_rows) for need in f.needs),
        f"time      {_duration(f.seconds)}: {_work(f.step_flops)} a step, {f.seconds / train.steps:.3g} s at "
        f"{UTILISATION:.0%} of {peak:.0f} {device} on each of {train.workers} workers",
    ]


def _need(need: Need, chunk_rows: int) -> str:
    if need.workers is None:
        return (
            f"needs     {need.device.label}: does not fit, {_bytes(need.memory.total)} with chunks of "
            f"{need.chunk_rows}; lower model.image.max_pixels, or add the overlay offload or offload-all to the preset"
        )
    smaller = f", with train.chunk_rows={need.chunk_rows}" if need.chunk_rows != chunk_rows else ""
    host = f" and {_bytes(need.memory.host * need.workers)} of the hosts' memory together" if need.memory.host else ""
    return (
        f"needs     {need.workers} GPU{'s' * (need.workers > 1)} of {need.device.label}{smaller}: "
        f"{_bytes(need.memory.total)} of each{host}; {_duration(need.seconds)}"
    )


def _notes(f: Forecast) -> list[str]:
    offload = ", nor between devices and the hosts' memory" if f.config.train.offload != "none" else ""
    estimates = [
        *f.notes,
        f"time assumes its utilisation, and does not count transfers between workers{offload}.",
        "memory includes estimates: the workspace of the backward pass, the process with its CUDA context and NCCL, "
        "and 5 % of fragmentation.",
    ]
    return ["", *(f"note      {note}" for note in estimates)]


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _count(number: float) -> str:
    for unit, name in ((1e9, " B"), (1e6, " M")):
        if number >= unit:
            return f"{number / unit:.2f}{name}"
    return f"{number:,.0f}"


def _work(flops: float) -> str:
    return f"{flops / 1e15:,.1f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:,.2f} TFLOP"


def _duration(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
