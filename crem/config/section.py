"""The base of every section of the configuration, and a walk over its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

__all__ = ["Section", "section_of", "settings"]


class Section(BaseModel):
    """Frozen; unknown keys are refused; the text below a field documents it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None where it holds a value; ``Section | None`` counts as the section."""
    options: tuple[Any, ...] = (field.annotation, *get_args(field.annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below a section, in order: its key (``train.steps``) and its field."""
    for name, field in section.model_fields.items():
        below = section_of(field)
        if below is None:
            yield prefix + name, field
        else:
            yield from settings(below, f"{prefix}{name}.")
