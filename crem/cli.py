"""The ``crem`` command: the composition root, and the one file here that imports the other packages, lazily.

Every job is one sub-command over one plain function. A run is described by a preset and ``section.key=value``
overrides, which may stand anywhere on the command line; ``--print-config`` shows the complete result.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import crem
from crem.config import RunConfig, load_config, preset_names
from crem.errors import ConfigError, CremError

__all__ = ["build_parser", "main"]

_SETTINGS = "Any setting: section.key=value, e.g. train.steps=100; --print-config shows them all."
_OVERRIDE = re.compile(r"^[a-z_]+(\.[A-Za-z_]+)+=", re.ASCII)


class Parser(argparse.ArgumentParser):
    """argparse, with ``section.key=value`` words taken out first, wherever they stand (up to a ``--``)."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        overrides = [w for w in words[:end] if _OVERRIDE.match(w)]
        rest = [w for w in words[:end] if not _OVERRIDE.match(w)] + words[end:]
        if "--print-config" in words[:end]:  # the configuration can be asked for without naming folders
            self._ask_for_nothing()
        parsed: argparse.Namespace = super().parse_args(rest, namespace)
        parsed.overrides = overrides
        return parsed

    def _ask_for_nothing(self) -> None:
        for jobs in (a for a in self._actions if isinstance(a, argparse._SubParsersAction)):
            for action in (a for job in jobs.choices.values() for a in job._actions):
                action.required = False
                if not action.option_strings:
                    action.nargs = "*" if action.nargs == "+" else "?"


def build_parser() -> Parser:
    """The command line of ``crem``."""
    parser = Parser(
        prog="crem",
        description="One multimodal model that finds and answers: from a raw corpus to a served model.",
        epilog="First steps: crem doctor; crem demo.   Help on a job: crem JOB --help",
    )
    parser.add_argument("--version", action="version", version=f"crem {crem.__version__}")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")

    def job(name: str, run: Callable[[argparse.Namespace], Any], help: str, example: str, preset: str) -> Any:
        sub = jobs.add_parser(
            name,
            help=help,
            description=help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {example}\n\n{_SETTINGS}",
        )
        sub.set_defaults(run=run)
        sub.add_argument(
            "--preset", default=preset, help=f"{', '.join(preset_names())}, or a YAML file (default {preset})"
        )
        sub.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
        sub.add_argument("-v", "--verbose", action="store_true", help="show the workers' logs and full tracebacks")
        return sub

    sub = job(
        "demo",
        _demo,
        "Run every job on the embedded emoji corpus and write report.html.",
        "crem demo --out out/demo",
        "micro+demo",
    )
    sub.add_argument("--out", default="out/demo", help="folder of the results (default out/demo)")

    sub = job(
        "prepare",
        _prepare,
        "Read a raw corpus, validate it, re-encode its images, write prepared and rejected tables.",
        "crem prepare s3://bucket/corpus --out s3://bucket/prepared --preset 2b",
        "micro",
    )
    sub.add_argument("source", help="raw corpus: folder or URI with rows (Parquet, JSONL) and images/ or images.zip")
    sub.add_argument("--out", required=True, help="folder or URI for the tables")

    sub = job(
        "graft",
        _graft,
        "Make a language model the language half of a Qwen2-VL with a new vision tower, the backbone of small-base.",
        "crem graft HuggingFaceTB/SmolLM2-135M-Instruct --out out/small/graft   |   crem graft model.gguf --out …",
        "small-base",
    )
    sub.add_argument("language_model", help="of Llama's architecture: folder, URI or hub name, or a .gguf file")
    sub.add_argument("--out", required=True, help="local folder for the checkpoint")

    sub = job(
        "train",
        _train,
        "Train a CREM model on prepared tables: DeepSpeed under Ray Train.",
        "crem train s3://bucket/prepared --out s3://bucket/run --preset 2b train.steps=5000 --resume",
        "2b",
    )
    sub.add_argument("prepared", nargs="?", help="folder or URI written by crem prepare")
    sub.add_argument("--out", help="folder or URI for checkpoints, metrics and the model")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="print rows, steps, tokens, memory, the GPUs needed and the time, and stop; PREPARED may be left out",
    )
    start = sub.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in --out, if there is one"
    )
    start.add_argument("--fresh", action="store_true", help="remove an earlier run in --out first")

    sub = job(
        "embed",
        _embed,
        "Embed every item of a table with a Ray Data actor pool; continues where it was interrupted.",
        "crem embed s3://bucket/items --model s3://bucket/run/model --out s3://bucket/vectors --preset 2b",
        "micro",
    )
    sub.add_argument("source", help="items (Parquet or JSONL with text, image, uri, id …), or a prepared folder")
    sub.add_argument("--model", required=True, help="checkpoint folder or URI")
    sub.add_argument("--out", required=True, help="folder or URI for the vectors")
    sub.add_argument("--fresh", action="store_true", help="remove an earlier run in --out first")

    sub = job(
        "index",
        _index,
        "Build a vector index from embeddings: exact below index.exact_below rows.",
        "crem index out/demo/embeddings --out out/demo/index",
        "micro",
    )
    sub.add_argument("embeddings", help="folder or URI written by crem embed")
    sub.add_argument("--out", required=True, help="folder or URI for the index")

    sub = job(
        "search",
        _search,
        "Find the items nearest to a text, an image, or both.",
        'crem search "a red apple" --index out/demo/index   |   crem search --image photo.png',
        "micro",
    )
    sub.add_argument("text", nargs="?", help="what to look for")
    sub.add_argument("--image", action="append", default=[], help="image to look for (may be repeated)")
    sub.add_argument("--index", default="out/demo/index", help="index folder or URI (default out/demo/index)")
    sub.add_argument("--model", help="checkpoint; the one named in the index by default")
    sub.add_argument("-k", type=int, default=10, help="number of results (default 10)")
    sub.add_argument("--json", action="store_true", help="print JSON lines")

    sub = job(
        "evaluate",
        _evaluate,
        "Precision@1 and @10 per direction and split, answers native and compressed, cache sizes.",
        "crem evaluate out/demo/prepared --model out/demo/model --out out/demo/evaluation",
        "micro",
    )
    sub.add_argument("prepared", help="prepared tables with test splits")
    sub.add_argument("--model", required=True, help="checkpoint folder or URI")
    sub.add_argument("--out", required=True, help="folder or URI for evaluation.json")

    sub = job(
        "ablate",
        _ablate,
        "Train and evaluate the paper's ablations with seeds and error bars, beside the paper's figures.",
        "crem ablate out/prepared --out out/ablation --seeds 0 1 2 model.scratch=null model.backbone=out/base/model",
        "micro",
    )
    sub.add_argument("prepared", help="prepared tables with test splits")
    sub.add_argument("--out", required=True, help="folder or URI for runs and report; continues what it holds")
    sub.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every variant (default 0 1 2)")
    sub.add_argument("--only", choices=["table3", "table4", "figure4"], help="only the variants of one of them")
    sub.add_argument("--report", action="store_true", help="run nothing; report what is finished")

    sub = job(
        "serve",
        _serve,
        "Serve embeddings and answers over HTTP (OpenAI's API) with Ray Serve.",
        "crem serve out/demo/model serve.port=8000",
        "micro",
    )
    sub.add_argument("model", help="checkpoint folder or URI")

    sub = job(
        "submit",
        _submit,
        "Submit any of these jobs to a running Ray cluster.",
        "crem submit --address http://127.0.0.1:8265 -- train s3://bucket/prepared --out s3://bucket/run --resume",
        "micro",
    )
    sub.add_argument("--address", help="URL of the cluster's job server (default http://127.0.0.1:8265)")
    sub.add_argument("--working-dir", help="local folder whose code is uploaded; otherwise the image's code runs")
    sub.add_argument("--no-wait", action="store_true", help="return once the job is accepted")
    sub.add_argument("command", nargs="+", metavar="JOB …", help="after --: a crem job with its arguments")

    sub = job(
        "doctor",
        _doctor,
        "Print versions, devices, memory and reachable storage, and what is missing with the command that mends it.",
        "crem doctor --storage s3://bucket",
        "micro",
    )
    sub.add_argument("--storage", action="append", default=[], help="path or URI that must be readable and writable")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    args = build_parser().parse_args(argv)
    _quieten(args.verbose)
    try:
        config = _config(args)  # a wrong key or value is refused before any work
        if args.print_config:
            print(config.to_yaml(), end="")
            return 0
        return int(args.run(args) or 0)
    except CremError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"crem {args.job}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except _submit_errors() as error:
        print(f"crem {args.job}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"crem {args.job}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
        return 1
    except Exception as error:
        traceback.print_exc()
        print(
            f"crem {args.job}: unexpected {type(error).__name__}: {error}\nThis is a bug in crem or in the cluster; "
            "please report it with the lines above and the output of crem doctor.",
            file=sys.stderr,
        )
        return 1


def _submit_errors() -> tuple[type[Exception], ...]:
    """``cluster`` imports nothing of ours, so its error is not a ``CremError``."""
    module = sys.modules.get("cluster.submit")
    return (module.SubmitError,) if module else ()


def _config(args: argparse.Namespace) -> RunConfig:
    return load_config(args.preset, args.overrides)


def _quieten(verbose: bool) -> None:
    """Our own log lines on standard error; the libraries' chatter only when asked for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if verbose:
        logging.getLogger("pipelines").setLevel(logging.DEBUG)
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of a Ray that we start; Ray Data's actors warn at "error"
    warnings.filterwarnings("ignore")
    for noisy in (
        "ray",
        "transformers",
        "deepspeed",
        "DeepSpeed",
        "fsspec",
        "httpx",
        "botocore",
        "aiobotocore",
        "faiss",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _demo(args: argparse.Namespace) -> None:
    from pipelines.demo.demo import demo

    print(demo(args.out, _config(args)))


def _prepare(args: argparse.Namespace) -> None:
    from pipelines.corpus.prepare import prepare

    m = prepare(args.source, args.out, _config(args))
    print(f"rows in {m['rows_in']} = out {m['rows_out']} + rejected {m['rejected']} + filtered {m['filtered']}")
    print(f"images  {m['images']}")
    for reason, count in sorted(m["by_reason"].items(), key=lambda pair: -pair[1]):
        print(f"  rejected {count:>8}  {reason}")


def _graft(args: argparse.Namespace) -> None:
    from crem.model.graft import graft

    config = _config(args)
    made = graft(args.language_model, args.out, config.graft, seed=config.train.seed)
    print(
        f"{made['out']}: {made['language'] / 1e6:.1f} M parameters, {made['vision'] / 1e6:.1f} M of a new vision tower"
    )
    print(f"next: crem train PREPARED --out out/small/base --preset small-base model.backbone={made['out']}")


def _train(args: argparse.Namespace) -> None:
    if args.dry_run:
        from crem.forecast.summary import summary
        from pipelines.training.dry_run import dry_run

        print(summary(dry_run(args.prepared, _config(args))))
        return
    if not args.prepared or not args.out:
        missing = "PREPARED, the tables" if not args.prepared else "--out, the folder of the run"
        raise ConfigError(f"{missing}, is missing: crem train PREPARED --out RUN; only --dry-run goes without")
    from pipelines.training.train import train

    result = train(args.prepared, args.out, _config(args), resume=args.resume, fresh=args.fresh)
    print(f"model       {result['model']}\nfingerprint {result['fingerprint']}\nsteps       {result['steps']}")


def _embed(args: argparse.Namespace) -> None:
    from pipelines.embedding.embed import embed

    r = embed(args.model, args.source, args.out, _config(args), fresh=args.fresh)
    print(
        f"rows in {r['rows_in']} = embedded {r['embedded']} + errors {r['errors']}   "
        f"{r['items_per_s']:.0f} items/s   fingerprint {r['fingerprint']}"
    )


def _index(args: argparse.Namespace) -> None:
    from pipelines.search.index import build

    print(json.dumps(build(args.embeddings, args.out, _config(args)), indent=2))


def _search(args: argparse.Namespace) -> None:
    if not args.text and not args.image:
        raise ConfigError('nothing to look for; give a text, crem search "a red apple", or --image FILE')
    from pipelines.search.search import Index, search

    opened = Index(args.index)
    model = args.model or opened.summary["model"]
    hits = search(
        args.index,
        model,
        crem.Item(text=args.text, images=tuple(Path(p) if "://" not in p else p for p in args.image)),
        args.k,
    )
    for place, hit in enumerate(hits, 1):
        if args.json:
            print(json.dumps({"rank": place, "id": hit.id, "score": hit.score, "uri": hit.uri, "text": hit.text}))
        else:
            print(f"{place:>3}  {hit.score:+.4f}  {hit.uri or hit.text or hit.id}")


def _evaluate(args: argparse.Namespace) -> None:
    from pipelines.evaluation.evaluate import evaluate
    from pipelines.evaluation.evaluation_text import evaluation_table

    print(evaluation_table(evaluate(args.model, args.prepared, args.out, _config(args))))


def _ablate(args: argparse.Namespace) -> None:
    from pipelines.ablation.ablate import ablate
    from pipelines.ablation.report import table

    seeds = tuple(args.seeds)
    result = ablate(args.prepared, args.out, _config(args), seeds=seeds, only=args.only, report_only=args.report)
    print(table(result))


def _serve(args: argparse.Namespace) -> None:
    from serve.app import run

    run(args.model, _config(args), blocking=True)


def _submit(args: argparse.Namespace) -> int:
    from cluster.submit import submit

    command = args.command[1:] if args.command[0] == "crem" else args.command
    if args.overrides:
        raise ConfigError(f"{args.overrides[0]!r} stands before the --, where no job reads it; put it behind")
    _config(build_parser().parse_args(command))  # a mistake is found here, not on the cluster
    return submit(["crem", *command], address=args.address, working_dir=args.working_dir, follow=not args.no_wait)


def _doctor(args: argparse.Namespace) -> int:
    from crem.doctor import examine

    report = examine(args.storage)
    print(report.text)
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
