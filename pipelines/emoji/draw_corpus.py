"""Build the embedded corpus, the content of ``corpus/``, from eight npm packages.

    python -m pipelines.emoji.draw_corpus --out pipelines/emoji/corpus [--npm-dir DIR]

Drawings are rendered by resvg on white and stored as WebP in one zip; rows are Parquet. The same packages and library
versions give the same bytes. Needs ``resvg-py``, and without ``--npm-dir`` also ``npm`` and a connection.
``LICENSES.md`` in the output folder is written by hand and not touched.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import logging
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from crem.errors import CremError
from pipelines.emoji.concepts import (
    ADDED_VENDORS,
    CORE_VENDORS,
    PACKAGES,
    Concept,
    hold_out,
    read_concepts,
    read_drawings,
    unpacked,
)
from pipelines.emoji.corpus_rows import TRAIN_VENDORS, Row, evaluation_rows, image_name, training_rows

__all__ = ["build", "draw", "fetch", "render"]

log = logging.getLogger(__name__)

SIDE_PIXELS = 96  # with WEBP_QUALITY: the largest size that keeps all drawings within about 15 MB
WEBP_QUALITY = 78
HELD_OUT_SHARE = 0.1
SEED = 0

SHA256 = {
    "@iconify-json/noto": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    "@iconify-json/fluent-emoji-flat": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "@iconify-json/twemoji": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "@iconify-json/fluent-emoji": "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    "@iconify-json/noto-v1": "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    "@iconify-json/emojione": "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    "@iconify-json/fxemoji": "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    "emojibase-data": "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
}
"""npm package -> hash of its archive at the pinned version."""

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("query_text", pa.string()),
        ("query_images", pa.list_(pa.string())),
        ("target_text", pa.string()),
        ("target_images", pa.list_(pa.string())),
        ("question", pa.string()),
        ("answer", pa.string()),
    ]
)


def build(npm_dir: Path, out: Path, *, seed: int = SEED) -> dict[str, int]:
    """Write ``images.zip``, ``rows/`` and ``concepts.csv`` into ``out``.

    Args:
        npm_dir: folder with the packages, each unpacked as ``<name>-<version>/package``.
        out: the corpus folder; created if missing.
        seed: fixes the held-out concepts and the choice of texts and questions.

    Returns:
        Rows by ``split/task``, and the number of ``concepts`` and ``images``.

    Raises:
        CremError: a package is missing, or ``resvg-py`` is not installed.
    """
    for package, version in PACKAGES.items():
        folder = unpacked(npm_dir, package)
        if not folder.is_dir():
            raise CremError(
                f"{package} is not unpacked at {folder}; leave --npm-dir out to download it, or run "
                f"`npm pack {package}@{version}` and extract the archive there"
            )
    drawings = {vendor: read_drawings(npm_dir, vendor) for vendor in CORE_VENDORS}
    concepts = read_concepts(npm_dir, set.intersection(*(set(d) for d in drawings.values())))
    log.info(
        "rendering %d concepts x %d vendors, and the drawings of %s", len(concepts), len(CORE_VENDORS), [*ADDED_VENDORS]
    )
    images = {image_name(v, c): render(drawings[v][c.hexcode]) for v in CORE_VENDORS for c in concepts}
    held_out = hold_out(concepts, HELD_OUT_SHARE, seed, kept=_drawn_alike(concepts, images))
    drawn = {vendor: {c.hexcode for c in concepts} for vendor in CORE_VENDORS}
    for vendor in ADDED_VENDORS:
        added = _added_images(read_drawings(npm_dir, vendor), concepts, held_out)
        drawn[vendor] = {c.hexcode for c in added}
        images.update({image_name(vendor, c): data for c, data in added.items()})
    train = list(training_rows(concepts, held_out, seed, {vendor: drawn[vendor] for vendor in TRAIN_VENDORS}))
    test = list(evaluation_rows(concepts, held_out))

    (out / "rows").mkdir(parents=True, exist_ok=True)
    _write_zip(out / "images.zip", images)
    _write_rows(out / "rows" / "train.parquet", train)
    _write_rows(out / "rows" / "test.parquet", test)
    _write_concepts(out / "concepts.csv", concepts, held_out)
    counts = Counter(f"{row['split']}/{row['task']}" for row in (*train, *test))
    return {"concepts": len(concepts), "images": len(images), **counts}


def render(svg: str) -> bytes:
    """A drawing as the corpus stores it: WebP, ``SIDE_PIXELS`` square."""
    encoded = io.BytesIO()
    draw(svg, SIDE_PIXELS).save(encoded, "WEBP", quality=WEBP_QUALITY, method=6)
    return encoded.getvalue()


def draw(svg: str, side_pixels: int) -> Image.Image:
    """A drawing as RGB, ``side_pixels`` square, on white; a drawing that is not square is centred."""
    try:
        import resvg_py  # only this script needs it, so it is an extra
    except ImportError as error:
        raise CremError(
            "drawings are rendered by resvg-py, which is not installed: pip install 'crem[corpus]'"
        ) from error
    sized = svg.replace("<svg ", f'<svg width="{side_pixels}" height="{side_pixels}" ', 1)
    png = resvg_py.svg_to_bytes(svg_string=sized, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    assert image.size == (side_pixels, side_pixels), image.size
    return image


def fetch(npm_dir: Path) -> None:
    """Download the pinned packages with ``npm pack``, check them and unpack them below ``npm_dir``."""
    for package, version in PACKAGES.items():
        target = unpacked(npm_dir, package).parent
        archive = npm_dir / f"{target.name}.tgz"
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        try:
            subprocess.run(command, cwd=npm_dir, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CremError(
                f"`{' '.join(command)}` failed ({error}); install npm and check the connection, or pass --npm-dir with "
                "the packages already unpacked"
            ) from error
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256[package]:
            raise CremError(
                f"{archive.name} has sha256 {found}, not {SHA256[package]}: the registry served another file"
            )
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")


def _added_images(
    drawings: Mapping[str, str], concepts: Sequence[Concept], held_out: Collection[str]
) -> dict[Concept, bytes]:
    """An added vendor's drawings for training: none of a held-out concept, and none that the vendor uses twice.

    A drawing of two concepts would show a held-out concept to training, or teach a wrong word.
    """
    rendered = {c: render(drawings[c.hexcode]) for c in concepts if c.hexcode in drawings}
    used = Counter(rendered.values())
    return {c: data for c, data in rendered.items() if c.hexcode not in held_out and used[data] == 1}


def _drawn_alike(concepts: Sequence[Concept], images: Mapping[str, bytes]) -> set[str]:
    """Concepts that share a drawing with another: held out, they would still be seen in training."""
    used = Counter(images.values())
    return {c.hexcode for c in concepts if any(used[images[image_name(v, c)]] > 1 for v in CORE_VENDORS)}


def _write_zip(path: Path, images: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted(images.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
            archive.writestr(entry, data)


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows), ROW_SCHEMA), path, compression="zstd", compression_level=19)


def _write_concepts(path: Path, concepts: Sequence[Concept], held_out: frozenset[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["hexcode", "label", "group", "subgroup", "held_out", "tags"])
        for c in concepts:
            writer.writerow([c.hexcode, c.label, c.group, c.subgroup, int(c.hexcode in held_out), "|".join(c.tags)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the embedded emoji corpus.")
    parser.add_argument("--out", type=Path, required=True, help="corpus folder to write")
    parser.add_argument("--npm-dir", type=Path, help="folder with the unpacked packages; default: download them")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        npm_dir = options.npm_dir or Path(scratch)
        try:
            if options.npm_dir is None:
                fetch(npm_dir)
            counts = build(npm_dir, options.out)
        except CremError as error:
            parser.exit(1, f"{error}\n")
    for name, count in counts.items():
        log.info("%7d  %s", count, name)


if __name__ == "__main__":
    main()
