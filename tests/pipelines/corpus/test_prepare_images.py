"""What ``crem prepare`` makes of images as people have them: counted, and never from outside of the corpus."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
from pathlib import Path

import pytest

from crem.config import load_config
from pipelines.corpus.prepare import prepare
from tests.pipelines.conftest import encoded, random_image, table


@pytest.mark.ray
def test_images_as_people_have_them(tmp_path: Path, local_ray: None) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "images").mkdir(parents=True)
    (tmp_path / "x.png").write_bytes(encoded(random_image(1)))
    (corpus / "images" / "whole.jpg").write_bytes(encoded(random_image(2, (200, 100)), "JPEG"))
    (corpus / "images" / "cut.jpg").write_bytes(encoded(random_image(3, (200, 100)), "JPEG")[:-2])
    with zipfile.ZipFile(corpus / "images" / "MSCOCO.zip", "w") as archive:
        archive.writestr("images/MSCOCO/Train/1.png", encoded(random_image(4)))
    inline = base64.b64encode(encoded(random_image(5))).decode()
    other = base64.b64encode(os.urandom(60_000)).decode()
    names = ["images/whole.jpg", "whole.jpg", "cut.jpg", "images/MSCOCO/Train/1.png", inline, other, "../x.png"]
    rows = [{"key": str(i), "query_images": [name], "target_text": "t"} for i, name in enumerate(names)]
    (corpus / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {}
    for tolerant in ("false", "true"):
        settings = load_config("micro", [f"model.image.allow_truncated={tolerant}", "prepare.image_format=webp"])
        manifest = prepare(str(corpus), str(tmp_path / tolerant), settings)
        found[tolerant] = (manifest.rows_out, manifest.images, manifest.images_truncated, manifest.by_reason)
        with io.BytesIO(table(tmp_path / tolerant / "images")[0]["bytes"]) as stored:
            assert stored.read(12)[8:] == b"WEBP"
    assert found["false"] == (4, 3, 0, {"image_corrupt": 2, "uri_refused": 1})
    assert found["true"] == (5, 4, 1, {"image_corrupt": 1, "uri_refused": 1})
    details = [row["detail"] for row in table(tmp_path / "false" / "rejected")]
    assert max(map(len, details)) <= 300
