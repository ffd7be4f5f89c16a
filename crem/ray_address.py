"""Which addresses of a Ray cluster a job can use."""

from __future__ import annotations

from crem.errors import ConfigError

__all__ = ["refuse_ray_client"]


def refuse_ray_client(address: str | None) -> None:
    """Refuse a Ray Client address: a job's driver needs a node's own view of the cluster, its object store and files.

    Raises:
        ConfigError: ``address`` begins with ``ray://``.
    """
    if (address or "").startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address!r} is a Ray Client address, and crem's jobs do not run through one. From outside "
            "the cluster submit the job: crem submit --address http://HEAD:8265 -- JOB …; on one of its nodes set "
            "RAY_ADDRESS=HEAD:6379 (the address that ray start --head prints), or auto"
        )
