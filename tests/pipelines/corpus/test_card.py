"""``card.html``: its numbers are those of the tables, and it shows rows of them."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from crem.config import load_config
from pipelines.corpus.prepare import prepare
from tests.pipelines.conftest import encoded, random_image, table, write_rows


@pytest.mark.ray
def test_the_card_accounts_for_every_row_and_shows_some(tmp_path: Path, local_ray: None) -> None:
    corpus, out = tmp_path / "shop", tmp_path / "out"
    (corpus / "images").mkdir(parents=True)
    for number in range(5):
        (corpus / "images" / f"{number}.png").write_bytes(encoded(random_image(number)))
    rows = [
        {"key": f"k{n}", "query_images": [f"{n}.png"], "target_text": f"<i>box</i> {n}", "split": "train"}
        for n in range(5)
    ]
    rows += [{**rows[0], "key": "again"}, {"key": "gone", "query_images": ["9.png"], "target_text": "t"}]
    write_rows(corpus / "rows.jsonl", rows)
    manifest = prepare(str(corpus), str(out), load_config("micro", ["prepare.exact_duplicates=drop"]))
    assert (manifest.rows_in, manifest.rows_out, manifest.rejected, manifest.filtered) == (7, 5, 1, 1)
    page = (out / "card.html").read_text()
    assert "7 rows in = 5 out + 1 rejected + 1 filtered" in page
    count = r"<td>(\d)</td>"
    stages = re.findall(rf'<td class="l">(read|duplicates)</td>{count * 4}', page)
    assert stages == [("read", "7", "1", "0", "6"), ("duplicates", "6", "0", "1", "5")]
    assert "image_missing 1" in page and "shop/k0, shop/again" in page
    shown = {base64.b64decode(data) for data in re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)}
    assert shown == {row["bytes"] for row in table(out / "images")}
    assert "&lt;i&gt;box&lt;/i&gt; 3" in page and "<i>box</i>" not in page
    assert "width of images" in page and "prepare.exact_duplicates" in page
