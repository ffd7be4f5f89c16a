"""Job submission against a real cluster of two nodes.

Clients run in processes of their own: Ray reads its token once per process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.local import LocalCluster, free_ports
from cluster.submit import SubmitError, job_server_url, submit
from tests.cluster.conftest import members_of

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]

CLIENT = """
import json, logging, sys
from cluster.submit import SubmitError, submit
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
try:
    sys.exit(submit(**json.loads(sys.argv[1])))
except SubmitError as error:
    sys.exit(f"SubmitError: {error}")
"""


def client(**arguments: object) -> list[str]:
    return [sys.executable, "-c", CLIENT, json.dumps(arguments)]


def test_output_is_streamed_and_the_exit_code_is_the_jobs(local_cluster: LocalCluster) -> None:
    argv = ["python", "-c", "import sys; print('a b', sys.argv[1:]); sys.exit(3)", "it's", "$HOME"]
    # The address given wins over the environment's, which Ray itself would prefer.
    elsewhere = {"RAY_ADDRESS": "http://127.0.0.1:1"}
    done = local_cluster.run(client(argv=argv, address=local_cluster.job_server), cwd=ROOT, env=elsewhere)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("""a b ["it's", '$HOME']""") == 1, "arguments arrive unchanged by the shell, once"
    assert "ERROR job raysubmit_" in done.stderr


def test_the_folder_is_uploaded_and_runs_on_the_clusters_ray(local_cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import ray; ray.init(log_to_driver=False); print('cpus', ray.cluster_resources()['CPU'])"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "big.bin").write_bytes(b"0")
    argv = ["sh", "-c", "ls; python job.py"]
    done = local_cluster.run(
        client(argv=argv, address=local_cluster.job_server, working_dir=str(tmp_path)), cwd=tmp_path.parent,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cpus 4.0" in done.stdout, "both nodes of the cluster are seen"
    assert "job.py" in done.stdout.split()
    assert "out" not in done.stdout.split(), "outputs are not uploaded"


def test_without_following_it_returns_at_once(local_cluster: LocalCluster, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    argv = ["sh", "-c", f"sleep 1; touch {flag}"]
    done = local_cluster.run(client(argv=argv, address=local_cluster.job_server, follow=False), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "ray job stop --address" in done.stderr
    deadline = time.monotonic() + 60
    while not flag.exists():
        assert time.monotonic() < deadline, "the job never ran"
        time.sleep(0.2)


def test_interrupting_the_client_leaves_the_job_and_says_how_to_stop_it(
    local_cluster: LocalCluster, tmp_path: Path
) -> None:
    flag = tmp_path / "ended"
    argv = ["sh", "-c", f"echo started; sleep 3; touch {flag}"]
    with subprocess.Popen(
        client(argv=argv, address=local_cluster.job_server), cwd=ROOT, env=local_cluster.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell has it ignored
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while process.stdout.readline() != "started\n":
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "ray job stop --address" in stderr
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 30
    while not flag.exists():
        assert time.monotonic() < deadline, "the job died with its client"
        time.sleep(0.2)


def test_a_wrong_token_is_refused_in_words(local_cluster: LocalCluster) -> None:
    done = local_cluster.run(
        client(argv=["true"], address=local_cluster.job_server), cwd=ROOT,
        env={"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 32},
    )  # fmt: skip
    assert done.returncode == 1
    assert "it refuses the token" in done.stderr
    assert "Authentication failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_dead_node_is_noticed_and_replaced(local_cluster: LocalCluster) -> None:
    extra = local_cluster.add_node({"spare": 1.0})
    assert local_cluster.alive_nodes() == 3
    local_cluster.kill_node(extra)
    deadline = time.monotonic() + 60
    while local_cluster.alive_nodes() != 2:
        assert time.monotonic() < deadline, "the head still counts the killed node"
        time.sleep(0.5)


def test_the_crem_command_submits_a_job(local_cluster: LocalCluster) -> None:
    command = [sys.executable, "-m", "crem.cli", "submit", "--address", local_cluster.job_server, "--", "doctor"]
    done = local_cluster.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert version("ray") in done.stdout, "what the doctor printed on the cluster came back"


def test_the_crem_command_says_what_is_wrong_with_an_address() -> None:
    command = [sys.executable, "-m", "crem.cli", "submit", "--address", "ray://head:10001", "--", "doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode > 0
    assert "is not the address of a job server" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_where_nothing_listens_names_it_and_the_remedy() -> None:
    port = free_ports(1)[0]
    with pytest.raises(SubmitError, match=rf"no job server answers at http://127.0.0.1:{port}.*port-forward"):
        submit(["true"], address=f"127.0.0.1:{port}")


def test_credentials_are_not_sent() -> None:
    with pytest.raises(SubmitError, match=r"AWS_SECRET_ACCESS_KEY would be readable.*secretRef"):
        submit(["true"], runtime_env={"env_vars": {"AWS_SECRET_ACCESS_KEY": "x"}})
    with pytest.raises(SubmitError, match="URI with a password"):
        submit(["crem", "embed", "s3://key:secret@bucket/items"])


def test_bad_requests_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(SubmitError, match="no command"):
        submit([])
    with pytest.raises(SubmitError, match="is not a folder"):
        submit(["true"], working_dir=tmp_path / "absent")


@pytest.mark.parametrize(
    ("address", "environ", "url"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "127.0.0.1:6379"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://head:8265/"}, "http://head:8265"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "https://b:2"}, "https://b:2"),
        ("head:1234", {"RAY_ADDRESS": "http://other:8265"}, "http://head:1234"),
        ("https://ray.example.org", {}, "https://ray.example.org"),
    ],
)
def test_which_job_server_is_meant(address: str | None, environ: dict[str, str], url: str) -> None:
    assert job_server_url(address, environ) == url


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "http://", "head:many"])
def test_other_kinds_of_address_are_refused(address: str) -> None:
    with pytest.raises(SubmitError, match="is not the address of a job server"):
        job_server_url(address, {})


@pytest.mark.slow
def test_stopping_a_cluster_ends_its_processes_and_nothing_else(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        cluster = LocalCluster(nodes=1, cpus_per_node=1)
        (session,) = cluster.sessions()
        assert members_of({session})
        cluster.stop()
        assert bystander.poll() is None
        assert members_of({session}) == []
        cluster.stop()
    finally:
        bystander.kill()
        bystander.wait()
