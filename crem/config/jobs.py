"""Settings of the jobs other than training, one section each. Sources are named as in ``crem.config.model``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from crem.config.section import Section

__all__ = [
    "AblateConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "GraftConfig",
    "ImageAccess",
    "IndexConfig",
    "LayoutConfig",
    "PrepareConfig",
    "ServeConfig",
]


def _yaml_off(value: Any) -> Any:
    """YAML reads the word ``off`` as false."""
    return "off" if value is False else value


DuplicatePolicy: TypeAlias = Annotated[Literal["off", "report", "drop"], BeforeValidator(_yaml_off)]


class GraftConfig(Section):
    """The new vision tower of a grafted language model (``crem graft``): 3.7 M parameters by default.

    Source: ours; patches and merging are Qwen2-VL's.
    """

    vision_depth: int = Field(6, ge=1)
    vision_embed_dim: int = Field(192, ge=8)
    vision_num_heads: int = Field(3, ge=1)
    patch_size: int = Field(14, ge=2)
    spatial_merge_size: int = Field(2, ge=1)


class LayoutConfig(Section):
    """How the records of a table are read, for the jobs that read tables of others."""

    format: str = "auto"
    """Name of the format (``pipelines/formats``); ``auto`` recognises it by the columns. Source: ours."""
    columns: dict[str, str | None] = Field(default_factory=dict)
    """Columns to rename before anything else, theirs: ours; ``theirs: null`` leaves one out. Source: ours."""
    allow_unknown: bool = False
    """Whether to go on where a column is nearly one that is known: ``Split``, ``query_image``. Source: ours."""


class ImageAccess(Section):
    """What the rows of a corpus may name outside of it. Nothing by default: a corpus comes from elsewhere."""

    image_roots: list[str] = Field(default_factory=list)
    """Folders and URIs from which images are read, e.g. ``[/data/coco, s3://bucket/images]``; the corpus folder, and
    its bucket, need not be named. Source: ours."""
    url_hosts: list[str] = Field(default_factory=list)
    """Hosts from which ``http(s)`` images are fetched: ``example.org``, ``*.example.org``, ``example.org:8080``, or
    ``*`` for any. A host that is named must answer, or the job fails; one that only ``*`` allows costs its row."""
    url_private: bool = False
    """Whether these hosts may have private or loopback addresses; link-local ones are refused always. Source: ours."""
    url_timeout_s: float = Field(60.0, gt=0)
    """Longest time for one image by URL, with all attempts. Source: ours."""

    @model_validator(mode="after")
    def _whole_places(self) -> ImageAccess:
        if relative := [root for root in self.image_roots if "://" not in root and not root.startswith("/")]:
            raise ValueError(f"image_roots has {relative[0]!r}; give an absolute path or a URI")
        if urls := [host for host in self.url_hosts if "/" in host or not host]:
            raise ValueError(f"url_hosts has {urls[0]!r}; give host names such as example.org, without http://")
        return self


class PrepareConfig(LayoutConfig, ImageAccess):
    """From a raw corpus to prepared tables (``crem prepare``)."""

    encode_max_pixels: int = Field(1280 * 28 * 28, ge=64)
    """Stored images are reduced to this area in pixels, whatever the preset's own model reads: a later one may read
    more. Source: VLM2Vec-V2 (1280 x 28^2, the largest that its backbone reads)."""
    image_format: Literal["auto", "jpeg", "png", "webp"] = "auto"
    """How images are stored; ``auto`` is PNG up to 256 x 256 pixels, else JPEG. Source: ``tests/bench/README.md``."""
    image_quality: int = Field(95, ge=1, le=100)
    """Of JPEG and WebP; a WebP of 100 is lossless. Source: ``tests/bench/README.md``."""
    max_text_chars: int = Field(100_000, ge=1)
    """A row with a longer text is rejected. Source: ours."""
    tokenizer: str | None = None
    """Checkpoint folder, URI or hub name whose tokenizer counts ``max_text_tokens``."""
    max_text_tokens: int | None = Field(None, ge=1)
    """A row with a text of more tokens is rejected; ``null`` does not count: a model cuts what it cannot read."""
    rows_per_task: int | None = Field(None, ge=1)
    """Records per Ray Data task; ``null``: a 256th of the corpus, 64 to 4,096. Source: ours."""
    storage_patience_s: float = Field(600, ge=0)
    """How long the job waits for storage of the output that does not answer. Source: ours."""

    # Duplicates, contamination and language: pipelines/duplicates. Those beside exact_duplicates need the extra curate.
    exact_duplicates: DuplicatePolicy = "report"
    """Rows whose query, target, question and answer another row has: clusters are reported, or all but the first row
    are left out. Source: ours."""
    near_duplicates: DuplicatePolicy = "off"
    """The same for rows that are nearly the same; every stored image is read again. Source: ours."""
    near_image_bits: int = Field(6, ge=0, le=16)
    """Bits of 64 in which the dHashes of near images differ at most. Source: tests/bench/README.md."""
    near_text_jaccard: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of near texts. Source: Lee et al. 2022 (arXiv:2107.06499), appendix A."""
    minhash_permutations: int = Field(128, ge=16, le=1024)
    """Minima of a MinHash signature; the estimate's standard deviation is 0.035. Source: datasketch's default."""
    minhash_bands: int = Field(16, ge=1, le=256)
    """Bands of the signature, 8 minima each: a pair of similarity 0.8 is found with 95 %, of 0.9 with 99.99 %.
    Source: FineWeb (arXiv:2406.17557) has 14 of 8."""
    minhash_shingle_chars: int = Field(5, ge=1, le=64)
    """Source: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.2.2."""
    minhash_min_chars: int = Field(250, ge=1)
    """Shorter texts are near only if they differ by one typing error; about 50 words. Source: ours."""
    contamination: tuple[str, ...] = ()
    """Prepared tables of evaluation sets. Source: ours."""
    contaminated: Literal["report", "drop"] = "drop"
    """Rows for training with an image or text of these evaluation sets, or one near to it. Source: ours."""
    contamination_text_chars: int = Field(40, ge=1)
    """Shorter texts do not show that a row is from an evaluation set. Source: eight words, the least of GPT-3's
    (arXiv:2005.14165, appendix C)."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes; rows with a text in another language are left out, none if empty. Source: ours."""
    language_min_chars: int = Field(30, ge=1)
    """Shorter texts are in no language. Source: tests/bench/README.md."""
    language_confidence: float = Field(0.5, gt=0, le=1)
    """Probability from which on a text is taken to be in another language. Source: tests/bench/README.md."""

    @model_validator(mode="after")
    def _bands(self) -> PrepareConfig:
        if self.minhash_permutations % self.minhash_bands:
            raise ValueError(
                f"prepare.minhash_permutations={self.minhash_permutations} must be a multiple of "
                f"prepare.minhash_bands={self.minhash_bands}"
            )
        return self

    @model_validator(mode="after")
    def _whose_tokens(self) -> PrepareConfig:
        if self.max_text_tokens is not None and self.tokenizer is None:
            raise ValueError(
                f"max_text_tokens={self.max_text_tokens} needs prepare.tokenizer, a checkpoint whose tokenizer counts"
            )
        return self


class EmbedConfig(LayoutConfig, ImageAccess):
    """Batch embedding with a Ray Data actor pool."""

    side: Literal["query", "target"] | None = None
    """The side to embed of records that have two; needed for formats of pairs. Source: ours."""

    id: tuple[str, ...] = ()
    """Columns of the input that are the id; several are one together, a struct. By default ``id``. Source: ours."""
    keep: tuple[str, ...] = ()
    """Columns of the input that stand beside the vectors as they came in. Source: ours."""
    vector: Literal["fp32", "fp16", "int8", "binary"] = "fp32"
    """Type of the column ``embedding``: int8 has a column ``scale``, binary is the signs, 8 in a byte. Source: ours."""
    output_format: Literal["parquet", "lance"] = "parquet"
    """What the output is: Parquet files, or one Lance dataset. Source: the project's brief."""
    dims: int | None = Field(None, ge=1)
    """The first so many dimensions of a vector, of unit length again; ``null`` means all. Source: ours."""
    states: bool = False
    """Whether to write the states of the chorus tokens, for late interaction. Source: ours."""
    memory: Annotated[Literal["off", "bf16", "int8"], BeforeValidator(_yaml_off)] = "off"
    """Whether to write the memories of the items, for answers without the items, and their type. Source: ours."""
    batch_size: int = Field(64, ge=1)
    """Most items of a forward. Source: ours."""
    batch_tokens: int | None = Field(None, ge=1)
    """Most tokens of a forward, padding and vision tokens included; halved where they do not fit. ``null``: 16,384 on a
    GPU, 4,096 on a CPU, whose caches larger batches leave. Source: ``tests/bench/README.md``."""
    compile: bool = False
    """``torch.compile`` of the model's layers when an actor starts. Source: ``tests/bench/README.md``."""
    rows_per_task: int | None = Field(None, ge=1)
    """Rows that one task reads and prepares; by default 64 to 4,096, by the size of the input. Source: ours."""
    min_actors: int = Field(1, ge=1)
    max_actors: int = Field(8, ge=1)
    """Actors, each with its own copy of the model; the pool scales between the two bounds. Source: ours."""
    cpus_per_actor: float = Field(1, gt=0)
    gpus_per_actor: float = Field(0, ge=0)
    """1 on a cluster with GPUs. Source: ours."""
    cpus_per_task: float = Field(1, gt=0)
    """Of a task that reads and prepares items. Source: ours."""
    threads_per_actor: int = Field(1, ge=1)
    price_per_hour: float | None = Field(None, ge=0)
    """Of an actor with its accelerator, in any currency; the job then says what it costs. Source: ours."""
    item_timeout_s: float = Field(300, gt=0)
    """Longest time to decode and tokenise an item, or for a forward (on a CPU, for each item of it); then its process
    ends, and a new one tries again. Source: ours; four such attempts end before Ray Data's 30 minutes without progress.
    """
    item_attempts: int = Field(2, ge=1)
    """After so many deaths of a process its items go one by one, and one that so many processes die of is failed."""
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` means the model's K."""

    @model_validator(mode="after")
    def _bounds(self) -> EmbedConfig:
        if self.max_actors < self.min_actors:
            raise ValueError(f"embed.max_actors={self.max_actors} is below embed.min_actors={self.min_actors}")
        return self


class IndexConfig(Section):
    """The index (``crem index``, ``crem search``, ``crem answer``)."""

    exact_below: int = Field(100_000, ge=0)
    """Exact search below this many vectors, an inverted file above. Source: the project's brief."""
    quantiser: Literal["IVF_RQ", "IVF_PQ"] = "IVF_RQ"
    """Above the threshold: RaBitQ (arXiv:2405.12497) of one bit a component, or product quantisation of one byte for
    four. Source: tests/bench/README.md, where both find as much and the former is built far faster."""
    cells: int | None = Field(None, ge=1)
    """Cells of a segment of an inverted file; by default the square root of its vectors. Source: ours."""
    segment_rows: int = Field(8_000_000, ge=256)
    """Vectors of a segment, which a task builds. At 1,536 dimensions the sample that trains its cells takes 4.5 GB.
    Source: ours."""
    probes: int = Field(32, ge=1)
    """Cells that a query visits. Source: tests/bench/README.md."""
    refine: int = Field(10, ge=1)
    """A query compares so many times k stored vectors exactly, those that the codes put first. Source: as
    ``probes``."""
    full_text: bool = False
    """Whether the texts get an index of their words, for ``crem search --hybrid``. Source: ours."""
    filters: tuple[str, ...] = ()
    """Columns that get an index of their values, so that ``--where`` need not scan them. Source: ours."""
    recall_sample: int = Field(100, ge=0)
    """Stored vectors by which recall@10 against exact search is measured after a build; 0 leaves it out. Source:
    ours."""
    keep_versions: int = Field(2, ge=1)
    """Complete versions that stay readable, the newest among them. Source: ours."""


class EvaluateConfig(Section):
    """Retrieval and answers on the test rows (``crem evaluate``)."""

    max_answers: int = Field(400, ge=1)
    """Questions per split and mode, spread evenly over the rows. Source: ours, to bound the time on a CPU."""
    max_new_tokens: int = Field(16, ge=1)
    batch_size: int = Field(64, ge=1)
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` means the model's K."""


class AblateConfig(Section):
    """The paper's Tables 3 and 4 and Figure 4 (``crem ablate``)."""

    chorus_tokens: int = Field(16, ge=1, le=256)
    """K of the CREM variant. Source: paper, main results."""
    chorus_counts: tuple[int, ...] = (1, 4, 8, 16, 32)
    """The K of Table 4, one model each, and the K' of the nested model. Source: paper, which also has 64."""
    compression_probability: float = Field(0.5, gt=0, le=1)
    """p of the variants with compression. Source: as ``loss.compression_probability``."""
    parallel: int = Field(1, ge=1)
    """Concurrent runs, one process each. Source: ours."""
    map_images: int = Field(200, ge=1)
    """Test images over which coverage and overlap of the attention maps are averaged. Source: ours."""

    @model_validator(mode="after")
    def _counts(self) -> AblateConfig:
        counts = list(self.chorus_counts)
        if len(set(counts)) != len(counts) or not all(1 <= k <= 256 for k in counts):
            raise ValueError(f"ablate.chorus_counts={counts} must be distinct and between 1 and 256")
        if self.chorus_tokens not in counts:
            raise ValueError(f"ablate.chorus_tokens={self.chorus_tokens} must be one of ablate.chorus_counts={counts}")
        return self


class ServeConfig(Section):
    """Online serving with Ray Serve."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is loopback. Source: ours."""
    port: int = Field(8000, ge=0, le=65535)
    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(4, ge=1)
    target_ongoing_requests: int = Field(16, ge=1)
    max_ongoing_requests: int = Field(32, ge=1)
    max_queued_requests: int = Field(256, ge=-1)
    """A request beyond it gets status 429. Source: ours."""
    cpus_per_replica: float = Field(1, gt=0)
    gpus_per_replica: float = Field(0, ge=0)
    threads_per_replica: int = Field(1, ge=1)
    chorus_tokens: int | None = Field(None, ge=0)
    """K' of a nested model (``model.nested_chorus``); ``null`` means the model's K."""
    max_batch_size: int = Field(32, ge=1)
    batch_wait_s: float = Field(0.01, ge=0)
    """Longest wait for a full batch. Source: ours."""
    max_new_tokens: int = Field(512, ge=1)
    """Upper bound of a request's ``max_tokens``."""
    max_request_bytes: int = Field(32 * 2**20, ge=1024)
    """A larger request body gets status 413."""
    max_inputs: int = Field(256, ge=1)
    """Most items of one embeddings request."""
