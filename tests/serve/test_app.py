"""Starting the application: names, arguments, and failures that say what to do."""

from __future__ import annotations

import socket

import pytest

from crem.config import load_config
from crem.errors import ConfigError, CremError
from serve import app


@pytest.mark.parametrize("model", ["out/demo/crem-2b", "out/demo/crem-2b/", "s3://bucket/crem-2b", "crem-2b"])
def test_the_name_is_the_last_part_of_the_path(model: str) -> None:
    assert app.model_name(model) == "crem-2b"


def test_the_builder_takes_the_arguments_of_a_serve_config() -> None:
    from ray.serve import Application

    built = app.application(app.ApplicationArgs(model="s3://b/m", preset="micro", overrides=["serve.max_replicas=9"]))
    assert isinstance(built, Application)
    with pytest.raises(ConfigError, match=r"did you mean 'serve\.max_replicas'"):
        app.application(app.ApplicationArgs(model="m", preset="micro", overrides=["serve.max_replica=9"]))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model": "m", "presets": "2b"}, r"unknown key 'presets'; did you mean 'preset'\?"),
        ({"model": "m", "zzz": 1}, r"unknown key 'zzz'; known here: model, preset, overrides"),
        ({"preset": "2b"}, r"model: Field required"),
        ({"model": "m", "overrides": "serve.max_replicas=2"}, r"overrides: Input should be a valid list"),
        ({"model": 3}, r"model: Input should be a valid string \(got 3\)"),
    ],
)
def test_wrong_arguments_of_a_serve_config_are_named_with_the_remedy(args: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)args of serve.app:application: .*{said}.*Serve config file"):
        app.ApplicationArgs.model_validate(args)


def test_a_taken_port_is_refused_before_anything_starts() -> None:
    import ray

    assert not ray.is_initialized()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}.*serve.port=0"):
            app.run("model", load_config("micro", [f"serve.port={port}"]))
    assert not ray.is_initialized()


@pytest.mark.ray
@pytest.mark.slow
def test_a_checkpoint_that_is_none_says_so_and_leaves_nothing_running(ray_cluster: None, tmp_path: object) -> None:
    from ray import serve

    with pytest.raises(CremError, match=r"could not be served: .* not a CREM checkpoint"):
        app.run(str(tmp_path), load_config("micro", ["serve.port=0"]))
    assert not serve.status().applications
