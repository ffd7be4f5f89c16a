"""Shell completion: the script that bash evaluates, and the candidates that it asks for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crem.cli import main


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "candidates"),
    [
        (["tr"], {"train"}),
        (["train", "--r"], {"--resume"}),
        (["train", "x", "--preset", "mi"], {"micro", "micro-base"}),
        (["train", "x", "--preset", "2b+f"], {"2b+full"}),
        (["train", "x", "optim.l"], {"optim.lr="}),
        (["train", "model.image.min"], {"model.image.min_pixels="}),
        (["train", "x", "train.offload="], {"train.offload=none", "train.offload=optimizer", "train.offload=all"}),
        (["train", ""], set()),
    ],
)
def test_bash_completes_jobs_options_presets_and_settings(
    words: list[str], candidates: set[str], tmp_path: Path
) -> None:
    command = tmp_path / "crem"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m crem.cli "$@"\n')
    command.chmod(0o755)
    code = (
        f"""eval "$(crem completion bash)"; COMP_WORDS=(crem "$@"); COMP_CWORD={len(words)}; """
        """_crem_words 2>/dev/null; printf '%s\\n' "${COMPREPLY[@]}" """
    )
    env = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code, "-", *words], capture_output=True, text=True, timeout=60, env=env)
    assert set(done.stdout.split()) == candidates, done.stderr


def test_completion_explains_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["__complete", "train", "x", "train.zero"]) == 0
    assert "train.zero_stage=3\tDeepSpeed ZeRO stage" in capsys.readouterr().out
    assert main(["completion", "zsh"]) == 0 and "#compdef crem" in capsys.readouterr().out
