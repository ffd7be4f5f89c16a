"""Duplicates of ``crem prepare``: what is found at the default settings, what it costs, and how the cost grows.

    python -m tests.bench.bench_duplicates [--pictures FOLDER] [--count 1000] [--rows 10000 100000] [--signatures 10000]

*Found*: pictures of the embedded corpus (or of a folder) and copies of each, re-encoded, halved, cropped by 2 % and
brightened by 10 %; its labels as sentences, and changes of each. A pair that was not planted counts against precision,
although pictures of a real corpus may be true duplicates. *Cost*: of one core. *Growth*: seconds a row of the whole
job on Ray with rows of text, and of the comparison of signatures, where 1 % of all are near copies.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from crem.config import ImageConfig, PrepareConfig
from crem.data.images import encode_image, load_image
from crem.errors import ItemError
from pipelines.duplicates.candidate_pairs import find_pairs
from pipelines.duplicates.components import components
from pipelines.duplicates.decide import decide
from pipelines.duplicates.hamming_tables import hamming_keys, hamming_tables
from pipelines.duplicates.image_signature import IMAGE_SIGNATURE, ImageRelation, image_signature
from pipelines.duplicates.language import LanguageFilter
from pipelines.duplicates.parts import TablePart
from pipelines.duplicates.text_signature import MinHasher, is_typing_error, normal_form, typing_keys
from pipelines.emoji import corpus_path
from pipelines.tables import schema, session
from pipelines.tables.storage import Folder
from tests.bench.timing import table
from tests.pipelines.duplicates.planted import COPIES

CONFIG = PrepareConfig()
LIMITS = ImageConfig(max_pixels=CONFIG.encode_max_pixels)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--pictures", type=Path, help="folder of PNG, JPEG or WebP files; the embedded corpus if absent"
    )
    parser.add_argument("--count", type=int, default=1000, help="pictures and sentences")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--signatures", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args(argv)
    images = list(pictures(args.pictures, args.count))
    image_copies(images)
    text_changes(args.count)
    cost()
    growth_of_signatures(args.signatures)
    if args.rows:
        growth_of_rows(args.rows)


def pictures(folder: Path | None, count: int) -> Iterator[Image.Image]:
    """Pictures as ``crem prepare`` stores them, in an order that does not follow their names."""
    rng = np.random.default_rng(0)
    if folder is None:
        archive = zipfile.ZipFile(Path(corpus_path()) / "images.zip")
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        read: Callable[[str], bytes] = archive.read
    else:
        names = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        read = lambda name: Path(name).read_bytes()  # noqa: E731
    found = 0
    for name in rng.permutation(names):
        try:
            image = load_image(read(str(name)), LIMITS)
        except ItemError:
            continue
        found += 1
        yield load_image(encode_image(image, LIMITS.max_pixels)[0], LIMITS)
        if found == count:
            return


def signature_of(data: bytes) -> Any:
    return image_signature(data, *Image.open(io.BytesIO(data)).size)


def image_copies(images: list[Image.Image]) -> None:
    """Recall by kind of copy, and precision of all pairs found among the originals and copies of one kind."""
    originals = [signature_of(encode_image(image, LIMITS.max_pixels)[0]) for image in images]
    rows = []
    for name, make in COPIES.items():
        copies = [signature_of(make(image)) for image in images]
        found, seconds = search(np.array(originals + copies))
        count = len(images)
        planted = sum(1 for i, j in found if j - i == count)
        other = {tuple(sorted((i % count, j % count))) for i, j in found if (j - i) % count}
        rows.append([name, f"{planted / count:.3f}", len(other), f"{len(other) / (count * (count - 1) / 2):.1e}"])
        del seconds
    print(f"\n{len(images)} pictures, prepare.near_image_bits={CONFIG.near_image_bits}\n")
    table(["copy", "recall", "other pairs of pictures found", "share of all pairs"], rows)


def search(signatures: Any) -> tuple[set[tuple[int, int]], float]:
    """All near pairs, as the job finds them, and the seconds that it took."""
    start = time.perf_counter()
    relation = ImageRelation(CONFIG.near_image_bits)
    found: list[tuple[Any, Any]] = []
    for keys in hamming_keys(signatures["dhash"], hamming_tables(len(signatures), CONFIG.near_image_bits)):
        order = np.argsort(keys, kind="stable")
        pairs = find_pairs(keys[order], signatures[order], relation)
        found.append((order[pairs.first], order[pairs.second]))
    first, second = (np.concatenate(side) for side in zip(*found, strict=True))
    low, high = np.minimum(first, second), np.maximum(first, second)
    components(low.astype(np.int64), high.astype(np.int64))
    seconds = time.perf_counter() - start
    return set(zip(low.tolist(), high.tolist(), strict=True)), seconds


def sentences(count: int) -> list[str]:
    """Labels and tags of the embedded corpus: as many different texts as there are."""
    rows = pq.read_table(Path(corpus_path()) / "rows" / "train.parquet").to_pylist()
    texts = {row.get("target_text") or row.get("query_text") for row in rows} - {None}
    return sorted({normal_form(text): text for text in texts if len(text) > 12}.values())[:count]


def text_changes(count: int) -> None:
    """Recall by kind of change; another word in place of one must not be found."""
    texts = sentences(count)
    rng = np.random.default_rng(0)

    def typo(text: str) -> str:
        words = text.split(" ")
        long = [i for i, word in enumerate(words) if len(word) >= 6 and word.isalpha()]
        if not long:
            return text + "\0"
        at = int(rng.choice(long))
        place = int(rng.integers(1, len(words[at]) - 1))
        word = words[at]
        words[at] = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        return " ".join(words)

    changes: dict[str, Callable[[str], str]] = {
        "upper case": str.upper,
        "punctuation": lambda text: f"  {text.replace(' ', ' – ', 1)}!",
        "letters swapped in a word of 6 letters and more": typo,
        "another word": lambda text: " ".join([*text.split(" ")[:-1], "aardvark"]),
    }
    rows = []
    for name, change in changes.items():
        pairs = [(text, change(text)) for text in texts]
        pairs = [(a, b) for a, b in pairs if a != b and "\0" not in b]
        rows.append([name, len(pairs), f"{sum(same(a, b) for a, b in pairs) / max(1, len(pairs)):.3f}"])
    keys: dict[int, list[tuple[str, str]]] = {}
    for text in texts:
        for key, word in typing_keys(normal_form(text)):
            keys.setdefault(key, []).append((word, text))
    found = [(x, y) for of in keys.values() for i, (a, x) in enumerate(of) for b, y in of[:i] if is_typing_error(a, b)]
    print(f"\n{len(texts)} short texts; pairs among them that are taken for typing errors: {len(found)} {found[:3]}\n")
    table(["change", "texts", "found"], rows)


def same(a: str, b: str) -> bool:
    x, y = normal_form(a), normal_form(b)
    if x == y:
        return True
    keys = dict(typing_keys(y))
    return any(key in keys and is_typing_error(word, keys[key]) for key, word in typing_keys(x))


def cost() -> None:
    """Milliseconds of one core."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (125, 125, 3), np.uint8)).resize(
        (1000, 1000), Image.Resampling.BICUBIC
    )
    stored = encode_image(noise, LIMITS.max_pixels)[0]
    caption = "A photograph of the harbour at night, seen from the lighthouse on the hill"
    document = " ".join(f"{caption} {i}" for i in range(50))
    hasher = MinHasher(CONFIG.minhash_shingle_chars, CONFIG.minhash_permutations, CONFIG.minhash_bands)
    language = LanguageFilter.of(CONFIG.model_copy(update={"languages": ("en",)}))
    assert language is not None
    calls: dict[str, Callable[[], object]] = {
        "prepare: decode and encode 1 Mpixel": lambda: encode_image(load_image(stored, LIMITS), LIMITS.max_pixels),
        "signature of the stored JPEG, 1 Mpixel": lambda: signature_of(stored),
        "keys of a caption, 75 characters": lambda: typing_keys(normal_form(caption)),
        f"MinHash of {len(document)} characters": lambda: hasher.signature(normal_form(document)),
        "language of a caption": lambda: language.objection([caption]),
    }
    rows = []
    for name, call in calls.items():
        call()
        start, count = time.process_time(), 0
        while time.process_time() - start < 0.5:
            call()
            count += 1
        rows.append([name, f"{(time.process_time() - start) / count * 1e3:.3f}"])
    print()
    table(["one core", "ms"], rows)


def growth_of_signatures(sizes: list[int]) -> None:
    """The comparison, without Ray and without decoding: random signatures, 1 % near copies."""
    rows = []
    for size in sizes:
        rng = np.random.default_rng(size)
        signatures = np.zeros(size, IMAGE_SIGNATURE)
        signatures["dhash"] = rng.integers(0, 2**63, size, np.uint64) * np.uint64(2)
        copies = size // 100
        signatures[-copies:] = signatures[:copies]
        signatures["dhash"][-copies:] ^= np.uint64(1) << rng.integers(0, 64, copies, np.uint64)
        before = time.process_time()
        found, _ = search(signatures)
        seconds = time.process_time() - before
        assert len(found) >= copies
        tables = len(hamming_tables(size, CONFIG.near_image_bits))
        rows.append([f"{size:,}", tables, f"{seconds:.1f}", f"{seconds / size * 1e6:.1f}", f"{peak_mib():,.0f}"])
    print()
    table(["signatures", "tables", "s", "µs/signature", "peak MiB"], rows)


def growth_of_rows(sizes: list[int]) -> None:
    """``decide`` on Ray: captions of 12 words, 1 % with a typing error."""
    rows = []
    session.connect()
    vocabulary = ["".join(chr(97 + (i * k) % 26) for k in (1, 3, 5, 7, 11, 13, 17)) + str(i) for i in range(9)]
    vocabulary += [word.rstrip("0123456789") + "abc"[i % 3] for i, word in enumerate(vocabulary * 30)]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            parts = list(captions(Path(folder), size, vocabulary))
            start = time.perf_counter()
            config = CONFIG.model_copy(update={"near_duplicates": "drop"})
            found = decide(parts, [], config, work=Folder.at(f"{folder}/work"))
            seconds = time.perf_counter() - start
        rows.append(
            [
                f"{size:,}",
                sum(found.left_out.values()),
                f"{seconds:.1f}",
                f"{seconds / size * 1e6:.0f}",
                f"{peak_mib():,.0f}",
            ]
        )
    print()
    table(["rows", "left out", "s", "µs/row", "peak MiB of the driver"], rows)


def captions(folder: Path, size: int, vocabulary: list[str]) -> Iterator[TablePart]:
    rng = np.random.default_rng(size)
    step = 10_000
    for start in range(0, size, step):
        count = min(step, size - start)
        texts = [" ".join(words) for words in rng.choice(vocabulary, (count, 12))]
        for i in range(0, count - 1, 100):
            texts[i + 1] = texts[i][:-1] + "x"
        rows = [
            {
                "id": start + i,
                "source": "s",
                "key": str(start + i),
                "task": "t",
                "split": "train",
                "query": {"text": text, "instruction": None, "images": [], "image_at": []},
                "target": None,
                "negatives": [],
                "question": "q",
                "answer": "a",
            }
            for i, text in enumerate(texts)
        ]
        name = f"rows-{start:09d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema.ROWS), folder / name)
        yield TablePart(Folder.at(folder), (name,), count)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
