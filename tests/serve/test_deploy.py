"""The documented door of a cluster: ``serve deploy`` with every config file that is shipped."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from cluster.local import LocalCluster, free_ports

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "cluster" / "manifests" / "rayservice.yaml"
MICRO = ROOT / "serve" / "config" / "crem-micro.yaml"
FILES = [*sorted((ROOT / "serve" / "config").glob("*.yaml")), MANIFEST]
DEPLOY_S = 240


def shipped(path: Path) -> dict[str, Any]:
    """The Serve config in a file, or in a RayService's manifest."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return yaml.safe_load(content["spec"]["serveConfigV2"]) if path == MANIFEST else content


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ray_builds_the_application_from_the_arguments_of_the_file(path: Path) -> None:
    """Ray hands over a dict unless the annotation is the pydantic class itself; its own function for it is private."""
    from ray.serve import Application

    from serve.app import application

    (settings,) = shipped(path)["applications"]
    assert settings["import_path"] == "serve.app:application"
    (parameter,) = inspect.signature(application).parameters.values()
    kind = parameter.annotation
    assert inspect.isclass(kind) and issubclass(kind, BaseModel)
    assert isinstance(application(kind.model_validate(settings["args"])), Application)


def test_the_files_agree_with_the_manifest_and_the_pages() -> None:
    """The same keys in every file; no page writes out a config of its own or names a file that is not shipped."""
    shapes = {
        (frozenset(config), frozenset(config["applications"][0]), frozenset(config["applications"][0]["args"]))
        for config in map(shipped, FILES)
    }
    assert len(shapes) == 1
    for path in FILES:
        ServeDeploySchema.model_validate(shipped(path))
    named = set()
    for page in [*ROOT.glob("*.md"), *ROOT.glob("serve/*.md"), *ROOT.glob("cluster/*.md"), *FILES]:
        text = page.read_text(encoding="utf-8")
        assert page in FILES or "import_path:" not in text, f"{page.name} writes out a config of its own"
        named |= set(re.findall(r"serve deploy (\S+\.yaml)", text))
    assert named == {str(path.relative_to(ROOT)) for path in FILES if path != MANIFEST}


@pytest.fixture(scope="module")
def one_node() -> Iterator[LocalCluster]:
    with LocalCluster(nodes=1, cpus_per_node=6, object_store_bytes=200 << 20) as cluster:
        yield cluster


@pytest.fixture
def cluster(one_node: LocalCluster) -> Iterator[LocalCluster]:
    """No Serve before and after: a later file could not change its port, and equal arguments are not built again."""
    yield one_node
    serve(one_node, "shutdown", "-y")


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
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_serve_deploy_with_every_shipped_file(cluster: LocalCluster, path: Path, tmp_path: Path) -> None:
    """Only what this machine lacks is replaced: a free port of loopback, and for the GPUs' files bucket and GPUs."""
    config = shipped(path)
    (port,) = free_ports(1)
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    if path != MICRO:
        arguments = config["applications"][0]["args"]
        arguments["model"] = "crem-micro"
        arguments["overrides"] += ["serve.gpus_per_replica=0", "serve.cpus_per_replica=1", "serve.max_replicas=1"]
    status = deployed(cluster, config, tmp_path / "config.yaml")
    assert status["status"] == "RUNNING", status["message"]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=5)
    vectors = client.embeddings.create(model="crem-micro", input=["red apple", "smiling face"]).data
    assert len(vectors) == 2 and abs(sum(x * x for x in vectors[0].embedding) - 1) < 1e-4
    chat = client.chat.completions.create(
        model="crem-micro", messages=[{"role": "user", "content": "What is this?"}], max_tokens=8
    )
    assert chat.choices[0].message.content and chat.choices[0].finish_reason in ("stop", "length")


@pytest.mark.slow
@pytest.mark.ray
def test_what_is_wrong_in_a_file_is_named_by_serve_status(cluster: LocalCluster, tmp_path: Path) -> None:
    config = shipped(MICRO)
    config["http_options"]["port"] = free_ports(1)[0]
    for args, said in (
        ({"modle": "crem-micro"}, "unknown key 'modle'; did you mean 'model'?"),
        ({"model": "crem-micro", "overrides": ["serve.max_replica=2"]}, "did you mean 'serve.max_replicas'?"),
    ):
        config["applications"][0]["args"] = args
        status = deployed(cluster, config, tmp_path / "config.yaml")
        assert status["status"] == "DEPLOY_FAILED"
        assert said in status["message"]
