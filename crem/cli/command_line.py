"""From the words of a command line to a job and its arguments.

Each job is a typed function (``corpus_jobs``, ``model_jobs``, ``evaluation_jobs``, ``operations``); cyclopts reads its
signature and docstring. Chosen over typer, because its parse errors are public exceptions, one line with the nearest
job or option (typer's are a private copy of click's), and because completers and parameters passed by the caller belong
to the signature. Around it: ``section.key=value`` words are taken out first, so that they may stand anywhere before a
``--``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

from cyclopts import App, CycloptsError, Group, MissingArgumentError, Parameter
from cyclopts.validators import MutuallyExclusive

import crem
from crem.cli.completion import complete_presets, complete_settings
from crem.config import RunConfig, overlay_names, preset_names
from crem.errors import ConfigError

__all__ = ["START", "CommandLine", "Config", "Options", "Place", "Preset", "Setting", "app", "job", "parse"]

F = TypeVar("F", bound=Callable[..., Any])
_OVERRIDE = re.compile(r"^[a-z_]+(\.[A-Za-z_]+)+=", re.ASCII)
_PRESETS = f"{', '.join(preset_names())}, with any of +{', +'.join(overlay_names())}; or a YAML file"

app = App(
    name="crem",
    version=f"crem {crem.__version__}",
    help="One multimodal model that finds and answers: from a raw corpus to a served model.",
    help_epilogue="First steps: crem doctor; crem demo.   Help on a job: crem JOB --help",
    help_flags=["--help", "-h"],
    help_format="plaintext",
    default_parameter=Parameter(negative="", allow_repeating=True, show_default=lambda value: value or None),
    result_action="return_value",
)
_order = itertools.count()


def job(function: F) -> F:
    """Make a function a job, listed in the order of the file."""
    app.command(function, sort_key=next(_order), help_epilogue="")
    return function


Config = Annotated[RunConfig, Parameter(parse=False)]
"""The configuration from ``--preset`` and the settings; ``crem.cli.entry`` passes it."""
Preset = Annotated[str, Parameter(completer=complete_presets, help=_PRESETS)]
Setting = Annotated[
    str,
    Parameter(
        completer=complete_settings,
        help="any setting as section.key=value, e.g. train.steps=100; --print-config prints them all",
    ),
]
Place = Annotated[str, Parameter(completer=complete_settings)]
"""A positional folder, URI or text; settings may stand before it."""
START = Group("Start", validator=MutuallyExclusive())


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every job."""

    print_config: bool = False
    """print the complete configuration and stop"""
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"])] = False
    """show the workers' logs and full tracebacks"""


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line.

    Attributes:
        job: name of the job, empty for ``--help`` and the like.
        call: the job with its arguments, all but ``config``.
        preset: preset that it names or has by default; None where no configuration is needed.
        overrides: its ``section.key=value`` words, in order.
    """

    job: str
    call: Callable[..., int | None]
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    print_config: bool = False
    verbose: bool = False


def parse(words: Sequence[str]) -> CommandLine:
    """Read the words behind ``crem``.

    Raises:
        ConfigError: unknown job or option (the nearest is named), a missing or malformed value, a stray word.
    """
    if words[:1] == ["__complete"]:  # the completion script asks for candidates: the words are a line half typed
        return CommandLine("", partial(app, list(words)))
    end = list(words).index("--") if "--" in words else len(words)
    overrides = tuple(w for w in words[:end] if _OVERRIDE.match(w))
    rest = [w for w in words[:end] if not _OVERRIDE.match(w)]
    try:
        function, bound, injected = _bind([*rest, *words[end:]], fill="--print-config" in rest)
    except CycloptsError as error:
        job = " ".join(["crem", *(error.command_chain or ())])
        raise ConfigError(f"{str(error).rstrip('.')}. See {job} --help.") from error
    call = partial(function, *bound.args, **bound.kwargs)
    if "config" not in injected:
        return CommandLine("", call)
    bound.apply_defaults()
    stray = bound.arguments.get("settings", ())
    if stray:
        raise ConfigError(f"unexpected word {stray[0]!r}; a setting is section.key=value, e.g. train.steps=100")
    if overrides and "settings" not in bound.arguments:
        raise ConfigError(f"{overrides[0]!r} stands before the --, where no job reads it; put it behind")
    options: Options = bound.arguments["options"] or Options()
    return CommandLine(
        function.__name__, call, bound.arguments["preset"], overrides, options.print_config, options.verbose
    )


def _bind(words: list[str], fill: bool) -> Any:
    """cyclopts' function, bound arguments and injected parameters; ``fill`` stands in for required ones left out."""
    filled: set[str] = set()
    while True:
        try:
            return app.parse_args(words, exit_on_error=False, print_error=False)
        except MissingArgumentError as error:
            name = error.argument.name if error.argument else ""
            if not fill or not name or name in filled:
                raise
            filled.add(name)
            words = [words[0], *([name] if name.startswith("-") else []), "unnamed", *words[1:]]
