"""One small Ray for all tests of the server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    serve.shutdown()
    ray.shutdown()
