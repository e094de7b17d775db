"""What a result was obtained with: command, commit, versions, hardware."""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

from jax.sharding import Mesh

from resnet_flax.devices import distributed

_PACKAGES = "resnet-flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"


def describe(mesh: Mesh) -> dict[str, Any]:
    """Command, commit, versions and hardware of this process; call it when it begins."""
    return {
        "command": shlex.join([pathlib.Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "hardware": hardware(mesh),
        "processes": distributed.count(),
    }


def hardware(mesh: Mesh) -> str:
    """For example "1 x NVIDIA H200 (gpu)" or "Intel Xeon, 2 cores as 2 device(s) (cpu)"."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return f"{_cpu_name()}, {os.cpu_count()} cores as {mesh.size} device(s) (cpu)"
    return f"{mesh.size} x {device.device_kind} ({device.platform})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The package's git commit, with "+" if files differ from it; None outside a checkout."""

    def git(*args):
        return subprocess.run(
            ["git", *args],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # Not the repository around a site-packages.
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/")
        return git("rev-parse", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
