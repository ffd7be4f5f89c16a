"""Parts of the image table: the bytes of an image stand in the file where the footer says."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crem.errors import ConfigError
from pipelines.tables import schema
from pipelines.tables.image_index import ImageIndex
from pipelines.tables.image_parts import ImagePartWriter, image_places
from pipelines.tables.storage import Folder


def images(count: int, seed: int = 0, size: int = 3000) -> pa.Table:
    """Images that begin alike, as those of one encoder do."""
    draw = np.random.default_rng(seed)
    data = [b"\x89PNG" * 40 + draw.bytes(int(draw.integers(1, size))) for _ in range(count)]
    columns = {
        "id": [schema.content_id(d) for d in data],
        "bytes": data,
        "width": [3] * count,
        "height": [2] * count,
        "uri": [None if i % 2 else f"{i}.png" for i in range(count)],
    }
    return pa.table(columns, schema=schema.IMAGES)


def assert_places(folder: Path, name: str, table: pa.Table) -> None:
    places, content = image_places(Folder.at(folder), name), (folder / name).read_bytes()
    assert places["id"].tolist() == table["id"].to_pylist()
    for (_, start, length), data in zip(places.tolist(), table["bytes"].to_pylist(), strict=True):
        assert content[start : start + length] == data


def write(path: Path, *groups: pa.Table) -> pa.Table:
    with path.open("wb") as file, ImagePartWriter(file) as writer:
        for group in groups:
            writer.write(group)
    return pa.concat_tables(groups)


def test_every_image_stands_where_the_footer_says(tmp_path: Path) -> None:
    """Also images larger than a page of Parquet, and more places than one request of the footer holds."""
    table = write(tmp_path / "a.parquet", images(200), images(3, 1, 3 << 20), images(20_000, 2, 4))
    assert_places(tmp_path, "a.parquet", table)
    stored = pq.ParquetFile(tmp_path / "a.parquet")
    assert stored.read().equals(table) and stored.schema_arrow.equals(schema.IMAGES), "plain Parquet to others"
    assert stored.num_row_groups == 3
    footer = stored.metadata.serialized_size
    assert footer > 512 * 2**10 and b"crem.images" in stored.metadata.metadata


def test_an_empty_part_and_an_empty_row_group(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", images(0))
    assert len(image_places(Folder.at(tmp_path), "a.parquet")) == 0
    assert_places(tmp_path, "b.parquet", write(tmp_path / "b.parquet", images(2), images(0), images(1, 5)))


def test_the_same_images_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, images(50), images(50, 1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_parts_without_places_are_read_by_row(compression: str, tmp_path: Path) -> None:
    old, new = images(300), images(40, 7)
    pq.write_table(old, tmp_path / "a.parquet", compression=compression, row_group_size=77)
    write(tmp_path / "b.parquet", new)
    folder = Folder.at(tmp_path)
    places = [image_places(folder, name) for name in ("a.parquet", "b.parquet")]
    assert set(places[0]["length"].tolist()) == {-1}
    index = ImageIndex.of(folder, ["a.parquet", "b.parquet"], places)
    wanted = pa.concat_tables([old, new]).take([3, 299, 76, 77, 310, 4, 3])
    assert index.fetch(wanted["id"].to_numpy()) == dict(
        zip(wanted["id"].to_pylist(), wanted["bytes"].to_pylist(), strict=True)
    )


def test_a_part_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    with pytest.raises(ConfigError, match=r"gone\.parquet is missing; run crem prepare again"):
        image_places(folder, "gone.parquet")
    write(tmp_path / "a.parquet", images(50))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "short.parquet").write_bytes(content[:-100])
    (tmp_path / "empty.parquet").write_bytes(b"")
    for name in ("short", "empty"):
        with pytest.raises(ConfigError, match=rf"{name}\.parquet is damaged or cannot be read: "):
            image_places(folder, f"{name}.parquet")


def test_a_writer_that_fails_completes_no_part(tmp_path: Path) -> None:
    def fail() -> None:
        with (tmp_path / "half.parquet").open("wb") as file, ImagePartWriter(file) as writer:
            writer.write(images(5))
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    with pytest.raises(ConfigError, match=r"half\.parquet is damaged"):
        image_places(Folder.at(tmp_path), "half.parquet")


def test_the_places_are_base64_of_records(tmp_path: Path) -> None:
    """The layout on disk: a change of it makes all tables unreadable."""
    table = write(tmp_path / "a.parquet", images(2))
    stored = base64.b64decode(pq.read_metadata(tmp_path / "a.parquet").metadata[b"crem.images"])
    assert len(stored) == 2 * 20
    assert int.from_bytes(stored[20:28], "little", signed=True) == table["id"][1].as_py()
    assert int.from_bytes(stored[36:40], "little") == len(table["bytes"][1].as_py())
