"""Sequences that travelled are what they were."""

from __future__ import annotations

import pickle

import numpy as np

import crem
from crem.data.sequence import PreparedSequence
from pipelines.embedding.packed_sequences import PackedSequences
from tests.pipelines.conftest import encoded, random_image


def values(sequence: PreparedSequence) -> list[object]:
    arrays = (*sequence.prompt[:2], sequence.positions_3T, sequence.patches_PCN)
    return [*((a.dtype, a.shape, a.tobytes()) for a in arrays), *sequence.prompt[2:], sequence.grids, sequence.z]


def test_sequences_survive_packing(tiny_model_dir: str) -> None:
    model = crem.load(tiny_model_dir)
    pictures = [encoded(random_image(seed, (40, 20 * seed + 20))) for seed in (1, 2)]
    items = [crem.Item(text="a"), crem.Item(images=pictures), crem.Item(text="word " * 200, images=pictures[:1])]
    sequences = [model.prepare(item) for item in items]
    assert sequences[2].prompt.cut_texts and len(sequences[1].grids) == 2 and not sequences[0].grids
    for some in (sequences, sequences[:1], []):
        found = pickle.loads(pickle.dumps(PackedSequences.of(some))).unpack()
        assert [values(one) for one in found] == [values(one) for one in some]
    assert np.abs(model.embed_prepared(found or sequences) - model.embed_prepared(sequences)).max() == 0
    size = len(pickle.dumps(PackedSequences.of(sequences[:1] * 100))) / 100
    assert size < 18 * sequences[0].tokens + 60, "of int64 they have 33 bytes a token"
