"""Typed configuration of every run: one frozen tree, validated once at the edge.

``load_config("micro", ["train.steps=100"])`` reads ``presets/micro.yaml``, applies the overrides and returns a
``RunConfig``. A preset may be short: ``base: 2b`` lays it over another one. Unknown keys are refused with the nearest
known name. This module imports neither torch nor Ray, so that ``crem --help`` and ``--print-config`` are immediate.

Sources of defaults, named at each field: *paper* is arXiv 2602.19091; *VLM2Vec-V2* is that project's public
recipe for the same backbone (Qwen2-VL-2B on 8 H100), used where the paper leaves a value open; *ours* is a choice
of this project.
"""

from __future__ import annotations

import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from crem.config.run import RunConfig
from crem.errors import ConfigError

__all__ = ["load_config", "preset_names"]


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    return sorted(p.name[:-5] for p in resources.files("crem.config.presets").iterdir() if p.name.endswith(".yaml"))


def load_config(preset: str | os.PathLike[str] = "2b", overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a preset and apply overrides.

    Args:
        preset: name of a shipped preset, or the path of a YAML file of the same shape.
        overrides: ``section.key=value`` strings; values are parsed as YAML (``model.lora=null``).

    Raises:
        ConfigError: unknown preset or key (the nearest known name is given), or a value out of bounds.
    """
    tree = _read_preset(preset)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. train.steps=100")
        try:
            _assign(tree, key.strip(), _read_yaml(_scientific(value), f"override {override!r}"))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from error
    return _validate(tree)


def _scientific(value: str) -> str:
    """YAML 1.1 reads ``5e-5`` as text; a person who types it means a number."""
    try:
        return repr(float(value)) if "e" in value.lower() else value
    except ValueError:
        return value


def _read_preset(preset: str | os.PathLike[str], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree of a preset. One that names a ``base`` is laid over it; ``above`` are those that led here."""
    name = os.fspath(preset)
    if name in above:
        raise ConfigError(f"preset {name!r} is its own base: {' -> '.join([*above, name])}; remove one base:")
    file = Path(str(resources.files("crem.config.presets") / f"{name}.yaml")) if name in preset_names() else Path(name)
    if not file.is_file():
        known = preset_names()
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        asked = f"base of {above[-1]!r}: " if above else ""
        raise ConfigError(
            f"{asked}unknown preset {name!r}{hint} Known: {', '.join(known)}, or the path of a YAML file."
        )
    try:
        tree = _read_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: a configuration is a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("base", None)
    return tree if base is None else _laid_over(_read_preset(str(base), (*above, name)), tree)


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a mapping holds each key once; PyYAML by itself takes the last value without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise ConfigError(
                    f"{self.name}, line {line}: key {name!r} is given twice, first in line {lines[name]}; remove one"
                )
            lines[name] = line
        return node


def _read_yaml(text: str, name: str) -> Any:
    """The value of a YAML document; ``name`` is the file or override that errors name."""
    loader = _UniqueKeys(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; any other value, ``null`` too, replaces what is below it."""
    merged = dict(below)
    for key, value in above.items():
        held = merged.get(key)
        merged[key] = _laid_over(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return merged


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, leaf = dotted.split(".")
    for section in sections:
        below = tree.get(section)
        if below is None:
            below = tree[section] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"override {dotted!r}: {section!r} is a value, not a section")
        tree = below
    tree[leaf] = value


def _validate(tree: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from error


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where or 'config'}: {error['msg']} (got {error['input']!r})"
    siblings = _keys_at(error["loc"][:-1])
    near = difflib.get_close_matches(str(error["loc"][-1]), siblings, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*map(str, error['loc'][:-1]), near[0]])!r}?" if near else ""
    return f"unknown key {where!r}; {hint or 'known here: ' + ', '.join(siblings)}"


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    """Field names of the section at ``path``; optional sections are looked through."""
    section: Any = RunConfig
    for part in path:
        if part not in section.model_fields:
            return []
        annotation = section.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)
