"""``crem doctor``: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import uuid
from dataclasses import dataclass, field

from crem.errors import ConfigError

__all__ = ["Report", "examine", "refuse_ray_client"]

_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "pyarrow",
    "fsspec",
    "s3fs",
    "pylance",
    "lancedb",
    "pillow",
)
_MIN_MEMORY_GIB = 4
_MIN_DISK_GIB = 5


@dataclass
class Report:
    """Lines to print and problems found."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Nothing is missing."""
        return not self.problems

    @property
    def text(self) -> str:
        """The report as it is printed."""
        verdict = ["no problems found"] if self.healthy else [f"PROBLEM  {p}" for p in self.problems]
        return "\n".join([*self.lines, "", *verdict])

    def add(self, name: str, value: str) -> None:
        """One line of the report."""
        self.lines.append(f"{name:<14} {value}")


def examine(storage: list[str] | tuple[str, ...] = ()) -> Report:
    """Examine this machine; ``storage`` names paths or URIs that must be readable and writable."""
    report = Report()
    report.add("python", f"{platform.python_version()}  {platform.platform()}")
    _packages(report)
    _devices(report)
    _memory(report)
    _ray(report)
    for place in storage:
        _storage(report, place)
    return report


def _packages(report: Report) -> None:
    for name in _PACKAGES:
        try:
            report.add(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            report.add(name, "missing")
            report.problems.append(f"{name} is not installed; run: pip install -c constraints.txt -e .")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        report.problems.append("no C++ compiler: train.compile needs one on CPU; run: apt-get install g++")


def _devices(report: Report) -> None:
    try:
        import torch
    except ImportError:
        return
    count = torch.cuda.device_count()
    report.add("cpus", f"{os.cpu_count()} ({torch.get_num_threads()} torch threads)")
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        report.add(f"gpu {i}", f"{name}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free")
    if not count:
        report.add("gpu", "none (presets 2b and 7b train on GPUs; micro runs on CPU)")
        if shutil.which("nvidia-smi"):
            report.problems.append("a GPU driver is installed, but torch sees no device; install a CUDA build of torch")


def _memory(report: Report) -> None:
    import psutil

    from crem.host_memory import available_bytes

    free, total = available_bytes() / 2**30, psutil.virtual_memory().total / 2**30
    disk = shutil.disk_usage(os.getcwd()).free / 2**30
    report.add("memory", f"{free:.1f} of {total:.1f} GiB free")
    report.add("disk here", f"{disk:.1f} GiB free")
    if free < _MIN_MEMORY_GIB:
        report.problems.append(
            f"{free:.1f} GiB of memory are free and crem demo needs {_MIN_MEMORY_GIB}; close other programs"
        )
    if disk < _MIN_DISK_GIB:
        report.problems.append(f"{disk:.1f} GiB of disk are free here and {_MIN_DISK_GIB} are needed; free some")


def _ray(report: Report) -> None:
    address = os.environ.get("RAY_ADDRESS")
    report.add("ray cluster", address or "none (RAY_ADDRESS is not set: jobs start Ray on this machine)")
    try:
        refuse_ray_client(address)
    except ConfigError as error:
        report.problems.append(str(error))


def refuse_ray_client(address: str | None) -> None:
    """Refuse a Ray Client address: jobs and server need a driver on a node, with its object store and files.

    Raises:
        ConfigError: ``address`` begins with ``ray://``.
    """
    if (address or "").startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address!r} is a Ray Client address, and crem's jobs do not run through one. From outside "
            "the cluster submit the job: crem submit --address http://HEAD:8265 -- JOB …; on one of its nodes set "
            "RAY_ADDRESS=HEAD:6379 (the address that ray start --head prints), or auto"
        )


def _storage(report: Report, place: str) -> None:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, path = fsspec.core.url_to_fs(place)
        probe = f"{path.rstrip('/')}/.crem-doctor-{uuid.uuid4().hex}"
        if isinstance(fs, LocalFileSystem):  # an object store has no folders: this would create the bucket
            fs.makedirs(path, exist_ok=True)
        fs.pipe_file(probe, b"crem")
        assert fs.cat_file(probe) == b"crem", "the data read differs from the data written"
        fs.rm_file(probe)
        report.add("storage", f"{place} readable and writable")
    except Exception as error:
        report.add("storage", f"{place} FAILED")
        report.problems.append(
            f"{place} cannot be used: {type(error).__name__}: {error}. For s3:// set AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_REGION and, for S3 storage other than AWS, AWS_ENDPOINT_URL"
        )
