"""The jobs on machines: serve a model, submit to a cluster, examine this machine, complete in this shell."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from crem.cli import completion as shell_completion
from crem.cli.command_line import Config, Options, Place, Preset, Setting, app, job, parse
from crem.config import load_config
from crem.errors import ConfigError


@job
def serve(
    model: Place,
    /,
    *settings: Setting,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> None:
    """Serve embeddings and answers over HTTP (OpenAI's API) with Ray Serve.

    example:
      crem serve out/demo/model serve.port=8000

    Args:
        model: checkpoint folder or URI
    """
    from serve.app import run

    run(model, config, blocking=True)


@job
def submit(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    address: str | None = None,
    working_dir: str | None = None,
    no_wait: bool = False,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> int:
    """Submit any of these jobs to a running Ray cluster.

    example:
      crem submit --address http://127.0.0.1:8265 -- train s3://bucket/prepared --out s3://bucket/run --resume

    Args:
        command: behind --, a crem job with its arguments
        address: URL of the cluster's job server (default http://127.0.0.1:8265)
        working_dir: local folder whose code is uploaded; otherwise the image's code runs
        no_wait: return once the job is accepted
    """
    from cluster.submit import submit

    words = list(command[1:] if command[:1] == ("crem",) else command)
    if not words:
        raise ConfigError("a job is missing: crem submit -- JOB …, e.g. crem submit -- doctor")
    line = parse(words)  # a mistake is found here, not on the cluster
    if line.preset is not None:
        load_config(line.preset, line.overrides)
    return submit(["crem", *words], address=address, working_dir=working_dir, follow=not no_wait)


@job
def doctor(
    *settings: Setting,
    storage: list[str] | None = None,
    preset: Preset = "micro",
    options: Options | None = None,
    config: Config,
) -> int:
    """Print versions, devices, memory and reachable storage, and what is missing with the command that fixes it.

    example:
      crem doctor --storage s3://bucket

    Args:
        storage: path or URI that must be readable and writable; may be repeated
    """
    from crem.doctor import examine

    report = examine(storage or ())
    print(report.text)
    return 0 if report.healthy else 1


@job
def completion(shell: shell_completion.SHELLS, /) -> None:
    """Print the completion script of a shell: jobs, options, presets and settings.

    example:
      eval "$(crem completion bash)"      in ~/.bashrc; zsh alike
      crem completion fish | source       in ~/.config/fish/config.fish
    """
    print(shell_completion.script(app, shell))
