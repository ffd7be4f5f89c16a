"""Shell completion: candidates from the presets and the typed settings, and the script that asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from cyclopts import App
from pydantic.fields import FieldInfo

from crem.config import RunConfig, overlay_names, preset_names, settings

__all__ = ["SHELLS", "complete_presets", "complete_settings", "script"]

SHELLS = Literal["bash", "zsh", "fish"]

_BASH = """
# A word goes on after "section.key=", and neither "=" nor ":" (s3://...) ends one. Files where nothing else fits.
COMP_WORDBREAKS=${COMP_WORDBREAKS//[=:]/}
_crem_words() { _crem; [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace; return 0; }
complete -o default -F _crem_words crem
"""


def complete_presets(context: Any) -> list[str]:
    """Presets for the word being typed: bases, then overlays behind a ``+``."""
    base, plus, _ = context.incomplete.rpartition("+")
    return [f"{base}+{name}" for name in overlay_names()] if plus else preset_names()


def complete_settings(context: Any) -> list[tuple[str, str]]:
    """``section.key=`` with the setting's docstring; nothing for an empty word, which may become a file's name."""
    word: str = context.incomplete
    return [found for found in _candidates() if word and found[0].startswith(word)]


def _candidates() -> Iterator[tuple[str, str]]:
    for key, field in settings(RunConfig):
        text = " ".join((field.description or "").split())
        for value in _values(field) or [""]:
            yield f"{key}={value}", text


def _values(field: FieldInfo) -> list[str]:
    """The values of a setting that has only a few."""
    if field.annotation is bool:
        return ["true", "false"]
    return [str(v) for v in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []


def script(app: App, shell: SHELLS) -> str:
    """The completion script of a shell, to be evaluated in its start-up file."""
    return app.generate_completion(prog_name="crem", shell=shell) + (_BASH if shell == "bash" else "")
