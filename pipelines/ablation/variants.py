"""What ``crem ablate`` trains, and what the paper measured: Tables 3 and 4 and Figure 4 of arXiv 2602.19091.

A model at a chorus count is called by a *key*: ``crem@16``, ``nested@4``, ``retrieval_only@0`` (0 is EOS pooling
without chorus tokens), ``backbone@0``. Everything downstream (scores, trends, figures, the paper's numbers) uses them.

Choices:

- All variants start from the same backbone and have the same number of steps, rows and seeds.
- A loss that weighs nothing takes no rows of its own (``RowIndex.plan``): retrieval-only fills its batches with
  retrieval rows, generation-only with rows that have an answer. Each specialist so gets the better end of the budget.
- Retrieval-only and generation-only are without chorus tokens, as in Table 3. Figure 4 needs chorus tokens to look at,
  so both exist a second time with K of them.
- ``nested`` is ours: one model that draws its chorus count at each step and is evaluated at every one.
"""

from __future__ import annotations

from dataclasses import dataclass

from crem.config import AblateConfig, RunConfig

__all__ = [
    "BACKBONE",
    "MAP_METRICS",
    "METRICS",
    "PAPER",
    "PAPER_SOURCE",
    "TABLES",
    "UNTRAINED",
    "Variant",
    "key_of",
    "variants",
]

TABLES = ("table3", "table4", "figure4")
METRICS = ("retrieval", "native", "compressed", "cache")
MAP_METRICS = ("coverage", "overlap", "image_share")
"""Of the attention maps: ``crem.model.maps``."""
BACKBONE = "backbone@0"

PAPER_SOURCE = "arXiv 2602.19091, 2B: Tables 3 and 4; retrieval is MMEB, generation the mean of six benchmarks"
PAPER: dict[str, dict[str, float]] = {
    BACKBONE: {"native": 53.5},
    "retrieval_only@0": {"retrieval": 62.3, "native": 43.4, "cache": 100.0},
    "generation_only@0": {"retrieval": 2.9, "native": 53.2},
    "both@0": {"retrieval": 66.1, "native": 47.2},
    "crem@1": {"retrieval": 65.6, "native": 51.9, "compressed": 38.2, "cache": 0.07},
    "crem@4": {"retrieval": 66.1, "native": 52.3, "compressed": 41.7, "cache": 0.28},
    "crem@8": {"retrieval": 66.5, "native": 52.5, "compressed": 43.1, "cache": 0.56},
    "crem@16": {"retrieval": 66.7, "native": 53.1, "compressed": 44.2, "cache": 1.12},
    "crem@32": {"retrieval": 66.7, "native": 52.9, "compressed": 44.6, "cache": 2.24},
    "crem@64": {"retrieval": 66.6, "native": 53.1, "compressed": 46.2, "cache": 4.48},
}
"""In percent; what is not here is not in the paper."""


@dataclass(frozen=True)
class Variant:
    """One training run to be done with every seed; a loss setting of None stays as the ablation is configured."""

    name: str
    family: str
    """first half of its keys"""
    label: str
    tables: tuple[str, ...]
    counts: tuple[int, ...]
    """chorus counts at which it is evaluated, ascending; the last is its K"""
    compression_probability: float | None = None
    alpha_r: float | None = None
    alpha_g: float | None = None
    nested: bool = False
    """one model that is trained at all its counts"""

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """The configuration of its run.

        Raises:
            pydantic.ValidationError: the base does not go with the variant.
        """
        tree = base.model_dump(mode="json")
        nested_chorus = list(self.counts) if self.nested else []
        tree["model"] |= {"chorus_tokens": self.counts[-1], "nested_chorus": nested_chorus}
        for name in ("compression_probability", "alpha_r", "alpha_g"):
            if (value := getattr(self, name)) is not None:
                tree["loss"][name] = value
        tree["train"]["seed"] = seed
        return RunConfig.model_validate(tree)


UNTRAINED = Variant("backbone", "backbone", "backbone", ("table3",), (0,))
"""The backbone itself, read by EOS pooling: evaluated once, without a run."""


def key_of(family: str, chorus_tokens: int) -> str:
    """The key of a model at a chorus count."""
    return f"{family}@{chorus_tokens}"


def variants(config: AblateConfig, only: str | None = None) -> list[Variant]:
    """Every variant, those of Table 3 first; ``only`` keeps those of one of ``TABLES``."""
    main, p = config.chorus_tokens, config.compression_probability
    both = ("table3", "table4")
    made = [
        _variant("retrieval_only", "retrieval only", both, 0, p=0, alpha_g=0),
        _variant("generation_only", "generation only", ("table3",), 0, p=0, alpha_r=0),
        _variant("both", "both losses, no chorus, no compression", ("table3",), 0, p=0),
        _variant("crem", f"CREM, K = {main}", (*both, "figure4"), main, p=p),
    ]
    made += [
        _variant("crem", f"CREM, K = {count}", ("table4",), count, p=p)
        for count in config.chorus_counts
        if count != main
    ]
    counts = tuple(sorted(config.chorus_counts))
    made += [
        Variant(
            f"nested-{counts[-1]}",
            "nested",
            "CREM, nested",
            ("table4",),
            counts,
            compression_probability=p,
            nested=True,
        ),
        _variant("retrieval_only", f"retrieval only, K = {main}", ("figure4",), main, p=0, alpha_g=0),
        _variant("generation_only", f"generation only, K = {main}", ("figure4",), main, p=p, alpha_r=0),
    ]
    return [v for v in made if only is None or only in v.tables]


def _variant(
    family: str,
    label: str,
    tables: tuple[str, ...],
    count: int,
    *,
    p: float,
    alpha_r: float | None = None,
    alpha_g: float | None = None,
) -> Variant:
    name = f"{family.replace('_', '-')}-{count or 'eos'}"
    return Variant(name, family, label, tables, (count,), p, alpha_r, alpha_g)
