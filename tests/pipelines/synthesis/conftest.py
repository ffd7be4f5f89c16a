"""Settings and prepared tables for the tests of ``crem synthesise``."""

from __future__ import annotations

from crem.config import SynthesiseConfig, load_config


def settings(*overrides: str) -> SynthesiseConfig:
    """``synthesise`` with these settings: ``name=value``."""
    return load_config("micro", [f"synthesise.{override}" for override in overrides]).synthesise
