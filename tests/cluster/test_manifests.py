"""The manifests against KubeRay's own definitions, the project's command line and the application's arguments."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import crem.cli  # noqa: F401 (registers the jobs)
from crem.cli.command_line import parse
from crem.config import load_config
from crem.errors import ConfigError
from crem.fetch import MODELS
from tests.cluster.crd import PLURALS, definition, problems, strict, with_defaults

MANIFESTS = sorted((Path(__file__).parents[2] / "cluster" / "manifests").glob("*.yaml"))
JOBS = [path for path in MANIFESTS if path.name.startswith("rayjob")]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def by_name(path: Path) -> str:
    return path.stem


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in groups(manifest):
        yield from group["template"]["spec"]["containers"]


def test_there_is_one_for_each_kind_of_work() -> None:
    assert {(path.stem, load(path)["kind"]) for path in MANIFESTS} == {
        ("rayjob-train", "RayJob"),
        ("rayjob-embed", "RayJob"),
        ("rayservice", "RayService"),
    }


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_it_is_what_kuberay_defines(path: Path) -> None:
    assert problems(load(path)) == []


def edited(path: tuple[str | int, ...], key: str | int, value: Any) -> dict[str, Any]:
    """The training job with one change; ``key`` starting with "-" takes the key away."""
    manifest = copy.deepcopy(load(next(p for p in JOBS if p.stem == "rayjob-train")))
    at: Any = manifest
    for step in path:
        at = at[step]
    if isinstance(key, str) and key.startswith("-"):
        del at[key[1:]]
    elif isinstance(at, list):
        at.append(value)
    else:
        at[key] = value
    return manifest


CLUSTER = ("spec", "rayClusterSpec")
WORKER = (*CLUSTER, "workerGroupSpecs", 0)
CONTAINER = (*WORKER, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        (edited(("spec",), "backofLimit", 3), "'backofLimit' was unexpected"),
        (edited(("spec",), "backoffLimit", "3"), r"\$.spec.backoffLimit: '3' is not of type 'integer'"),
        (edited(("spec",), "rayClusterConfig", {}), "'rayClusterConfig' was unexpected"),
        (edited(("metadata",), "labls", {}), "'labls' was unexpected"),
        (edited(("metadata",), "name", "Crem_Train"), r"\$.metadata.name"),
        (edited(WORKER, "-template", None), "'template' is a required property"),
        (edited((*CLUSTER, "authOptions"), "mode", "tokens"), "'tokens' is not one of"),
        (edited(CONTAINER, "envfrom", []), "'envfrom' was unexpected"),
        (edited((*CONTAINER, "resources", "limits"), "memory", "64 GB"), "'64 GB' does not match"),
        (edited((*CONTAINER, "ports"), "", {"name": "twice", "containerPort": 8080}), "twice the entry .8080, 'TCP'"),
        (edited((), "kind", "RayJobs"), "not a ray.io/v1 resource"),
    ],
)
def test_a_mistake_is_found(manifest: dict[str, Any], complaint: str) -> None:
    (problem,) = problems(manifest)
    assert re.search(complaint, problem), problem


def test_defaults_are_applied_before_the_check() -> None:
    schema = {
        "properties": {"ports": {"items": {"properties": {"p": {"default": "TCP"}, "n": {}}}}},
    }
    assert with_defaults({"ports": [{"n": 1}]}, schema) == {"ports": [{"n": 1, "p": "TCP"}]}
    assert with_defaults({"ports": [{"p": "UDP"}]}, schema) == {"ports": [{"p": "UDP"}]}


@pytest.mark.parametrize("kind", PLURALS)
def test_the_definitions_are_closed(kind: str) -> None:
    open_objects = []

    def walk(schema: dict[str, Any], path: str) -> None:
        if "properties" in schema and schema.get("additionalProperties") is not False:
            open_objects.append(path)
        for name, below in schema.get("properties", {}).items():
            walk(below, f"{path}.{name}")
        if "items" in schema:
            walk(schema["items"], f"{path}[]")

    walk(strict(definition(kind)), kind)
    assert open_objects == []


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_the_head_takes_no_work_and_workers_have_gpus(path: Path) -> None:
    head, *workers = groups(load(path))
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert all("nvidia.com/gpu" not in c["resources"]["limits"] for c in head["template"]["spec"]["containers"])
    assert workers
    for worker in workers:
        resources = worker["template"]["spec"]["containers"][0]["resources"]
        assert int(resources["limits"]["nvidia.com/gpu"]) >= 1
        assert resources["limits"] == resources["requests"]
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


@pytest.mark.parametrize("path", MANIFESTS, ids=by_name)
def test_credentials_are_references_and_the_ray_is_ours(path: Path) -> None:
    manifest = load(path)
    assert cluster_of(manifest)["rayVersion"] == version("ray")
    assert f"rayproject/ray:{version('ray')}-py311-gpu" in (path.parents[1] / "Dockerfile").read_text(encoding="utf-8")
    for container in containers(manifest):
        assert {"secretRef": {"name": "crem-storage"}} in container["envFrom"]
        literal = {entry["name"] for entry in container["env"] if "value" in entry}
        assert literal == {"RAY_USAGE_STATS_ENABLED", "HF_HOME"}
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert "/dev/shm" in mounts
        (cache,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "cache")
        assert (Path("/home/ray") / MODELS).is_relative_to(cache), "where crem.fetch downloads to"
        (hub,) = (entry["value"] for entry in container["env"] if entry["name"] == "HF_HOME")
        assert Path(hub).is_relative_to(cache)
        assert container["readinessProbe"]
        assert container["livenessProbe"]
    for group in groups(manifest):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_training_cluster_holds_its_preset() -> None:
    """As many GPUs and CPUs as the preset's workers reserve, and room beside them for the data tasks."""
    manifest = load(next(path for path in JOBS if path.stem == "rayjob-train"))
    train = load_config("2b").train
    (worker,) = cluster_of(manifest)["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert worker["minReplicas"] * int(limits["nvidia.com/gpu"]) == train.workers
    assert worker["minReplicas"] * int(limits["cpu"]) > train.workers * train.cpus_per_worker


def test_a_new_cluster_continues_the_training() -> None:
    manifest = load(next(path for path in JOBS if path.stem == "rayjob-train"))
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert manifest["spec"]["backoffLimit"] >= 1
    assert "--resume" in words
    assert words[words.index("--out") + 1].startswith("s3://")


@pytest.mark.parametrize("path", JOBS, ids=by_name)
def test_the_command_line_is_one_of_ours(path: Path) -> None:
    program, *argv = shlex.split(load(path)["spec"]["entrypoint"])
    assert program == "crem"
    line = parse(argv)
    assert line.preset is not None and load_config(line.preset, line.overrides)
    with pytest.raises(ConfigError, match="no-such-option"):
        parse([*argv, "--no-such-option"])


def test_the_serve_config_is_accepted_by_serve_and_by_the_application() -> None:
    from serve.app import ApplicationArgs

    manifest = load(next(path for path in MANIFESTS if path.stem == "rayservice"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "serve.app:application"
    args = ApplicationArgs.model_validate(application.args)
    run = load_config(args.preset, args.overrides)
    (worker,) = cluster_of(manifest)["workerGroupSpecs"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert run.serve.gpus_per_replica <= int(limits["nvidia.com/gpu"])
    assert run.serve.cpus_per_replica < int(limits["cpu"]), "room for the proxy and the ingress beside a replica"
    assert run.serve.max_replicas <= worker["maxReplicas"] * int(limits["nvidia.com/gpu"])
    assert config.http_options.host == "0.0.0.0"
