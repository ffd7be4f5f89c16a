"""The jobs on corpora: what a place holds, prepared tables, and new versions of them. What a function imports is loaded
only when its job runs."""

from __future__ import annotations

from pathlib import Path

from crem.cli.command_line import Config, Options, Place, Preset, Setting, job


@job
def inspect(
    source: Place,
    /,
    *settings: Setting,
    html: str | None = None,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Say what a place holds and what prepare would do with it: format, rows, columns, samples, rejections.

    example:
      crem inspect s3://bucket/corpus --html corpus.html

    Args:
        source: raw corpus, as for prepare
        html: also write it as a page with the images of the samples
    """
    from pipelines.corpus.inspection import inspect_source
    from pipelines.corpus.inspection_page import inspection_page, inspection_text

    found = inspect_source(source, config)
    print(inspection_text(found))
    if html is not None:
        Path(html).write_text(inspection_page(found), encoding="utf-8")
        print(f"page: {html}")


@job
def prepare(
    source: Place,
    /,
    *settings: Setting,
    out: str,
    fresh: bool = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Read a raw corpus, validate it, re-encode its images, write prepared and rejected tables.

    Interrupted, it continues when it is run again; finished, it does nothing.

    example:
      crem prepare s3://bucket/corpus --out s3://bucket/prepared --preset 2b

    Args:
        source: raw corpus: folder or URI with rows (Parquet, JSONL) and images/ or images.zip
        out: folder or URI for the tables
        fresh: prepare anew what is finished or was interrupted
    """
    from pipelines.corpus.prepare import prepare
    from pipelines.tables.manifest import FILTER_STAGES
    from pipelines.tables.richness import shrunk_images

    made = prepare(source, out, config, fresh=fresh)
    print(f"rows in {made.rows_in} = out {made.rows_out} + rejected {made.rejected} + filtered {made.filtered}")
    print(f"images  {made.images}")
    if (shrunk := shrunk_images(made)) is not None:
        print(f"  {shrunk}")
    if made.images_truncated:
        print(f"  {made.images_truncated} images lack the end of their files (model.image.allow_truncated)")
    for split, count in made.unread_splits.items():
        print(f"  no job reads split {split!r}, {count} rows: name it train…, validation… or test…")
    for name, count in made.unknown_columns.items():
        print(f"  column {name!r} is not read, {count} records")
    for stage, reasons in made.by_stage.items():
        for reason, count in sorted(reasons.items(), key=lambda pair: -pair[1]):
            print(f"  {'filtered' if stage in FILTER_STAGES else 'rejected'} {count:>8}  {stage}: {reason}")


@job
def verify(
    prepared: Place, /, *settings: Setting, preset: Preset = "micro", options: Options | None = None, config: Config
) -> int:
    """Check what prepare or embed wrote against its manifest: counts, files, checksums, ids, images, models.

    example:
      crem verify s3://bucket/prepared

    Args:
        prepared: folder or URI written by crem prepare or crem embed
    """
    from pipelines.corpus.verify import verify
    from pipelines.embedding.live_parts import Growth
    from pipelines.embedding.output import EmbedManifest
    from pipelines.embedding.verify_embeddings import verify_embeddings
    from pipelines.tables.storage import Folder

    folder = Folder.at(prepared)
    if EmbedManifest.read(folder) is not None or Growth.read(folder) is not None:
        made = verify_embeddings(prepared)
        for fault in made.faults:
            print(fault)
        state = f"{len(made.faults)} faults; crem embed --repair mends them" if made.faults else "all is well"
        print(f"{made.shards} shards, {made.parts} parts: {made.rows} rows, {made.embedded} embedded: {state}")
        if made.gone:
            print(f"{made.gone} rows count no more, because the input has changed")
        if made.repeated_ids:
            print(f"{made.repeated_ids} rows have an id that an earlier row has")
        return 1 if made.faults else 0
    found = verify(prepared)
    for fault in found.faults:
        print(fault)
    state = f"{len(found.faults)} faults" if found.faults else "all is well"
    print(f"{found.parts} parts: {found.rows} rows, {found.images} images, {found.rejected} left out: {state}")
    return 1 if found.faults else 0


@job
def synthesise(
    prepared: Place,
    /,
    *settings: Setting,
    out: str,
    preset: Preset = "2b",
    options: Options | None = None,
    config: Config,
) -> None:
    """Have another model write questions and answers about the queries of prepared tables; continues where it stopped.

    example:
      vllm serve Qwen/Qwen2.5-VL-7B-Instruct
      crem synthesise s3://bucket/prepared --out s3://bucket/asked \\
        synthesise.base_url=http://localhost:8000/v1 synthesise.model=Qwen/Qwen2.5-VL-7B-Instruct

    Args:
        prepared: folder or URI of prepared tables
        out: folder or URI for a new version of the tables, with the questions; crem train takes it
    """
    from pipelines.synthesis.synthesise import synthesise

    made = synthesise(prepared, out, config)
    print(f"rows {made.rows_in}   new questions {made.questions}")
    for reason, count in sorted(made.by_reason.items(), key=lambda pair: -pair[1]):
        print(f"  no new question {count:>8}  {reason}")
    cost = f"   cost {made.cost:.4f}" if made.cost else ""
    print(
        f"requests {made.spent.requests}   tokens {made.spent.prompt_tokens} in, {made.spent.answer_tokens} out{cost}"
    )


@job
def mine(
    prepared: Place,
    /,
    *settings: Setting,
    out: str,
    model: str | None = None,
    vectors: list[str] | None = None,
    preset: Preset = "2b",
    options: Options | None = None,
    config: Config,
) -> None:
    """Find hard negatives for the rows of prepared tables: near targets that are not likely to be right.

    example:
      crem mine s3://bucket/prepared --model s3://bucket/run/model --out s3://bucket/mined mine.negatives=4

    Args:
        prepared: folder or URI of prepared tables
        model: checkpoint folder or URI, with which queries and targets are embedded that have no vector yet
        vectors: what crem embed or crem index made of the tables; may be repeated
        out: folder or URI for a new version of the tables, with the negatives; crem train takes it
    """
    from pipelines.mining.mine import mine

    made = mine(model, prepared, out, config, vectors or ())
    print(f"rows {made.rows}   negatives added {made.negatives}   dropped as false negatives {made.dropped}")
    for reason, count in sorted(made.by_reason.items(), key=lambda pair: -pair[1]):
        print(f"  fewer than asked for {count:>8}  {reason}")
