"""Checkpoints of the training state: read on another number of ranks, for every ZeRO stage; damage is found.

Bound: the run continues as one that never stopped, within 2e-5 of the weights of one process (they move by 1e-2) and
2e-5 of its losses: the sums over ranks are taken in another order, as in ``test_zero``.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from crem.checkpoint import save_model
from crem.config import RunConfig
from crem.errors import CheckpointError
from crem.train.state import convert, files_needed, load_state, manifest_if_complete, read_manifests, save_state, verify
from crem.train.step import train_step
from tests.crem.train.runs import PlainEngine, run_config, share, spawn, started, stock_backbone
from tests.crem.train.test_zero import LORA

pytestmark = pytest.mark.slow
DECAY = "optim.weight_decay=0.1"
RUNS = {
    "zero 0": ["train.zero_stage=0", DECAY],
    "zero 1": ["train.zero_stage=1", DECAY],
    "zero 2": ["train.zero_stage=2", DECAY],
    "zero 3": ["train.zero_stage=3", DECAY],
    "lora zero 2": ["train.zero_stage=2", DECAY, *LORA],
    "lora zero 3": ["train.zero_stage=3", DECAY, *LORA],
}
RANKS = (2, 4, 1, 2)
"""Ranks of the legs of the run; each leg continues where the one before stopped."""
LEG_STEPS = 2
CASES = ("mixed", "no images", "no answers", "uneven pairs")


def configured(overrides: list[str], backbone: str) -> RunConfig:
    return run_config(*[o.replace("BACKBONE", backbone) for o in overrides])


def leg(number: int, folder: Path, backbone: str, leg: int) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    from crem.train.export import export
    from crem.train.optim import initialise

    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ranks = dist.get_world_size()
    for name, overrides in RUNS.items():
        config = configured(overrides, backbone)
        model, collator = started(config)
        engine = initialise(model, config, torch.device("cpu"))
        start = leg * LEG_STEPS
        if leg:
            checkpoint = folder / f"{name} {start}"
            if number == 0:
                convert(checkpoint, ranks)
            dist.barrier()
            assert load_state(engine, checkpoint, run="r") == start
        losses = []
        for step in range(start, start + LEG_STEPS):
            chunks = share(collator, CASES[step % 4], step, number, ranks)
            losses.append(train_step(engine, chunks, config.loss).loss)
        own = folder / f"own {name} {number}"
        save_state(engine, own, step=start + LEG_STEPS, run="r")
        shutil.copytree(own, folder / f"{name} {start + LEG_STEPS}", dirs_exist_ok=True)
        shutil.rmtree(own)
        export(engine, collator, folder / f"{name} model {leg}")
        if number == 0:
            (folder / f"{name} losses {leg}.json").write_text(json.dumps(losses))
        dist.barrier()
        engine.destroy()


@pytest.fixture(scope="module")
def legs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("legs")
    backbone = stock_backbone(folder / "backbone")
    for number, ranks in enumerate(RANKS):
        (folder / "rendezvous").unlink(missing_ok=True)
        spawn(leg, ranks, folder, backbone, number)
    return folder


def uninterrupted(folder: Path, name: str, out: Path) -> tuple[list[float], dict[str, Tensor], list[dict[str, Tensor]]]:
    """Losses of one process that runs all steps, its first weights, and those after each leg."""
    config = configured(RUNS[name], str(folder / "backbone"))
    model, collator = started(config)
    save_model(model, collator, out / "before")
    engine, losses, after = PlainEngine(model, config), [], []
    for step in range(LEG_STEPS * len(RANKS)):
        losses.append(train_step(engine, share(collator, CASES[step % 4], step, 0, 1), config.loss).loss)
        if (step + 1) % LEG_STEPS == 0:
            save_model(model, collator, out / str(step))
            after.append(load_file(out / str(step) / "model.safetensors"))
    return losses, load_file(out / "before" / "model.safetensors"), after


@pytest.mark.parametrize("name", RUNS)
def test_a_run_continues_with_another_number_of_ranks(legs: Path, tmp_path: Path, name: str) -> None:
    expected, before, weights = uninterrupted(legs, name, tmp_path)
    losses = [
        x for number in range(len(RANKS)) for x in json.loads((legs / f"{name} losses {number}.json").read_text())
    ]
    for number, wanted in enumerate(weights):
        got = load_file(legs / f"{name} model {number}" / "model.safetensors")
        assert max(float((wanted[key] - before[key]).abs().max()) for key in wanted) > 3e-3
        for key in wanted:
            difference = float((got[key] - wanted[key]).abs().max())
            assert difference < 2e-5, (number, key, difference)
    assert losses == pytest.approx(expected, rel=2e-5)


def test_nothing_is_compiled(legs: Path) -> None:
    """A process killed while it compiles would leave a lock that every later one waits for."""
    assert not (legs / "extensions").exists()


@pytest.fixture(scope="module")
def saved(legs: Path) -> Path:
    return legs / f"zero 3 {LEG_STEPS}"


def test_a_rank_needs_its_own_files_or_all(saved: Path) -> None:
    manifests = read_manifests(saved)
    every = {path for manifest in manifests for path in manifest.files}
    assert len(every) >= 4
    own = [set(files_needed(manifests, number, 2)) for number in (0, 1)]
    assert own[0] | own[1] == every and own[0] != every and own[1] != every
    assert set(files_needed(manifests, 0, 4)) == every


@pytest.mark.parametrize("harm", ["flipped", "short", "missing", "no manifest"])
def test_damage_is_found_and_named(saved: Path, tmp_path: Path, harm: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    assert verify(folder).step == LEG_STEPS
    file = max((folder / "state").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif harm == "short":
        file.write_bytes(data[:-1])
    elif harm == "missing":
        file.unlink()
    else:
        (folder / "rank-1.json").unlink()
        assert manifest_if_complete(read_manifests(folder)) is None
    with pytest.raises(CheckpointError, match="complete" if harm == "no manifest" else file.name):
        verify(folder)
