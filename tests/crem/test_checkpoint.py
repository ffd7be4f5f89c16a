"""Checkpoints: identity, fingerprint, errors with remedies, URIs, LoRA merging, where the chorus rows go."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import crem
from crem.checkpoint import fingerprint, save_model
from crem.config import ModelConfig, load_config
from crem.data.items import Item
from crem.errors import CheckpointError, ConfigError, ResourceError
from crem.fetch import local_copy
from crem.inference import Crem
from crem.model.backbone import SPECIAL_TOKENS, tokenizer_from_texts
from crem.model.build import build_model
from crem.train.step import train_step
from tests.conftest import TEXTS, lively, tiny_config
from tests.crem.train.runs import PlainEngine, run_config, share, stock_backbone

ITEMS = ["a red apple", Image.new("RGB", (70, 40), (200, 30, 0)), Item("both", [Image.new("RGB", (64, 64))])]


@pytest.fixture
def copied(tiny_model_dir: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saving_and_loading_changes_nothing(tmp_path: Path, dtype: str) -> None:
    model, collator = build_model(tiny_config(f"model.dtype={dtype}"), texts=TEXTS)
    lively(model)
    stamp = save_model(model, collator, tmp_path / "a")
    loaded = crem.load(tmp_path / "a")
    before = Crem(model.eval(), collator, stamp).embed(ITEMS) if dtype == "float32" else loaded.embed(ITEMS)
    assert loaded.fingerprint == stamp and loaded.config == model.config
    assert next(loaded.model.parameters()).dtype == getattr(torch, dtype)
    assert np.array_equal(loaded.embed(ITEMS), before)
    assert save_model(loaded.model, loaded.collator, tmp_path / "b") == stamp
    assert np.array_equal(crem.load(tmp_path / "b").embed(ITEMS), before), "bit for bit"


def rewrite(folder: Path, changes: dict[str, object]) -> None:
    description = json.loads((folder / "crem.json").read_text())
    for dotted, value in changes.items():
        *sections, leaf = dotted.split(".")
        at = description
        for section in sections:
            at = at[section]
        at[leaf] = value
    (folder / "crem.json").write_text(json.dumps(description))


def test_fingerprint_names_what_decides_an_embedding(tiny_model_dir: str, copied: Path) -> None:
    stamp = fingerprint(tiny_model_dir, "float32")
    assert fingerprint(copied, "float32") == stamp, "not the folder's name"
    assert len(stamp) == 16 and int(stamp, 16) >= 0
    assert fingerprint(copied, "bfloat16") != stamp
    assert crem.load(copied, dtype=torch.bfloat16).fingerprint == fingerprint(copied, "bfloat16")
    seen = {stamp}
    for changes in (
        {"chorus_tokens": 3},
        {"model.prompt.system": "Be brief."},
        {"model.prompt.embedding_instruction": "Find."},
        {"model.image.max_pixels": 5000},
    ):
        rewrite(copied, changes)
        seen.add(fingerprint(copied, "float32"))
    weights = load_file(copied / "model.safetensors")
    weights["visual.patch_embed.proj.weight"][0, 0, 0, 0, 0] += 1e-3
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    seen.add(fingerprint(copied, "float32"))
    assert len(seen) == 6


def test_fingerprint_does_not_hold_where_the_backbone_lay(tmp_path: Path) -> None:
    stamps = set()
    for name in ("here", "there"):
        folder = stock_backbone(tmp_path / name)
        model, collator = build_model(ModelConfig(backbone=folder, chorus_tokens=2, lora=None, dtype="float32"))
        stamps.add(save_model(model, collator, tmp_path / f"{name}-crem"))
    assert len(stamps) == 1


def damage_json(folder: Path) -> None:
    (folder / "crem.json").write_text("{")


def empty_json(folder: Path) -> None:
    (folder / "crem.json").write_text("[]")


def newer_format(folder: Path) -> None:
    rewrite(folder, {"format": 99})


def unknown_setting(folder: Path) -> None:
    rewrite(folder, {"model.promt": 1})


def truncate_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def other_kind(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def stock(folder: Path) -> None:
    (folder / "crem.json").unlink()


def stock_and_damaged(folder: Path) -> None:
    stock(folder)
    (folder / "config.json").write_text("{")


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def more_chorus_tokens(folder: Path) -> None:
    rewrite(folder, {"chorus_tokens": 9})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_json, "crem.json is damaged .* copy the checkpoint again"),
        (empty_json, "crem.json is damaged .* copy the checkpoint again"),
        (unknown_setting, "crem.json is damaged .* copy the checkpoint again"),
        (newer_format, "format 99; this version reads 1: install a newer crem"),
        (truncate_weights, "weights in .* cannot be read"),
        (drop_a_weight, r"missing_keys.*language_model\.norm.*copy the checkpoint again"),
        (widen, "do not fit|cannot be read"),
        (other_kind, "'llama' model; CREM's backbone is Qwen2-VL"),
        (stock, "'qwen2_vl' checkpoint, not a CREM checkpoint .* Train one .* crem train"),
        (stock_and_damaged, "config.json cannot be read .* copy the checkpoint again"),
        (nothing, "without config.json, not a CREM checkpoint"),
        (lambda f: (f / "model.safetensors").unlink(), "no .*safetensors"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.*copy the checkpoint again"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json.*copy the checkpoint again"),
        (more_chorus_tokens, "chorus.*copy the checkpoint again"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_says_why(copied: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    damage(copied)
    with pytest.raises(CheckpointError, match=f"(?s){says}"):
        crem.load(copied)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "none", "./none", "a/b/none", "file:///nowhere/none", "memory://none-here"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            crem.load(missing)
    with pytest.raises(CheckpointError, match="cannot read 'nosuch://x'"):
        crem.load("nosuch://x")


def test_a_missing_folder_is_no_hub_name_where_its_parent_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("crem.fetch._hub_copy", lambda name: pytest.fail(f"the hub was queried for {name}"))
    for named, meant in (("out/modle", "out/model"), ("./out/modle", "./out/model"), ("./uot", "./out")):
        with pytest.raises(CheckpointError, match=f"no checkpoint at '{named}'.* did you mean '{meant}'"):
            local_copy(named)
    with pytest.raises(CheckpointError, match="the folder does not exist$"):
        local_copy("out/something-else-entirely")


def test_too_little_memory_is_said_before_loading(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the size in the dtype that is loaded, not that of the files."""
    weights = load_file(copied / "model.safetensors")
    save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    size = sum(v.numel() for v in weights.values()) * 4
    for free, dtype in ((size - 1, torch.float32), (size // 2 - 1, torch.bfloat16)):
        monkeypatch.setattr("crem.model.pretrained.available_bytes", lambda free=free: free)
        with pytest.raises(ResourceError, match=f"in {dtype} .*more memory, or a smaller checkpoint"):
            crem.load(copied, dtype=dtype)
    monkeypatch.setattr("crem.model.pretrained.available_bytes", lambda: size)
    assert crem.load(copied, dtype=torch.float32).dim > 0


def test_scratch_needs_texts() -> None:
    with pytest.raises(ConfigError, match="texts"):
        build_model(tiny_config())


def test_checkpoint_at_a_uri(tiny_model_dir: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(tiny_model_dir, "/bucket/model", recursive=True)
    cache = tmp_path / "cache"
    first = local_copy("memory://bucket/model", cache=cache)
    assert local_copy("memory://bucket/model", cache=cache) == first, "downloaded once"
    here = crem.load(tiny_model_dir)
    there = crem.load(first)
    assert there.fingerprint == here.fingerprint and np.array_equal(there.embed(ITEMS), here.embed(ITEMS))
    description = memory.cat_file("/bucket/model/crem.json")
    memory.pipe_file("/bucket/model/crem.json", description.replace(b'"Represent."', b'"Find it again."'))
    changed = local_copy("memory://bucket/model", cache=cache)
    assert changed != first and b"Find it again." in (changed / "crem.json").read_bytes()
    assert folders(cache) == sorted([first.name, changed.name]), "nothing partial is left"
    assert crem.load(f"file://{tiny_model_dir}").fingerprint == here.fingerprint


def folders(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir() if entry.is_dir())


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A checkpoint at ``memory://store/model``; the names that were downloaded from there."""
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, name: str, to: str) -> None:
        names.append(name)
        time.sleep(0.02)  # long enough for others to arrive
        get_file(self, name, to)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    memory = fsspec.filesystem("memory")
    for name in ("config.json", "crem.json", "deep/c"):
        memory.pipe_file(f"/store/model/{name}", name.encode())
    yield names
    for name in [name for name in memory.store if name.startswith("/store/")]:
        del memory.store[name]


def test_one_of_several_that_ask_at_once_downloads(got: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: local_copy("memory://store/model", cache=tmp_path), range(4)))
    assert len(set(copies)) == 1 and folders(tmp_path) == [copies[0].name]
    assert sorted(got) == ["/store/model/config.json", "/store/model/crem.json", "/store/model/deep/c"]
    assert (copies[0] / "deep" / "c").read_bytes() == b"deep/c"


def test_a_download_that_fails_leaves_nothing(got: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(self: MemoryFileSystem, name: str, to: str) -> None:
        Path(to).write_bytes(b"half")
        raise ValueError("the connection was closed")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", torn)
        with pytest.raises(CheckpointError, match="downloading 'memory://store/model' failed: ValueError: the connect"):
            local_copy("memory://store/model", cache=tmp_path)
    assert folders(tmp_path) == []
    again = local_copy("memory://store/model", cache=tmp_path)
    assert (again / "config.json").read_bytes() == b"config.json" and (again / "deep" / "c").is_file()


@pytest.mark.parametrize("name", ["../../evil", "deep/../../../evil", "deep/.."])
def test_an_object_name_does_not_lead_outside_the_cache(got: list[str], tmp_path: Path, name: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.store[f"/store/model/{name}"] = MemoryFile(memory, f"/store/model/{name}", b"x")
    with pytest.raises(CheckpointError, match=r"has a '\.\.' in its name"):
        local_copy("memory://store/model", cache=tmp_path / "a" / "cache")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def pretrained(folder: Path, *, tied: bool, vocab_size: int, lora: bool) -> ModelConfig:
    source = stock_backbone(folder / "stock", tied=tied, vocab_size=vocab_size)
    adapters = {"r": 4, "alpha": 8, "dropout": 0.0} if lora else None
    image = {"min_pixels": 4096, "max_pixels": 4096}
    return ModelConfig(backbone=source, chorus_tokens=4, lora=adapters, dtype="float32", image=image)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_training_a_pretrained_backbone(tmp_path: Path, tied: bool, lora: bool) -> None:
    config = pretrained(tmp_path, tied=tied, vocab_size=512, lora=lora)
    run = run_config().model_copy(update={"model": config})
    model, collator = build_model(config)
    chorus_before = model.core.get_input_embeddings().weight.detach()[model.chorus_ids].clone()
    words = collator.prompts.question("a red apple").input_ids[:3].tolist()
    words_before = model.core.get_input_embeddings().weight.detach()[words].clone()
    engine = PlainEngine(model.train(), run)
    for step in range(3):
        train_step(engine, share(collator, "mixed", step, 0, 1), run.loss)
    model.eval()
    trained = Crem(model, collator, "").embed(ITEMS)
    answers = Crem(model, collator, "").generate_compressed(ITEMS, "what?", max_new_tokens=5)
    save_model(model, collator, tmp_path / "crem")
    assert np.array_equal(Crem(model, collator, "").embed(ITEMS), trained), "saving leaves the model as it is"

    plain, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "crem", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name for name, _ in plain.named_modules())
    rows = plain.get_input_embeddings().weight
    assert (rows[model.chorus_ids] - chorus_before).abs().amax(1).min() > 1e-3, "every chorus row is trained"
    assert torch.equal(rows[words], words_before) == lora, "the other rows only by full fine-tuning"
    assert (plain.lm_head.weight is rows) == tied
    loaded = crem.load(tmp_path / "crem")
    np.testing.assert_allclose(loaded.embed(ITEMS), trained, atol=1e-5)
    assert loaded.generate_compressed(ITEMS, "what?", max_new_tokens=5) == answers
    assert loaded.config.lora is None


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_adapters_answer_as_they_did_in_training(tmp_path: Path, tied: bool) -> None:
    """transformers' plain class on the exported checkpoint against the adapted model: logits over the chorus tokens,
    whose rows are trained beside the adapters, and over words."""
    model, collator = build_model(pretrained(tmp_path, tied=tied, vocab_size=512, lora=True))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # adapters start as nothing (B = 0)
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    save_model(model, collator, tmp_path / "crem")
    plain = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "crem").eval()
    ids = torch.tensor([[*collator.prompts.tokenizer("a red apple").input_ids, *model.chorus_ids, 5, 6]])
    with torch.no_grad():
        adapted, merged = model.core(input_ids=ids).logits, plain(input_ids=ids).logits
        model.backbone.disable_adapter_layers()
        before = model.core(input_ids=ids).logits
    assert (adapted - before).abs().max() > 0.1, "the adapters do something"
    assert (merged - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert torch.equal(plain.lm_head.weight, plain.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("vocab_size", [512, 300], ids=["reserved rows", "grown"])
def test_the_seed_decides_every_new_weight(tmp_path: Path, vocab_size: int) -> None:
    """Ranks seed torch differently for dropout, and must yet start from the same adapters."""
    config = pretrained(tmp_path, tied=False, vocab_size=vocab_size, lora=True)
    built = []
    for drawn_before, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(drawn_before)
        built.append(build_model(config, seed=seed)[0].state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
    changed = [name for name in built[0] if not torch.equal(built[0][name], built[2][name])]
    assert any("lora_A" in name for name in changed) and any("trainable_tokens_delta" in name for name in changed)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("spare", [10, 4, 1, 0])
def test_reserved_rows_are_used_before_the_matrix_is_grown(tmp_path: Path, spare: int, tied: bool) -> None:
    used = len(AutoTokenizer.from_pretrained(stock_backbone(tmp_path / "probe")))
    config = pretrained(tmp_path, tied=tied, vocab_size=used + spare, lora=False)
    model, collator = build_model(config)
    assert model.chorus_ids == list(range(used, used + 4))
    rows = model.core.get_input_embeddings().weight
    assert rows.shape[0] == max(used + spare, used + 4)
    assert model.core.lm_head.weight.shape == rows.shape and model.core.config.text_config.vocab_size == len(rows)
    chosen = rows[model.chorus_ids]
    assert torch.cdist(chosen, chosen).fill_diagonal_(9).min() > 0.1, "K distinct rows"
    assert 0.3 < chosen.std() / rows[:used].std() < 3, "of the scale of the others"
    save_model(model, collator, tmp_path / "crem")
    assert crem.load(tmp_path / "crem").model.chorus_ids == model.chorus_ids


def reduced_qwen(folder: Path, *, vocab_size: int, tied: bool) -> str:
    """The values of Qwen2-VL-Instruct's own config.json at reduced width and depth; bf16 on disk, as published."""
    tokenizer = tokenizer_from_texts(TEXTS, 400)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 4,
            "mlp_ratio": 4,
            "hidden_size": 64,
            "patch_size": 14,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    model = Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    for part in (model, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("preset", "vocab_size", "tied"), [("2b", 151936, True), ("7b", 152064, False)])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_presets_build_and_take_a_joint_step(
    tmp_path: Path, preset: str, vocab_size: int, tied: bool, full: bool
) -> None:
    folder = reduced_qwen(tmp_path / "stock", vocab_size=vocab_size, tied=tied)
    overrides = [f"model.backbone={folder}", *(["model.lora=null"] if full else [])]
    small = ["train.global_batch=8", "train.chunk_rows=8", "train.workers=1"]
    config = load_config(preset, [*overrides, "optim.warmup_steps=1", *small])
    model, collator = build_model(config.model)
    assert len(model.chorus_ids) == 16 and model.core.config.text_config.vocab_size == vocab_size
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32} and frozen <= {torch.bfloat16} and bool(frozen) != full
    assert model.core.is_gradient_checkpointing
    engine = PlainEngine(model.train(), config)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bfloat16"):
        result = train_step(engine, share(collator, "mixed", 0, 0, 1), config.loss)
    assert result.answer_tokens > 0 and 0 < result.retrieval < 60 and 5 < result.generation < 20
    moving = {n for n, g in engine.gradients.items() if g.abs().max() > 0}
    assert any("visual" in n for n in moving) == full, "LoRA adapts the language model, as VLM2Vec-V2 does"
    assert any("embed_tokens" in n for n in moving) and any("q_proj" in n for n in moving)
    save_model(model.eval(), collator, tmp_path / "crem")
    loaded = crem.load(tmp_path / "crem")
    assert loaded.config.dtype == "bfloat16" and loaded.embed(["a red apple"]).shape == (1, 64)
