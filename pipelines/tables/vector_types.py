"""The types in which vectors are stored, and their way back to float32.

====== ======================================= ====================================================
type   column ``embedding``                    a number is
====== ======================================= ====================================================
fp32   fixed-size list of float32 [D]          itself
fp16   fixed-size list of float16 [D]          rounded to nearest
int8   fixed-size list of int8 [D], ``scale``  int8 * scale; symmetric, the largest of a vector is 127
binary fixed-size list of uint8 [D / 8]        its sign, set where positive; the first in the highest bit
====== ======================================= ====================================================

Bits are packed as ``numpy.packbits``, FAISS and LanceDB (``hamming``) have them. Shape suffixes: N rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crem.errors import ConfigError

__all__ = ["VectorType", "prefix_of", "stored_vectors", "unit_vectors", "vector_columns", "vector_fields"]

VectorType: TypeAlias = Literal["fp32", "fp16", "int8", "binary"]
_VALUES: dict[VectorType, pa.DataType] = {
    "fp32": pa.float32(),
    "fp16": pa.float16(),
    "int8": pa.int8(),
    "binary": pa.uint8(),
}


def vector_fields(vector: VectorType, dim: int) -> list[pa.Field]:
    """The columns of vectors of ``dim`` dimensions.

    Raises:
        ConfigError: binary vectors of so many dimensions do not fill their bytes.
    """
    if vector == "binary" and dim % 8:
        raise ConfigError(f"binary vectors have a multiple of 8 dimensions, not {dim}; set embed.dims={dim // 8 * 8}")
    length = dim // 8 if vector == "binary" else dim
    scale = [pa.field("scale", pa.float32())] if vector == "int8" else []
    return [pa.field("embedding", pa.list_(_VALUES[vector], length)), *scale]


def vector_columns(names: Sequence[str]) -> list[str]:
    """The columns that ``unit_vectors`` needs, of those that a table has."""
    return [name for name in ("embedding", "scale") if name in names]


def prefix_of(vectors_ND: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """The first dimensions of vectors, of unit length again; queries of a shortened index need the same."""
    return vectors_ND if vectors_ND.shape[1] == dim else _unit(vectors_ND[:, :dim])


def stored_vectors(
    vectors_ND: NDArray[np.float32], vector: VectorType, valid_N: NDArray[np.bool_]
) -> dict[str, pa.Array]:
    """The columns of ``vector_fields``, null where a row is not valid."""
    columns: dict[str, pa.Array] = {}
    stored: NDArray[Any]
    if vector == "int8":
        scales_N = np.abs(vectors_ND).max(1) / np.float32(127)
        columns["scale"] = pa.array(scales_N, pa.float32(), mask=~valid_N)
        stored = np.rint(vectors_ND / np.where(scales_N > 0, scales_N, 1)[:, None]).astype(np.int8)
    elif vector == "binary":
        stored = np.packbits(vectors_ND > 0, axis=1)
    else:
        stored = vectors_ND.astype(np.float16 if vector == "fp16" else np.float32)
    values = pa.array(stored.reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(values, stored.shape[1], mask=pa.array(~valid_N))
    return columns


def unit_vectors(table: pa.Table) -> NDArray[np.float32]:
    """The vectors of a table, of whichever type, as float32 [N, D] of unit length; zeros where a row has none.

    Those of fp32 are as they were written. The table has the columns that ``vector_columns`` names.
    """
    column = table["embedding"].combine_chunks()
    width, kind = column.type.list_size, column.type.value_type
    valid_N = column.is_valid().to_numpy(zero_copy_only=False)
    found = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    if pa.types.is_uint8(kind):
        vectors_ND = _unit(np.unpackbits(found, axis=1).astype(np.float32) * 2 - 1)
    else:
        vectors_ND = found if pa.types.is_float32(kind) else _unit(found.astype(np.float32))
    if len(found) == len(column):
        return vectors_ND
    rows_ND = np.zeros((len(column), vectors_ND.shape[1]), np.float32)
    rows_ND[valid_N] = vectors_ND
    return rows_ND


def _unit(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.where(lengths > 0, lengths, 1), np.float32)
