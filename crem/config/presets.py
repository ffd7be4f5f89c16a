"""Presets: YAML files that compose, ``2b+full+64gpu``.

A name is a base (``presets/2b.yaml``) and any number of overlays (``presets/overlays/full.yaml``), merged from left to
right: sections key by key, any other value replaced. The path of a YAML file may stand in the place of either. A file
with ``base: NAME`` is itself merged over that preset.
"""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path
from typing import Any

import yaml

from crem.errors import ConfigError

__all__ = ["overlay_names", "preset_names", "read_preset", "read_yaml"]

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """Names of the shipped base presets, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def overlay_names() -> list[str]:
    """Names of the shipped overlays, sorted."""
    return sorted(file.stem for file in (_FOLDER / "overlays").glob("*.yaml"))


def read_preset(preset: str | os.PathLike[str], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a preset, with its name under ``preset`` (a file may set another).

    Args:
        preset: ``base+overlay+…`` or the path of a YAML file.
        above: the presets that name this one as their base, outermost first.

    Raises:
        ConfigError: unknown base or overlay (the nearest known name is given), a missing or malformed file, a circle
            of bases.
    """
    name = os.fspath(preset)
    if name in above:
        raise ConfigError(f"preset {name!r} is its own base: {' -> '.join([*above, name])}; remove one base:")
    base, *overlays = [name] if Path(name).is_file() else name.split("+")
    tree = {"preset": base} | _read_file(_find(base, _FOLDER, name, above))
    below = tree.pop("base", None)
    if below is not None:
        tree = _merge(read_preset(str(below), (*above, name)), tree)
    for overlay in overlays:
        tree = _merge(tree, _read_file(_find(overlay, _FOLDER / "overlays", name, above)))
        tree["preset"] = f"{tree['preset']}+{overlay}"
    return tree


def read_yaml(text: str, name: str) -> Any:
    """The value of a YAML document; ``name`` is the file or override that errors name.

    Raises:
        ConfigError: not YAML, or a mapping with a key given twice.
    """
    loader = _UniqueKeys(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a mapping holds each key once; PyYAML by itself takes the last value silently."""

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


def _find(part: str, folder: Path, name: str, above: tuple[str, ...]) -> Path:
    """The file of one part of the preset ``name``."""
    for file in (folder / f"{part}.yaml", Path(part)):
        if part and file.is_file():
            return file
    where = f"base of {above[-1]!r}: " if above else ""
    if part.endswith((".yaml", ".yml")) or os.sep in part:
        raise ConfigError(f"{where}there is no file {part!r}; give the path of a YAML file or a preset's name")
    near = difflib.get_close_matches(name, _compositions(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(
        f"{where}unknown preset {name!r}{hint} Known: {', '.join(preset_names())}, each with any of "
        f"+{', +'.join(overlay_names())}; or the path of a YAML file."
    )


def _compositions() -> list[str]:
    """Every base alone and with one or two overlays: the names among which the nearest is looked for."""
    overlays = [()] + [c for n in (1, 2) for c in itertools.permutations(overlay_names(), n)]
    return ["+".join([base, *chosen]) for base in preset_names() for chosen in overlays]


def _read_file(file: Path) -> dict[str, Any]:
    tree = read_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a configuration is a mapping of sections, not a {type(tree).__name__}")
    return tree


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``: sections key by key; any other value, ``null`` too, replaces."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
