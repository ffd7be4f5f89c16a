"""The documented door of a cluster: ``serve deploy`` with every config file that is shipped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from cluster.local import LocalCluster, free_ports

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "cluster" / "manifests" / "rayservice.yaml"
FILES = [*sorted((ROOT / "serve" / "config").glob("*.yaml")), MANIFEST]
DEPLOY_S = 240


def shipped(path: Path) -> dict[str, Any]:
    """The Serve config in a file, or in a RayService's manifest."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return yaml.safe_load(content["spec"]["serveConfigV2"]) if path == MANIFEST else content


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_builds_the_application_from_the_arguments_of_the_file(path: Path) -> None:
    """As Serve does it: arguments arrive as a dict and become what the builder's annotation names."""
    import inspect

    from ray.serve import Application

    from serve.app import application

    (parameter,) = inspect.signature(application).parameters.values()
    assert inspect.isclass(parameter.annotation), "Ray converts arguments only to a class, not to its name"
    (settings,) = shipped(path)["applications"]
    assert settings["import_path"] == "serve.app:application"
    assert isinstance(application(parameter.annotation.model_validate(settings["args"])), Application)


@pytest.fixture(scope="module")
def one_node() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=1, cpus_per_node=6, object_store_bytes=200 << 20) as cluster:
        yield cluster


def serve(cluster: LocalCluster, *words: str) -> str:
    done = cluster.run(
        ["serve", words[0], "-a", cluster.job_server, *words[1:]], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def deployed(cluster: LocalCluster, config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The application's status once it has one that stays."""
    file.write_text(yaml.safe_dump(config))
    serve(cluster, "deploy", str(file))
    deadline = time.monotonic() + DEPLOY_S
    while True:
        status = yaml.safe_load(serve(cluster, "status"))["applications"].get("crem", {})
        if status.get("status") in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"):
            return dict(status)
        assert time.monotonic() < deadline, status
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.ray
def test_serve_deploy_with_every_shipped_file(one_node: LocalCluster, tmp_path: Path) -> None:
    """Only what this machine lacks is replaced: the bucket, GPUs, and the port."""
    port = free_ports(1)[0]
    for path in FILES:
        config = shipped(path)
        config["http_options"] = {"host": "127.0.0.1", "port": port}
        arguments = config["applications"][0]["args"]
        arguments["overrides"] += ["serve.gpus_per_replica=0", "serve.cpus_per_replica=1", "serve.max_replicas=1"]
        arguments["model"] = "crem-micro"
        status = deployed(one_node, config, tmp_path / "config.yaml")
        assert status["status"] == "RUNNING", status["message"]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
        vectors = client.embeddings.create(model="crem-micro", input=["red apple", "smiling face"]).data
        assert len(vectors) == 2 and abs(sum(x * x for x in vectors[0].embedding) - 1) < 1e-4
        chat = client.chat.completions.create(
            model="crem-micro", messages=[{"role": "user", "content": "What is this?"}], max_tokens=8
        )
        assert chat.choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
@pytest.mark.ray
def test_a_wrong_key_of_a_file_is_named(one_node: LocalCluster, tmp_path: Path) -> None:
    config = shipped(FILES[0])
    config["http_options"] = {"host": "127.0.0.1", "port": free_ports(1)[0]}
    config["applications"][0]["args"] = {"model": "crem-micro", "preset": "micro", "overrides": ["serve.max_replica=2"]}
    status = deployed(one_node, config, tmp_path / "config.yaml")
    assert status["status"] == "DEPLOY_FAILED"
    assert "did you mean 'serve.max_replicas'" in status["message"]
