"""From a preset and overrides to the typed configuration, validated once at the edge.

``load_config("2b+full", ["train.steps=100"])`` reads the preset (``crem.config.presets``), applies the overrides and
returns a ``RunConfig``. An unknown key is refused with the nearest known one. The modules of ``crem.config`` import
neither torch nor Ray, so that ``crem --help`` and ``--print-config`` are immediate.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from crem.config.presets import read_preset, read_yaml
from crem.config.run import RunConfig
from crem.config.section import Section, section_of
from crem.errors import ConfigError

__all__ = ["config_error", "load_config"]


def load_config(preset: str | os.PathLike[str] = "2b", overrides: Sequence[str] = ()) -> RunConfig:
    """Read a preset and apply overrides.

    Args:
        preset: a shipped preset with or without overlays (``2b+full+64gpu``), or the path of a YAML file.
        overrides: ``section.key=value`` strings; values are parsed as YAML (``model.lora=null``). The last of several
            for one key wins.

    Raises:
        ConfigError: unknown preset or key (the nearest known name is given), or a value out of bounds.
    """
    tree = read_preset(preset)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=100")
        _assign(tree, key.strip(), read_yaml(_scientific(value), f"override {override!r}"))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise config_error(error, RunConfig) from error


def config_error(error: ValidationError, root: type[Section]) -> ConfigError:
    """What pydantic found wrong in a ``root``, one line each."""
    return ConfigError("\n".join(_explain(e, root) for e in error.errors()))


def _scientific(value: str) -> str:
    """YAML 1.1 reads ``5e-5`` as text; who types it means a number."""
    try:
        return repr(float(value)) if "e" in value.lower() else value
    except ValueError:
        return value


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for section in sections:
        below = tree.get(section)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {key!r}: {section!r} is a value, not a section")
        tree = below
    tree[leaf] = value


def _explain(error: ErrorDetails, root: type[Section]) -> str:
    """One line for one of pydantic's errors."""
    *sections, leaf = map(str, error["loc"]) if error["loc"] else [""]
    where = ".".join([*sections, leaf])
    if error["type"] != "extra_forbidden":
        return f"{where or 'config'}: {error['msg']} (got {error['input']!r})"
    known = _keys_at(sections, root)
    near = difflib.get_close_matches(leaf, known, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*sections, near[0]])!r}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"


def _keys_at(path: Sequence[str], root: type[Section]) -> list[str]:
    """Field names of the section at ``path`` below ``root``."""
    section: type[Section] | None = root
    for part in path:
        section = section_of(section.model_fields[part]) if section and part in section.model_fields else None
    return list(section.model_fields) if section else []
