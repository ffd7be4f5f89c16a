"""Whether prepared tables hold their images as large as a model reads them.

``crem prepare`` stores images reduced to ``prepare.encode_max_pixels``. Tables that were prepared for a small model are
poor food for a large one, and nothing in them but the manifest tells. Every job that gives images of tables to a model
therefore asks here before it begins.
"""

from __future__ import annotations

import logging

from pipelines.tables.manifest import PrepareManifest, read_manifest
from pipelines.tables.storage import Folder

__all__ = ["shrunk_images", "too_small_images", "warn_of_small_images"]

log = logging.getLogger(__name__)


def shrunk_images(manifest: PrepareManifest) -> str | None:
    """One line on the images that were stored smaller than they came; ``None`` where there are none."""
    if not manifest.images_shrunk:
        return None
    return (
        f"{manifest.images_shrunk:,} of {manifest.images:,} images were shrunk to at most {_stored(manifest):,} pixels "
        f"(prepare.encode_max_pixels); the largest had {manifest.largest_source_pixels:,}"
    )


def too_small_images(manifest: PrepareManifest, max_pixels: int) -> str | None:
    """What a model that reads up to ``max_pixels`` of an image loses by these tables; ``None`` where it loses nothing.

    Tables from before shrunk images were counted are taken to have some.
    """
    stored = _stored(manifest)
    counted = "images_shrunk" in manifest.model_fields_set
    if not manifest.images or stored is None or stored >= max_pixels or (counted and not manifest.images_shrunk):
        return None
    which = f"{manifest.images_shrunk:,} of the {manifest.images:,} images" if counted else "larger images"
    return (
        f"the tables hold {which} shrunk to at most {stored:,} pixels, and the model reads up to {max_pixels:,}: "
        f"prepare the corpus anew with prepare.encode_max_pixels={max_pixels}, or set model.image.max_pixels={stored} "
        "to train a model of that size"
    )


def warn_of_small_images(prepared: str, max_pixels: int) -> None:
    """Log ``too_small_images`` of the tables at ``prepared``.

    Raises:
        ConfigError: there are no complete prepared tables.
    """
    message = too_small_images(read_manifest(Folder.at(prepared)), max_pixels)
    if message is not None:
        log.warning("%s: %s", prepared, message)


def _stored(manifest: PrepareManifest) -> int | None:
    """The area in pixels to which images were reduced, where the manifest says."""
    section = manifest.config.get("prepare")
    value = section.get("encode_max_pixels") if isinstance(section, dict) else None
    return value if isinstance(value, int) else None
