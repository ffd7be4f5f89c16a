"""Tables that hold less of their images than a model reads are named before a job begins."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipelines.tables.manifest import PrepareManifest
from pipelines.tables.richness import shrunk_images, too_small_images, warn_of_small_images
from pipelines.tables.storage import Folder


def manifest(stored: int | None = 4096, **fields: Any) -> PrepareManifest:
    counts = {"rows_in": 9, "rows_out": 9, "rejected": 0, "images": 7, "by_reason": {}, "by_split_task": {}}
    config = {} if stored is None else {"prepare": {"encode_max_pixels": stored}}
    return PrepareManifest.model_validate(
        {**counts, "source_uri": "s", "created_with": {}, "config": config, **fields},
    )


@pytest.mark.parametrize(
    ("tables", "max_pixels", "poor"),
    [
        (manifest(images_shrunk=3, largest_source_pixels=786_432), 4097, True),
        (manifest(images_shrunk=3, largest_source_pixels=786_432), 4096, False),
        (manifest(images_shrunk=0), 1_003_520, False),  # no image was as large
        (manifest(), 1_003_520, True),  # tables from before the count: nobody knows
        (manifest(), 4096, False),
        (manifest(images=0), 1_003_520, False),
        (manifest(None), 1_003_520, False),
    ],
)
def test_tables_are_poorer_only_where_a_model_reads_more(tables: PrepareManifest, max_pixels: int, poor: bool) -> None:
    message = too_small_images(tables, max_pixels)
    assert (message is not None) is poor
    if message is not None:
        assert "4,096 pixels" in message and f"prepare.encode_max_pixels={max_pixels}" in message


def test_what_was_shrunk_is_said_with_its_limit() -> None:
    tables = manifest(images_shrunk=3, largest_source_pixels=786_432)
    assert shrunk_images(tables) == (
        "3 of 7 images were shrunk to at most 4,096 pixels (prepare.encode_max_pixels); the largest had 786,432"
    )
    assert shrunk_images(manifest(images_shrunk=0)) is None


def test_the_warning_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = manifest(images_shrunk=3, largest_source_pixels=786_432)
    tables.write(Folder.at(tmp_path))
    with caplog.at_level(logging.WARNING):
        warn_of_small_images(str(tmp_path), 4096)
        assert not caplog.records
        warn_of_small_images(str(tmp_path), 1_003_520)
    assert "3 of the 7 images shrunk to at most 4,096 pixels" in caplog.text


def test_counts_of_shrunk_images_do_not_change_the_identity_of_tables() -> None:
    assert manifest().content_id == manifest(images_shrunk=3, largest_source_pixels=5).content_id
    assert manifest().content_id != manifest(images=8).content_id


def test_splits_that_no_job_reads_are_named_with_their_rows() -> None:
    tables = manifest(
        by_split_task={"train/a": 5, "val/a": 2, "val/b": 1, "test_x/t": 1, "Train/a": 4, "validation/": 1}
    )
    assert tables.unread_splits == {"val": 3, "Train": 4}
