"""The jobs that make a model and find with it: train, embed, index, search, answer. What a function imports is loaded
only when its job runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from crem.cli.command_line import START, Config, Options, Place, Preset, Setting, job
from crem.errors import ConfigError


@job
def graft(
    language_model: Place,
    /,
    *settings: Setting,
    out: str,
    preset: Preset = "small-base",
    options: Options | None = None,
    config: Config,
) -> None:
    """Make a language model the language half of a Qwen2-VL with a new vision tower, the backbone of small-base.

    example:
      crem graft HuggingFaceTB/SmolLM2-135M-Instruct --out out/small/graft
      crem graft model.gguf --out out/small/graft

    Args:
        language_model: a model of Llama's architecture: folder, URI or hub name, or a .gguf file
        out: local folder for the checkpoint
    """
    from crem.model.graft import graft

    made = graft(language_model, out, config.graft, seed=config.train.seed)
    print(
        f"{made.out}: {made.language_parameters / 1e6:.1f} M parameters of the language model, "
        f"{made.vision_parameters / 1e6:.1f} M of a new vision tower"
    )
    print(f"next: crem train PREPARED --out out/small/base --preset small-base model.backbone={made.out}")


@job
def train(
    prepared: Place | None = None,
    /,
    *settings: Setting,
    out: str | None = None,
    dry_run: bool = False,
    resume: Annotated[bool, Parameter(group=START)] = False,
    fresh: Annotated[bool, Parameter(group=START)] = False,
    preset: Preset = "2b",
    options: Options | None = None,
    config: Config,
) -> None:
    """Train a CREM model on prepared tables: DeepSpeed under Ray Train.

    example:
      crem train s3://bucket/prepared --out s3://bucket/run --preset 2b train.steps=5000 --resume

    Args:
        prepared: folder or URI written by crem prepare
        out: folder or URI for checkpoints, metrics and the model
        dry_run: print rows, steps, tokens, memory, the GPUs needed and the time, and stop; PREPARED may be left out
        resume: continue from the newest checkpoint in --out, if there is one
        fresh: remove an earlier run in --out first
    """
    if dry_run:
        from crem.forecast.summary import summary
        from pipelines.training.dry_run import dry_run as forecast

        print(summary(forecast(prepared, config)))
        return
    if not prepared or not out:
        missing = "PREPARED, the tables" if not prepared else "--out, the folder of the run"
        raise ConfigError(f"{missing}, is missing: crem train PREPARED --out RUN; only --dry-run works without")
    from pipelines.training.train import train

    result = train(prepared, out, config, resume=resume, fresh=fresh)
    print(f"model       {result.model}\nfingerprint {result.fingerprint}\nsteps       {result.steps}")


@job
def embed(
    source: Place,
    /,
    *settings: Setting,
    model: str,
    out: str,
    fresh: bool = False,
    repair: bool = False,
    grow: bool = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Embed every item of a table with a pool of models; continues where it was interrupted.

    crem verify OUT checks the result; --repair embeds anew what is missing or damaged.

    example:
      crem embed s3://bucket/items --model s3://bucket/run/model --out s3://bucket/vectors --preset 2b

    Args:
        source: items (Parquet or JSONL with text, image, uri, id …), or a prepared folder
        model: checkpoint folder or URI
        out: folder or URI for the vectors
        fresh: remove an earlier run in --out first
        repair: read all that is done, and embed anew the shards with a missing or damaged part
        grow: SOURCE has other files than before: embed the new and changed ones, and leave out the rows of those gone
    """
    from pipelines.embedding.embed import embed

    made = embed(model, source, out, config, fresh=fresh, repair=repair, grow=grow)
    print(
        f"rows in {made.rows_in} = embedded {made.embedded} + errors {made.errors}   "
        f"{made.items_per_s:.0f} items/s   fingerprint {made.fingerprint}"
    )
    if made.rows_in > made.resumed:
        start, middle, end = made.idle
        print(f"  models idle {start:.0%} at the start, {middle:.0%} in the middle, {end:.0%} at the end")
    if made.cost is not None:
        print(f"  cost {made.cost:.2f}")
    if made.failed:
        print("  errors: " + ", ".join(f"{count:,} {reason}" for reason, count in made.failed.items()))
    if made.gone:
        print(f"  {made.gone:,} rows of files that changed or are gone count no more; --fresh removes them")
    if made.repeated_ids:
        print(f"  {made.repeated_ids:,} rows have an id that an earlier row has")
    if made.cut_sentence is not None:
        print(f"  {made.cut_sentence}; split such texts into several items")


@job
def plan(
    source: Place,
    /,
    *settings: Setting,
    model: str,
    items: int | None = None,
    measure: bool = False,
    tokens_per_s: float | None = None,
    accelerators: int = 1,
    price: float | None = None,
    sample: int = 1000,
    json_output: Annotated[bool, Parameter(name="--json")] = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Say what crem embed would take: time, accelerators, cost, storage, from a sample of the items.

    example:
      crem plan items.jsonl --model crem-micro --measure
      crem plan items.jsonl --model crem-micro --items 1000000000 --tokens-per-s 50000 --accelerators 64 --price 2.5

    Args:
        source: items, as crem embed reads them; a part of them will do with --items
        model: checkpoint folder or URI
        items: how many there will be; by default those of SOURCE
        measure: measure tokens a second with the model on this machine
        tokens_per_s: tokens a second of one accelerator, where it is known
        accelerators: how many work at once
        price: of an accelerator for an hour, in any currency
        sample: items to read
        json_output: print JSON
    """
    if measure == (tokens_per_s is not None):
        raise ConfigError("the speed of the model is needed: give --measure, or --tokens-per-s with a number")
    from pipelines.embedding.cost_plan import plan_cost

    found = plan_cost(
        source,
        model,
        config,
        items=items,
        tokens_per_s=tokens_per_s,
        accelerators=accelerators,
        price_per_hour=price,
        sampled=sample,
    )
    print(json.dumps(found.described(), indent=2) if json_output else found.text)


@job
def index(
    embeddings: Place,
    /,
    *settings: Setting,
    out: str,
    fresh: bool = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Build an index from embeddings, or bring it up to date: exact search below index.exact_below vectors.

    example:
      crem index out/demo/embeddings --out out/demo/index
      crem index s3://bucket/vectors --out s3://bucket/index index.full_text=true 'index.filters=[price]'

    Args:
        embeddings: folder or URI written by crem embed
        out: folder or URI for the index
        fresh: index all anew; searches read the old version until then
    """
    from pipelines.search.index import build
    from pipelines.search.index_text import index_text

    print(index_text(build(embeddings, out, config, fresh=fresh)))


@job
def search(
    text: Place | None = None,
    /,
    *settings: Setting,
    image: list[str] | None = None,
    index: str = "out/demo/index",
    model: str | None = None,
    k: Annotated[int, Parameter(name="-k")] = 10,
    where: str | None = None,
    hybrid: bool = False,
    rerank: bool = False,
    html: str | None = None,
    json_lines: Annotated[bool, Parameter(name="--json")] = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Find the items nearest to a text, an image, or both.

    example:
      crem search "a red apple" --index out/demo/index
      crem search --image photo.png --where "price < 10 AND brand = 'acme'"

    Args:
        text: what to look for
        image: image to look for; may be repeated
        index: index folder or URI
        model: checkpoint; by default the one named in the index
        k: number of results
        where: condition on the columns of the index, in SQL
        hybrid: rank by the words of the text as well; the index needs index.full_text=true
        rerank: order the best 100 by their chorus states (MaxSim); the index needs those of embed.states=true
        html: also write the hits as a page with their pictures, read from where the items came from
        json_lines: print JSON lines
    """
    from pipelines.search.index_text import hit_json, hit_line
    from pipelines.search.search import Query, search

    query = Query(text, _images(image), k, where, hybrid=hybrid, rerank=rerank)
    hits = search(index, model, query)
    for rank, hit in enumerate(hits, 1):
        print(hit_json(rank, hit) if json_lines else hit_line(rank, hit))
    if html is not None:
        from pipelines.search.hits_page import write_hits_page

        write_hits_page(html, index, query, hits, config)
        print(f"page: {html}", file=sys.stderr if json_lines else sys.stdout)


@job
def answer(
    question: Place,
    /,
    *settings: Setting,
    find: str | None = None,
    image: list[str] | None = None,
    index: str = "out/demo/index",
    model: str | None = None,
    k: Annotated[int, Parameter(name="-k")] = 1,
    where: str | None = None,
    hybrid: bool = False,
    rerank: bool = False,
    max_tokens: int = 64,
    json_lines: Annotated[bool, Parameter(name="--json")] = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Find items and answer a question about each from its stored memory alone, without its text or picture.

    There is one answer for each source, under its score and name; -k says for how many. The index needs the memories
    that crem embed writes by embed.memory=bf16 or int8.

    example:
      crem answer "Which group does it belong to?" --find "red apple" --index out/index
      crem answer "What is this?" --image photo.png --index out/index -k 3

    Args:
        question: what to answer; it also finds the sources, where neither --find nor --image is given
        find: text that finds the sources
        image: image that finds the sources; may be repeated
        index: index folder or URI
        model: checkpoint; by default the one named in the index
        k: number of sources, each with an answer of its own
        where: condition on the columns of the index, in SQL
        hybrid: rank by the words of the text as well; the index needs index.full_text=true
        rerank: order the best 100 by their chorus states (MaxSim); the index needs those of embed.states=true
        max_tokens: most tokens of an answer
        json_lines: print JSON lines, each when its answer is complete
    """
    from pipelines.search.index_text import answer_json, source_line
    from pipelines.search.memory_answers import answers
    from pipelines.search.search import Query

    images = _images(image)
    text = question if find is None and not images else find
    query = Query(text, images, k, where, hybrid=hybrid, rerank=rerank)
    found = 0
    for found, sourced in enumerate(answers(index, model, question, query, max_new_tokens=max_tokens), 1):
        if not json_lines:
            print(source_line(found, sourced.hit), end="\n     ", flush=True)
        for piece in sourced.pieces:
            if not json_lines:
                print(piece if isinstance(piece, str) else "\n", end="", flush=True)
            elif not isinstance(piece, str):
                print(answer_json(found, sourced.hit, piece), flush=True)
    if not found:
        print("no item meets the condition; there is no answer", file=sys.stderr)


def _images(names: list[str] | None) -> tuple[Path | str, ...]:
    """Images of a query: paths are read as they are, URIs by the settings of the model."""
    return tuple(Path(name) if "://" not in name else name for name in names or ())
