"""The wheel, installed without the checkout: its configurations, published nets and commands."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest

from tests.conftest import ROOT
from tests.faults import harness

# Without PYTHONPATH, by which the checkout could be found.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

QUICKSTART = "--config=configs/quickstart.py"


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment with the wheel, and with this environment's other packages."""
    here = tmp_path_factory.mktemp("wheel")
    # From a copy: a build leaves files.
    for name in ("resnet_flax", "configs"):
        shutil.copytree(ROOT / name, here / "source" / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here / "source" / name)
    pip = sys.executable, "-m", "pip", "-q", "--no-input", "--disable-pip-version-check"
    build = "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={here}", "."
    run(*pip, *build, cwd=here / "source")
    (wheel,) = here.glob("*.whl")
    venv.create(here / "venv", with_pip=False, symlinks=True)
    run(*pip, f"--python={here}/venv/bin/python", "install", "--no-deps", wheel, cwd=here)
    packages = sysconfig.get_path("purelib", vars={"base": str(here / "venv")})
    # A line of a .pth file brings the packages, but not the editable installation among them.
    (pathlib.Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return here / "venv/bin/python"


MODULES = """
import importlib, pkgutil, resnet_flax
for module in pkgutil.walk_packages(resnet_flax.__path__, "resnet_flax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(resnet_flax.__file__, resnet_flax.load_pretrained("resnet20").class_names[0])
"""


def test_every_module_and_the_published_nets_load(installed, tmp_path):
    place, name = run(installed, "-c", MODULES, cwd=tmp_path).split()
    assert name == "airplane"
    assert not place.startswith(str(ROOT))


def test_commands_find_their_configs_and_say_their_version(installed, tmp_path):
    main = installed, "-m", "resnet_flax.main"
    name, version = run(*main, QUICKSTART, "--version", cwd=tmp_path).split()
    assert name == "resnet_flax"
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert "resnet_flax.tools.predict" in run(installed, "-m", "resnet_flax", cwd=tmp_path)
    command = installed, "-m", "resnet_flax.tools.reproduce", "plain", "--seeds=1", "--dry_run"
    assert "plain56" in run(*command, f"--workdir={tmp_path}/paper", cwd=tmp_path)


def test_the_quickstart_trains(installed, tmp_path):
    out = run(installed, "-m", "resnet_flax.main", QUICKSTART, *harness.FLAGS[1:], cwd=tmp_path)
    assert "resnet8 on digits" in out
    assert (tmp_path / "runs/quickstart/seed0/result.json").exists()


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for p in (ROOT / "resnet_flax").rglob("*.py")}
    found = {".".join(p.relative_to(ROOT).parts) for p in folders} | {"resnet_flax.configs"}
    assert set(settings["packages"]) == found
