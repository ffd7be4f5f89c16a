"""Run one command line: parse it, load the configuration, call the job, turn errors into messages and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

# The jobs register themselves, in the order of crem --help.
# isort: off
import crem.cli.corpus_jobs
import crem.cli.model_jobs
import crem.cli.evaluation_jobs
import crem.cli.operations  # noqa: F401

# isort: on
from crem.cli.command_line import CommandLine, parse
from crem.config import load_config
from crem.errors import ConfigError, CremError

__all__ = ["main"]

_CHATTY = (
    "ray",
    "transformers",
    "deepspeed",
    "DeepSpeed",
    "fsspec",
    "httpx",
    "botocore",
    "aiobotocore",
    "lance",
    "lancedb",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns the exit code: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, verbose = "crem", False
    try:
        line = parse(words)
        name, verbose = f"crem {line.job}".rstrip(), line.verbose
        _configure_logging(verbose)
        code = _run(line)
        return code if words else 2
    except CremError as error:
        if verbose:
            traceback.print_exc()
        print(f"{name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the output has closed it
        return 1
    except Exception as error:
        traceback.print_exc()
        print(
            f"{name}: unexpected {type(error).__name__}: {error}\nThis is a bug in crem or in the cluster; "
            "please report it with the lines above and the output of crem doctor.",
            file=sys.stderr,
        )
        return 1


def _run(line: CommandLine) -> int:
    if line.preset is None:  # --help, --version, completion
        return int(line.call() or 0)
    config = load_config(line.preset, line.overrides)  # a wrong key or value is refused before any work
    if line.print_config:
        print(config.to_yaml(), end="")
        return 0
    return int(line.call(config=config) or 0)


def _configure_logging(verbose: bool) -> None:
    """Our own log lines on standard error; the libraries' log lines only with ``--verbose``."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    if verbose:
        logging.getLogger("pipelines").setLevel(logging.DEBUG)
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("LANCE_LOG", "error")  # it warns of every dataset that it creates
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of a Ray started here; Ray Data's actors warn at "error"
    warnings.filterwarnings("ignore")
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
