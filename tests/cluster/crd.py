"""KubeRay's resource definitions as strict JSON Schemas, so that a manifest is checked without a cluster.

The API server drops a field it does not know, so a misspelt key is silently without effect. Here it is an error:
objects take no properties but those defined. Defaults are applied first, as the API server does, because keys of lists
may be defaulted (the protocol of a port). Not checked: the CEL rules (``x-kubernetes-validations``).

``crds/`` holds the definitions of KubeRay (Apache-2.0) as released, of August 2026, compressed.
"""

from __future__ import annotations

import copy
import lzma
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = Path(__file__).parent / "crds"
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {  # the definitions leave it to the API server
    "type": "object",
    "properties": {"name": NAME, "namespace": NAME, "labels": TEXTS, "annotations": TEXTS},
    "required": ["name"],
    "additionalProperties": False,
}


@cache
def definition(kind: str) -> dict[str, Any]:
    """The ``ray.io/v1`` schema of ``kind`` as KubeRay ships it."""
    text = lzma.decompress((CRDS / f"ray.io_{PLURALS[kind]}.yaml.xz").read_bytes())
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return next(v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1")


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as JSON Schema, with unknown properties refused where the definition does not ask to keep them."""
    out = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        out["properties"] = {name: strict(below) for name, below in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    if isinstance(schema.get("additionalProperties"), dict):
        out["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        out["items"] = strict(schema["items"])
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """A copy of ``value`` in which absent properties have the definition's defaults."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        filled = {k: copy.deepcopy(below["default"]) for k, below in properties.items() if "default" in below} | value
        known = {k: properties.get(k, extra if isinstance(extra, dict) else {}) for k in filled}
        return {k: with_defaults(v, known[k]) for k, v in filled.items()}
    if isinstance(value, list):
        return [with_defaults(v, schema.get("items", {})) for v in value]
    return value


def duplicates(value: Any, schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Entries of a keyed list (containers, ports, volumes) that share their key; JSON Schema cannot say this."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from duplicates(below, schema.get("properties", {}).get(name, {}), f"{path}.{name}")
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        if keys:
            seen = [tuple(entry.get(key) for key in keys) for entry in value]
            yield from (f"{path}: twice the entry {key}" for key in {k for k in seen if seen.count(k) > 1})
        for index, below in enumerate(value):
            yield from duplicates(below, schema.get("items", {}), f"{path}[{index}]")


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, one line each; empty when it is valid."""
    if manifest.get("apiVersion") != "ray.io/v1" or manifest.get("kind") not in PLURALS:
        return [f"not a ray.io/v1 resource: {manifest.get('apiVersion')} {manifest.get('kind')}"]
    schema = definition(manifest["kind"])
    checked = strict(schema)
    checked["properties"]["metadata"] = METADATA
    checked["required"] = ["apiVersion", "kind", "metadata", "spec"]
    complete = with_defaults(manifest, schema)
    errors = sorted(jsonschema.Draft202012Validator(checked).iter_errors(complete), key=lambda error: error.json_path)
    return [f"{error.json_path}: {error.message[:300]}" for error in errors] + list(duplicates(complete, schema))
