"""Vectors come back from every stored type, by plain arithmetic, and rows without one stay without."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from crem.errors import ConfigError
from pipelines.tables.vector_types import VectorType, prefix_of, stored_vectors, unit_vectors, vector_fields

RNG = np.random.default_rng(0)
VALID = np.array([True, False, True, True, False])


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = unit(RNG.normal(size=(5, 16))).astype(np.float32) * VALID[:, None]


def stored(vector: VectorType) -> pa.Table:
    fields = vector_fields(vector, 16)
    columns = stored_vectors(VECTORS, vector, VALID)
    table = pa.table([columns[field.name] for field in fields], schema=pa.schema(fields))
    assert table.validate(full=True) is None and table["embedding"].is_valid().to_pylist() == VALID.tolist()
    return pa.concat_tables([table, table.slice(1, 3)])  # several chunks, one with an offset


@pytest.mark.parametrize(
    ("vector", "as_stored"),
    [
        ("fp32", lambda v: v),
        ("fp16", lambda v: unit(v.astype(np.float16).astype(np.float64))),
        ("int8", lambda v: unit(np.rint(v / np.abs(v).max(1, keepdims=True) * 127))),
        ("binary", lambda v: np.where(v > 0, 1, -1) / 4),
    ],
)
def test_every_type_comes_back(vector: VectorType, as_stored) -> None:  # type: ignore[no-untyped-def]
    found = unit_vectors(stored(vector))
    expected = np.zeros((5, 16))
    expected[VALID] = as_stored(VECTORS[VALID])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate([expected, expected[1:4]]), atol=1e-6)


def test_int8_has_a_scale_and_binary_its_bits_in_order() -> None:
    table = stored("int8")
    for row, vector, valid in zip(table.to_pylist(), VECTORS, VALID, strict=False):
        assert (row["scale"] is None) == (not valid)
        if valid:
            assert max(map(abs, row["embedding"])) == 127
            np.testing.assert_allclose(np.array(row["embedding"]) * row["scale"], vector, atol=row["scale"] / 2)
    first = stored("binary")["embedding"][0].as_py()
    assert [byte >> (7 - bit) & 1 for byte in first for bit in range(8)] == (VECTORS[0] > 0).tolist()
    zeros = stored_vectors(np.array([[0, 1, -1, 0, 0, 0, 0, 1]], np.float32), "binary", np.array([True]))
    assert zeros["embedding"][0].as_py() == [0b01000001], "zero is not positive"


def test_prefixes_have_unit_length() -> None:
    np.testing.assert_allclose(prefix_of(VECTORS, 5)[0], VECTORS[0, :5] / np.linalg.norm(VECTORS[0, :5]), atol=1e-6)
    assert prefix_of(VECTORS, 16) is VECTORS
    with pytest.raises(ConfigError, match=r"a multiple of 8 dimensions, not 20; set embed\.dims=16"):
        vector_fields("binary", 20)
