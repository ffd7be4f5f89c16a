"""Settings of the jobs that make a new version of prepared tables. Sources are named as in ``crem.config.model``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue, model_validator

from crem.config.section import Section

__all__ = ["MineConfig", "SynthesiseConfig"]


class SynthesiseConfig(Section):
    """Questions and answers about the queries of prepared tables, by a model behind an OpenAI-compatible endpoint
    (``crem synthesise``).

    What decides the answers (``model``, ``prompt``, ``kinds``, ``questions``, ``temperature``, ``request`` …) is kept
    in the output's plan, and a run with other values is refused there. Bounds, prices and speeds may change between
    the runs that make one output.
    """

    engine: Literal["endpoint", "vllm"] = "endpoint"
    """``vllm`` runs ``model`` inside the job, by ``ray.data.llm``, in place of an endpoint."""
    base_url: str | None = None
    """Where the endpoint is, up to and with ``/v1``. The key comes from ``OPENAI_API_KEY`` in the environment."""
    model: str | None = None
    """Name of the model there. Source of a choice: the paper took Qwen2.5-VL-7B."""
    prompt: str = "grounded-1"
    """A prompt of ``pipelines/synthesis/prompts``, or the path of a YAML file of yours with the same keys."""
    kinds: tuple[str, ...] = ("describe", "attribute", "count", "relation", "activity", "text", "reason")
    """Kinds of question, of those that the prompt explains; they take turns over the rows. Source: ours."""
    questions: int = Field(1, ge=1, le=8)
    """Questions per row. The row takes the first; each further one becomes a copy of the row. Source: ours."""
    split: str = "train"
    """Only rows whose split starts with this are asked about."""
    text_queries: bool = False
    """Whether rows whose query has no image are asked about too. Source: the paper's data are about images."""
    max_image_pixels: int = Field(1024 * 1024, ge=64)
    """Larger images are reduced to this area before they are sent. Source: ours, about 1,300 tokens in Qwen2-VL."""
    structured: Literal["auto", "json_schema", "json_object", "text"] = "auto"
    """The ``response_format`` that is asked for; ``auto`` steps down from a JSON schema where the endpoint refuses."""
    temperature: float = Field(0.7, ge=0, le=2)
    """Source: ours; above 0, so that a second attempt differs from the first."""
    max_answer_tokens: int = Field(512, ge=1)
    """Longest completion of one request."""
    request: dict[str, JsonValue] = Field(default_factory=dict)
    """Further fields of every request, e.g. ``{seed: 1}``."""
    attempts: int = Field(3, ge=1)
    """Invalid answers after which a row stays without a question. Source: ours."""
    max_failed_share: float = Field(0.5, gt=0, le=1)
    """A run in which a larger share of rows fails ends with the reasons, once 50 rows are done. Source: ours."""
    concurrency: int = Field(32, ge=1)
    """Requests in flight, of all workers together; rows of a batch of ``engine=vllm``. Source: ours."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Upper bound of all workers together; ``null`` is none."""
    timeout_s: float = Field(120, gt=0)
    """Longest wait for one answer. Source: ours."""
    away_s: float = Field(600, ge=0)
    """How long the endpoint may give no answer to anyone before the job ends; it resumes when run again."""
    max_requests: int | None = Field(None, ge=1)
    """The job ends before it sends more, those of earlier runs into the same output included."""
    max_tokens: int | None = Field(None, ge=1)
    """As ``max_requests``, in tokens of prompts and answers."""
    max_cost: float | None = Field(None, gt=0)
    """As ``max_requests``, in the currency of the prices."""
    input_price: float = Field(0, ge=0)
    """Price of a million prompt tokens."""
    output_price: float = Field(0, ge=0)
    """Price of a million answer tokens."""
    when_spent: Literal["stop", "finish"] = "stop"
    """At a bound: ``stop``, to be continued, or ``finish`` the tables with the questions that there are."""
    actors: int = Field(2, ge=1)
    """Workers that send requests; each takes 1 CPU. Source: ours."""
    rows_per_shard: int = Field(256, ge=1)
    """Rows that one worker asks about at a time, and that become one part. Source: ours."""
    engines: int = Field(1, ge=1)
    """Copies of the model of ``engine=vllm``, each on GPUs of its own."""
    engine_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Arguments of vLLM's engine, e.g. ``{tensor_parallel_size: 2, max_model_len: 8192}``."""

    @model_validator(mode="after")
    def _prices(self) -> SynthesiseConfig:
        if self.max_cost is not None and not self.input_price and not self.output_price:
            raise ValueError("synthesise.max_cost needs synthesise.input_price and synthesise.output_price")
        bounds = ("max_requests", "max_tokens", "max_cost", "requests_per_minute")
        if self.engine == "vllm" and (given := [name for name in bounds if getattr(self, name) is not None]):
            raise ValueError(f"synthesise.{given[0]} bounds an endpoint; leave it out with synthesise.engine=vllm")
        if not self.kinds:
            raise ValueError("synthesise.kinds is empty; name at least one kind of question")
        return self


class MineConfig(Section):
    """Hard negatives for the rows of prepared tables (``crem mine``). How the model runs is set in ``embed``."""

    negatives: int = Field(4, ge=1)
    """Negatives that are added to a row, beside those that it has. Source: ours."""
    ranks: tuple[int, int] = (1, 200)
    """First and last rank of the targets that are considered, 1 being the nearest that is not the row's own. A first
    rank above 1 skips the nearest, which may be positives without a label (NV-Retriever's TopK-shifted). Source: ours.
    """
    max_ratio: float = Field(0.95, gt=0, le=1)
    """A target is dropped as a likely false negative where its similarity to the query is above this share of the
    positive's. Source: NV-Retriever's TopK-PercPos, 95 %."""
    margin: float = Field(0.0, ge=0)
    """A target is dropped, too, where it comes nearer than this to the positive's similarity. Source: NV-Retriever's
    TopK-MarginPos; off."""
    within: Literal["task", "source", "all"] = "task"
    """Negatives are targets of rows of the same source and task, of the same source, or any. Source: ours: a target of
    another form (a text among images) is an easy negative."""
    pick: Literal["nearest", "sample"] = "nearest"
    """Which of the targets that are left: the nearest, or a sample. Source: NV-Retriever found samples as good."""
    seed: int = Field(0, ge=0)
    """Of the sample."""
    split: str = "train"
    """Only rows whose split starts with this get negatives, and only their targets become negatives."""
    max_targets: int = Field(2_000_000, ge=1)
    """Search is exact over all targets of a task up to this many; beyond it, over a fixed sample of as many."""
    rows_per_shard: int = Field(4096, ge=1)
    """Rows per Ray Data task, and per part. Source: ours."""
    keep_vectors: bool = False
    """Whether the vectors that the job made stay in ``OUT/vectors``, for ``--vectors`` of another run."""

    @model_validator(mode="after")
    def _ranks(self) -> MineConfig:
        first, last = self.ranks
        if not 1 <= first <= last:
            raise ValueError(f"mine.ranks={list(self.ranks)} must be [first, last] with 1 <= first <= last")
        if last - first + 1 < self.negatives:
            raise ValueError(f"mine.ranks={list(self.ranks)} has fewer ranks than mine.negatives={self.negatives}")
        return self
