"""Items embedded one by one after a forward failed: the items at fault are named, unless it is the model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import crem
from crem.data.sequence import PreparedSequence
from crem.errors import ItemError
from crem.model.encoding import Encoded
from pipelines.embedding.lone_items import embed_alone
from pipelines.embedding.result_columns import ResultColumns
from pipelines.tables.schema import EmbeddingStamp, embeddings


def test_what_fails_alone_is_an_item_and_what_always_fails_is_the_model(tiny_model_dir: str) -> None:
    model = crem.load(tiny_model_dir)
    good = model.prepare(crem.Item("a red apple"))
    unknown = np.full_like(good.prompt.input_ids, 10**6)  # a token that the model does not have
    bad = replace(good, prompt=good.prompt._replace(input_ids=unknown))
    schema = embeddings(EmbeddingStamp(model.fingerprint, model.dim, tiny_model_dir))

    def alone(*sequences: PreparedSequence) -> list[Encoded | ItemError]:
        return embed_alone(
            sequences, results=ResultColumns(schema), model=tiny_model_dir, chorus_tokens=None, device="cpu",
            threads=1, timeout_s=60, attempts=2,
        )  # fmt: skip

    first, failed, last = alone(good, bad, good)
    assert isinstance(failed, ItemError) and failed.reason == "unexpected_error"
    for found in (first, last):
        assert isinstance(found, Encoded)
        np.testing.assert_allclose(found.vectors, model.embed([crem.Item("a red apple")]), atol=1e-6)
    with pytest.raises(IndexError):
        alone(bad, bad)
