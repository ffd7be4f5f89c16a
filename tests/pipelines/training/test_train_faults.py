"""Fault tolerance: workers, jobs, nodes and the S3 server are killed, files damaged, and the run stays the same.

Bounds. The same number of workers: every loss of every step to 1e-6 of the uninterrupted run's (fp32). Another number:
2e-5, because sums over ranks are taken in another order. The workers record their rows
themselves (``tests.pipelines.recorded``), which also makes steps and uploads slow enough to be hit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import crem
from cluster.local import LocalCluster
from crem.config import load_config
from crem.train.state import verify
from pipelines.corpus.prepare import prepare
from pipelines.tables.prepared import index_rows
from pipelines.tables.storage import Folder
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.held_out import split_rows
from pipelines.training.metrics_log import read_metrics
from tests.conftest import TINY
from tests.pipelines.shapes import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.slow]

STEPS = 12
RUN = [
    *TINY,
    "train.global_batch=16",
    "train.workers=2",
    f"train.steps={STEPS}",
    "train.checkpoint_every=4",
    "train.keep_checkpoints=3",
    "train.zero_stage=2",
    "train.log_every=1",
    "train.cpus_per_worker=0.5",
    "optim.warmup_steps=2",
    "optim.weight_decay=0.1",
    "data.retrieval_share=0.75",
    "data.augment=0",
]
TERMS = ("loss", "retrieval", "generation", "answer_tokens", "lr")
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    prepare(write_corpus(folder / "corpus"), str(folder / "prepared"), load_config("micro", RUN))
    return str(folder / "prepared")


class Job:
    """``crem train`` as a process of its own, with its Ray; a context manager that leaves nothing behind."""

    def __init__(
        self,
        prepared: str,
        out: str | Path,
        place: Path,
        *overrides: str,
        step_s: float = 0.0,
        upload_s: float = 0.0,
        resume: bool = False,
        env: dict[str, str] | None = None,
    ):
        self.out, self.log, self.record = Folder.at(out), place / "log", place / "rows"
        self.record.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.pipelines.recorded", "train", prepared, "--out", str(out)]
        command += ["--preset", "micro", *RUN, *overrides, *(["--resume"] if resume else [])]
        environment = env or {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"CREM_RECORD": str(self.record), "CREM_STEP_S": str(step_s), "CREM_UPLOAD_S": str(upload_s)}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=Path(__file__).parents[3]
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def metrics(self) -> dict[int, dict[str, float]]:
        return {entry["step"]: entry for entry in read_metrics(self.out)}

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._process.poll() is None and time.monotonic() < deadline, f"{what}: {self.output()[-3000:]}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: max(self.metrics(), default=0) >= step, f"step {step}")

    def done(self) -> int:
        return self._process.wait(timeout=TIMEOUT_S)

    def family(self) -> list[psutil.Process]:
        if self._process.poll() is not None:
            return []
        return psutil.Process(self._process.pid).children(recursive=True)

    def kill_worker(self) -> None:
        """SIGKILL to one of the training workers."""
        workers = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    workers.append(process)
        assert workers, "no training worker runs"
        workers[-1].kill()

    def kill(self) -> None:
        """SIGKILL to the driver, its Ray and the workers, without time to clean up."""
        for process in [psutil.Process(self._process.pid), *self.family()] if self._process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def starts(self) -> int:
        """How many worker processes made steps."""
        return len(list(self.record.iterdir()))

    def rows(self) -> dict[int, list[int]]:
        """The rows of each step, in order; the same for every start and every number of workers."""
        shares: dict[tuple[int, int], dict[int, set[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(set))
        for file in self.record.iterdir():
            for line in map(json.loads, file.read_text().splitlines()):
                shares[line["step"], line["ranks"]][line["rank"]].add(tuple(line["rows"]))
        found: dict[int, list[int]] = {}
        for (step, ranks), parts in sorted(shares.items()):
            assert all(len(part) == 1 for part in parts.values()), f"step {step} was made of different rows: {parts}"
            if len(parts) == ranks:
                whole = [row for rank in range(ranks) for row in next(iter(parts[rank]))]
                assert found.setdefault(step, whole) == whole, f"step {step} depends on the number of workers"
        return found


def finished(job: Job) -> Job:
    code = job.done()
    assert code == 0, job.output()[-4000:]
    return job


@pytest.fixture(scope="module")
def reference(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("reference")
    with Job(prepared, folder / "run", folder) as job:
        return finished(job)


def same(job: Job, reference: Job, *, bound: float = 1e-6) -> None:
    """The losses of all steps are those of the reference, and the rows too: each once in an epoch."""
    got, expected = job.metrics(), reference.metrics()
    assert sorted(got) == sorted(expected) == list(range(1, STEPS + 1))
    for step, wanted in expected.items():
        for name in TERMS:
            assert got[step][name] == pytest.approx(wanted[name], rel=bound, abs=bound), (step, name)
    rows, wanted_rows = job.rows(), reference.rows()
    assert all(wanted_rows[step] == of_step for step, of_step in rows.items())


def test_rows_come_once_in_an_epoch(prepared: str, reference: Job) -> None:
    """A step shuffles its rows, so an epoch that ends within one is seen at the step's end."""
    config = load_config("micro", RUN)
    training, _ = split_rows(index_rows(prepared, split_prefix="train"), config)
    rows, plan = reference.rows(), training.plan(config)
    assert sorted(rows) == list(range(STEPS))
    for pool in (plan.retrieval, plan.heterogeneous):
        drawn = np.zeros(len(pool), dtype=int)
        for step in range(STEPS):
            drawn += [rows[step].count(row) for row in pool]
            assert drawn.max() - drawn.min() <= 1, f"after step {step} a row came twice before another came once"
        assert drawn.min() >= 2


def test_a_killed_worker_is_replaced_and_the_run_is_the_same(prepared: str, reference: Job, tmp_path: Path) -> None:
    with Job(prepared, tmp_path / "run", tmp_path, step_s=0.3) as job:
        job.wait_for_step(6)
        before = job.metrics()
        job.kill_worker()
        finished(job)
    assert job.starts() == 4, "two workers, twice"
    assert "resuming at step 4 (2 workers)" in job.output()
    same(job, reference)
    for step, entry in before.items():
        assert entry["loss"] == pytest.approx(reference.metrics()[step]["loss"], rel=1e-6)
    assert [f.step for f in checkpoints(job).complete()] == [12, 8, 4]
    assert list(workspace_files()) == [], "nothing stays on local disk"


def checkpoints(job: Job) -> Checkpoints:
    return Checkpoints(job.out.child("checkpoints"))


def workspace_files() -> Iterator[Path]:
    for root in Path("/tmp").glob(f"crem-train-{os.getuid()}-*"):
        yield from (path for path in root.rglob("*") if path.is_file() and path.stat().st_mtime > time.time() - 60)


def rewound(reference: Job, place: Path, *, newest: int) -> Path:
    """A copy of the reference run as it was after its checkpoint of step ``newest``."""
    run = Path(shutil.copytree(reference.out.uri, place / "run"))
    (run / "done.json").unlink()
    shutil.rmtree(run / "model")
    for found in Checkpoints(Folder.at(run / "checkpoints")).complete():
        if found.step > newest:
            shutil.rmtree(run / "checkpoints" / found.name)
    return run


def test_a_damaged_newest_checkpoint_is_found_and_the_one_before_is_used(
    prepared: str, reference: Job, tmp_path: Path
) -> None:
    run = rewound(reference, tmp_path, newest=8)
    newest = next(f for f in Checkpoints(Folder.at(run / "checkpoints")).complete() if f.step == 8)
    file = run / "checkpoints" / newest.name / sorted(newest.manifests[1].files)[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with Job(prepared, run, tmp_path, resume=True) as job:
        finished(job)
    assert newest.name in job.output() and file.name in job.output() and "damaged" in job.output()
    assert min(job.rows()) == 4, "it continued from the checkpoint before"
    same(job, reference)
    assert crem.load(run / "model").fingerprint == crem.load(f"{reference.out.uri}/model").fingerprint


def test_an_error_of_ours_is_not_retried(prepared: str, tmp_path: Path) -> None:
    with Job(prepared, tmp_path / "run", tmp_path, "optim.lr=1e30", "train.max_failures=5") as job:
        assert job.done() == 1
    assert "lower optim.lr" in job.output() and job.starts() == 2


@pytest.mark.parametrize("stage", [1, 3])
def test_a_job_killed_again_and_again_is_the_same_run(prepared: str, tmp_path: Path, stage: int) -> None:
    """At random moments, one of them in the middle of an upload."""
    settings = [f"train.zero_stage={stage}", "train.checkpoint_every=2"]
    (tmp_path / "reference").mkdir()
    with Job(prepared, tmp_path / "reference" / "run", tmp_path / "reference", *settings) as undisturbed:
        finished(undisturbed)
    dice = random.Random(stage)
    with Job(prepared, tmp_path / "run", tmp_path, *settings, step_s=0.3, upload_s=0.5) as job:
        stored = checkpoints(job)
        job.wait_for(
            lambda: set(stored.folder.folders()) - {f.name for f in stored.complete()}, "an incomplete checkpoint"
        )
    for _ in range(2):
        goal = max(job.metrics(), default=0) + dice.randint(1, 3)
        with Job(prepared, tmp_path / "run", tmp_path, *settings, step_s=0.3, upload_s=0.3, resume=True) as job:
            job.wait_for_step(min(goal, STEPS - 1))
            time.sleep(dice.random())
    with Job(prepared, tmp_path / "run", tmp_path, *settings, resume=True) as job:
        finished(job)
    same(job, undisturbed)
    assert [f.step for f in stored.complete()] == [12, 10, 8]
    assert len(stored.folder.folders()) == 3, "incomplete ones are gone"


def test_another_number_of_workers(prepared: str, reference: Job, tmp_path: Path) -> None:
    """2 workers to step 8, 1 to step 10, 2 to the end."""
    run = rewound(reference, tmp_path, newest=8)
    with Job(prepared, run, tmp_path, "train.workers=1", "train.checkpoint_every=2", step_s=0.5, resume=True) as job:
        job.wait_for(lambda: checkpoints(job).complete()[0].step == 10, "a checkpoint of one worker")
    with Job(prepared, run, tmp_path, resume=True) as job:
        finished(job)
    ranks = {json.loads(line)["ranks"] for file in job.record.iterdir() for line in file.read_text().splitlines()}
    assert ranks == {1, 2}
    same(job, reference, bound=2e-5)


def test_an_elastic_run_loses_a_node_and_gets_one_back(
    prepared: str, reference: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 -> 1 -> 2 workers, by itself."""
    elastic = ["train.min_workers=1", "train.cpus_per_worker=2", "train.resize_every_s=3", "train.checkpoint_every=1"]
    gate = tmp_path / "gate"

    def open_to(step: int) -> None:
        (tmp_path / "next").write_text(str(step))
        (tmp_path / "next").replace(gate)

    def workers() -> int:
        """How many workers there are, by what the latest of them wrote first."""
        files = sorted(job.record.iterdir(), key=lambda file: file.stat().st_mtime)
        lines = files[-1].read_text().splitlines() if files else []  # none where a worker has just opened its file
        return int(json.loads(lines[0])["ranks"]) if lines else 0

    # Ray's workers get their node's environment
    monkeypatch.setenv("CREM_RECORD", str(tmp_path / "rows"))
    monkeypatch.setenv("CREM_GATE", str(gate))
    open_to(3)
    with (
        LocalCluster(2, cpus_per_node=3) as nodes,
        Job(prepared, tmp_path / "run", tmp_path, *elastic, env=nodes.env) as job,
    ):
        job.wait_for_step(3)
        assert workers() == 2
        nodes.kill_node(1)
        job.wait_for(lambda: workers() == 1, "one worker")
        open_to(6)
        job.wait_for_step(6)
        nodes.add_node()
        job.wait_for(lambda: workers() == 2, "two workers again")
        open_to(STEPS)
        finished(job)
    same(job, reference, bound=2e-5)


def test_the_s3_server_dies_during_an_upload(
    prepared: str, reference: Job, tmp_path: Path, s3_server: Any, s3_env: Any
) -> None:
    out = f"s3://{s3_server.bucket}/faults/run"
    with Job(prepared, out, tmp_path, step_s=1, upload_s=0.5) as job:
        stored = checkpoints(job)
        job.wait_for(lambda: stored.folder.folders(), "an upload begins")
        s3_server.kill()
        try:
            job.wait_for(lambda: "is not written" in job.output(), "the failed upload is reported")
        finally:
            s3_server.start()
        finished(job)
    same(job, reference)
    found = stored.complete()
    assert found[0].step == 12
    for number, checkpoint in enumerate(found):
        local = tmp_path / "fetched" / str(number)
        stored.fetch(checkpoint, [name for manifest in checkpoint.manifests for name in manifest.files], local)
        assert verify(local).step == checkpoint.step
    objects = stored.folder.fs.find(
        stored.folder.path()
    )  # the server itself may keep an empty folder of an upload it lost
    left = {file.removeprefix(stored.folder.path("")).split("/")[0] for file in objects}
    assert left == {f.name for f in found}, f"the incomplete one is gone: {objects} {job.output()[-2000:]}"
    assert crem.load(f"{out}/model").fingerprint == crem.load(f"{reference.out.uri}/model").fingerprint


def test_resume_from_s3_skips_an_incomplete_checkpoint(
    prepared: str, reference: Job, tmp_path: Path, s3_server: Any, s3_env: Any
) -> None:
    """The job and the server die together while a checkpoint is being written."""
    out = f"s3://{s3_server.bucket}/faults/both"
    with Job(prepared, out, tmp_path, step_s=0.5, upload_s=1) as job:
        stored = checkpoints(job)
        job.wait_for(lambda: any(f.startswith("step-00000008") for f in stored.folder.folders()), "the second upload")
        job.kill()
    s3_server.restart()
    assert [f.step for f in stored.complete()] == [4]
    with Job(prepared, out, tmp_path, resume=True) as job:
        finished(job)
    same(job, reference)
