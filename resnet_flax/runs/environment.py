"""What a result was obtained with: command, commit, versions, hardware."""

import importlib.metadata
import os
import pathlib
import platform
import re
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
        described = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        described = ""
    found = re.search(r"^model name\s*: (.+)$", described, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The package's git commit, with "+" if files differ from it; None outside a checkout."""
    git = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    options = {
        "cwd": pathlib.Path(__file__).parent,
        "stderr": subprocess.DEVNULL,
        "text": True,
        "timeout": 10,
    }
    try:
        # Not the repository around a site-packages.
        subprocess.check_output(["git", "ls-files", "--error-unmatch", __file__], **options)
        return subprocess.check_output(git, **options).strip()
    except (OSError, subprocess.SubprocessError):
        return None
