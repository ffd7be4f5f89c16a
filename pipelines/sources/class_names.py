"""Names of classes in place of their numbers, where the schema of a file has them.

``datasets`` stores a ``ClassLabel`` as a number and writes the names into the metadata of the schema, at any depth:
``Sequence(ClassLabel)``, ``List(ClassLabel)``, a field of a struct. Two files of one corpus may number their classes
differently, so the names are put in where a file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pipelines.sources.records import ParsedRow

__all__ = ["ClassNames", "class_names", "with_class_names"]

ClassNames: TypeAlias = "tuple[str, ...] | Mapping[str, ClassNames]"
"""The names of one label, or of the labels in an object. A list has those of its items."""
_WITHHELD = -1
"""What ``datasets`` writes where the label of a test row is not given."""


def class_names(metadata: Mapping[bytes, bytes]) -> Mapping[str, ClassNames]:
    """The names of the classes of each column that has any."""
    try:
        found = _names_in(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


def with_class_names(rows: Iterator[ParsedRow], names: Mapping[str, ClassNames]) -> Iterator[ParsedRow]:
    """The rows with names for numbers; one with a number that the schema does not name is a bad row."""
    for record, why in rows:
        try:
            named = (
                None if record is None else {k: _named(v, names[k], k) if k in names else v for k, v in record.items()}
            )
        except ValueError as error:
            yield None, str(error)
        else:
            yield named, why


def _names_in(feature: Any) -> ClassNames | None:
    if isinstance(feature, list):  # how older versions write a sequence
        return _names_in(feature[0]) if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        return tuple(map(str, feature["names"])) if feature.get("names") else None
    if isinstance(kind, str):
        return _names_in(feature.get("feature"))
    found = {name: names for name, inner in feature.items() if (names := _names_in(inner)) is not None}
    return found or None


def _named(value: Any, names: ClassNames, where: str) -> Any:
    if isinstance(value, list):
        return [_named(item, names, where) for item in value]
    if isinstance(names, Mapping):
        if not isinstance(value, dict):
            return value
        return {k: _named(v, names[k], f"{where}.{k}") if k in names else v for k, v in value.items()}
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value == _WITHHELD:
        return None
    if not 0 <= value < len(names):
        raise ValueError(f"{where} is {value}; the schema has {len(names)} classes")
    return names[value]
