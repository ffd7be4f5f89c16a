"""Which of the paper's trends appear: each is a linear statement about scores, checked in the same way on both.

A *claim* says that a weighted sum of scores exceeds a bound: "CREM finds better than retrieval only" is
1 x retrieval(crem@16) - 1 x retrieval(retrieval_only@0) > 0. The sum is taken seed by seed, because variants of one
seed share the order of their rows, and its mean and standard error are over seeds. A claim is *clear*, for or against,
where the mean lies more than two standard errors from the bound. The same sum of the paper's numbers stands beside it.

Pure functions; scores are in percent. Where a claim allows a margin or a share, the number is ours: the paper shows
figures and does not say what would have contradicted them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.ablation.variants import BACKBONE, PAPER, key_of

__all__ = ["NO_SEED", "Claim", "Estimate", "Scores", "Term", "Trend", "claims", "estimate", "judge", "map_claims"]

Scores = Mapping[str, Mapping[str, Mapping[int, float]]]
"""key -> metric -> seed -> percent. The backbone has no seeds: its one value, under -1, counts for every seed."""

NO_SEED = -1
_CLEAR = 2.0
"""Standard errors. Source: the project's brief."""
_CHANCE_SHARE = 0.1
"""Retrieval that nothing trained, at most this share of what training gives. The paper: 2.9 / 62.3 = 0.05."""
_MARGIN = 1.0
"""Points within which two figures count as equal. Source: ours."""
_NESTED_SHARE = 0.95
"""Share of a separately trained model's figures that a nested one keeps. Source: ours; a share, because a point is
little at the paper's 66 % and much where training was short."""
_KEPT_SHARE = 0.75
"""Share of native answers that compressed ones keep. The paper: 44.2 / 53.1 = 0.83."""


@dataclass(frozen=True)
class Estimate:
    """Mean of one value for each seed and its standard error, which one seed does not have."""

    mean: float
    se: float | None
    n: int


@dataclass(frozen=True)
class Claim:
    """The weighted sum of ``terms`` (weight, key, metric) exceeds ``bound``."""

    text: str
    terms: tuple[tuple[float, str, str], ...]
    bound: float = 0.0
    note: str = ""
    """what the sum is, where it is not a plain difference"""


@dataclass(frozen=True)
class Term:
    """One term of a claim, with its mean over seeds."""

    weight: float
    key: str
    metric: str
    mean: float


@dataclass(frozen=True)
class Trend:
    """A claim beside the scores."""

    text: str
    note: str
    terms: list[Term]
    bound: float
    ours: Estimate
    """the weighted sum"""
    appears: bool
    clear: bool | None
    """more than two standard errors from the bound, for or against; None with one seed"""
    paper: float | None
    """the same sum of the paper's figures; None where it lacks one"""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error (sample deviation over the root of n)."""
    n = len(values)
    assert n, "an estimate needs values"
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n), n)


def judge(claim: Claim, scores: Scores) -> Trend | None:
    """The claim beside the scores, or None where one of them is missing in every seed."""
    terms = [(weight, scores.get(key, {}).get(metric, {})) for weight, key, metric in claim.terms]
    seeds = {seed for _, by_seed in terms for seed in by_seed} - {NO_SEED}
    seeds = {seed for seed in seeds if all(seed in by_seed or NO_SEED in by_seed for _, by_seed in terms)}
    if not seeds or not all(by_seed for _, by_seed in terms):
        return None
    ours = estimate(
        [
            math.fsum(weight * by_seed.get(seed, by_seed.get(NO_SEED, math.nan)) for weight, by_seed in terms)
            for seed in sorted(seeds)
        ]
    )
    in_paper = [PAPER.get(key, {}).get(metric) for _, key, metric in claim.terms]
    paper = None
    if all(value is not None for value in in_paper):
        paper = math.fsum(w * v for (w, _, _), v in zip(claim.terms, in_paper, strict=True) if v is not None)
    return Trend(
        text=claim.text,
        note=claim.note,
        terms=[
            Term(weight, key, metric, mean=estimate(list(scores[key][metric].values())).mean)
            for weight, key, metric in claim.terms
        ],
        bound=claim.bound,
        ours=ours,
        appears=ours.mean > claim.bound,
        clear=None if ours.se is None else abs(ours.mean - claim.bound) > _CLEAR * ours.se,
        paper=paper,
    )


def claims(main: int, counts: Sequence[int]) -> list[Claim]:
    """The claims of Tables 3 and 4 for CREM at K = ``main``, and what nesting costs at each of ``counts``."""
    counts = sorted(counts)
    first, last = counts[0], counts[-1]
    crem, low, high = (key_of("crem", k) for k in (main, first, last))
    retrieval_only, generation_only, both = (key_of(f, 0) for f in ("retrieval_only", "generation_only", "both"))

    def more(text: str, metric: str, key: str, than: str, bound: float = 0.0, note: str = "") -> Claim:
        return Claim(text, ((1, key, metric), (-1, than, metric)), bound, note)

    made = [
        more("Training for retrieval alone loses native answers", "native", BACKBONE, retrieval_only),
        Claim(
            "Training for generation alone leaves retrieval near chance",
            ((_CHANCE_SHARE, retrieval_only, "retrieval"), (-1, generation_only, "retrieval")),
            note=f"{_CHANCE_SHARE:g} x retrieval only - generation only",
        ),
        more(
            "Generation helps retrieval: both losses find better than retrieval only", "retrieval", both, retrieval_only
        ),
        more("CREM finds better than retrieval only", "retrieval", crem, retrieval_only),
        more("CREM finds better than both losses without chorus and compression", "retrieval", crem, both),
        more("CREM answers better natively than both losses without chorus and compression", "native", crem, both),
        more(
            f"CREM answers natively within {_MARGIN:g} point of generation only",
            "native",
            crem,
            generation_only,
            -_MARGIN,
        ),
        Claim(
            f"Compressed answers keep {_KEPT_SHARE:.0%} of native ones",
            ((1, crem, "compressed"), (-_KEPT_SHARE, crem, "native")),
            note=f"compressed - {_KEPT_SHARE:g} x native",
        ),
        more(f"One chorus token finds better than EOS pooling (K = {first})", "retrieval", low, retrieval_only),
    ]
    if first < main:
        made += [
            more(f"Retrieval rises from K = {first} to {main}", "retrieval", crem, low),
            more(f"Native answers rise from K = {first} to {main}", "native", crem, low),
        ]
    if first < last:
        made.append(more(f"Compressed answers rise from K = {first} to {last}", "compressed", high, low))
    if first < main < last:
        made.append(
            Claim(
                f"Retrieval saturates: {main} to {last} adds at most half of what {first} to {main} adds",
                tuple((w, key, "retrieval") for w, key in ((1.5, crem), (-0.5, low), (-1, high))),
                note=f"0.5 x (K {main} - K {first}) - (K {last} - K {main})",
            )
        )
    for metric in ("retrieval", "native", "compressed"):
        made += [
            Claim(
                f"Nested, K' = {k}: {metric} keeps {_NESTED_SHARE:.0%} of the model trained with K = {k}",
                ((1, key_of("nested", k), metric), (-_NESTED_SHARE, key_of("crem", k), metric)),
                note=f"nested - {_NESTED_SHARE:g} x separate",
            )
            for k in counts
        ]
    return made


def map_claims(main: int) -> list[Claim]:
    """The claims of Figure 4, which the paper shows and does not measure."""
    crem, retrieval_only, generation_only = (key_of(f, main) for f in ("crem", "retrieval_only", "generation_only"))
    return [
        Claim(
            "CREM's chorus tokens cover more of the image than retrieval only's",
            ((1, crem, "coverage"), (-1, retrieval_only, "coverage")),
        ),
        Claim(
            "CREM's chorus tokens cover more of the image than generation only's",
            ((1, crem, "coverage"), (-1, generation_only, "coverage")),
        ),
        Claim(
            "CREM's chorus tokens overlap less than retrieval only's",
            ((1, retrieval_only, "overlap"), (-1, crem, "overlap")),
        ),
    ]
