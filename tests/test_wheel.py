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
    build = "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={here}", "."
    run(sys.executable, "-m", "pip", "-q", "--no-input", *build, cwd=here / "source")
    (wheel,) = here.glob("*.whl")
    venv.create(here / "venv", with_pip=False, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(here / "venv")})
    shutil.unpack_archive(wheel, packages, "zip")  # All that pip does with one without scripts.
    # A line of a .pth file brings the packages, but not the editable installation among them.
    (pathlib.Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return here / "venv/bin/python"


def test_the_quickstart_trains_by_the_config_that_comes_with_it(installed, tmp_path):
    few = harness.FLAGS[1:]  # Of the fault tests, whose programs have been compiled.
    command = installed, "-m", "resnet_flax.main", "--config=configs/quickstart.py"
    out = run(*command, *few, "--config.train.cpu_devices=2", cwd=tmp_path)
    assert "resnet8 on digits" in out
    assert (tmp_path / "runs/quickstart/seed0/result.json").exists()


def test_published_nets_load(installed, tmp_path):
    code = (
        "import resnet_flax as r; print(r.__file__, r.load_pretrained('resnet20').class_names[0])"
    )
    place, name = run(installed, "-c", code, cwd=tmp_path).split()
    assert name == "airplane"
    assert not place.startswith(str(ROOT))


def test_experiments_find_their_configs(installed, tmp_path):
    command = installed, "-m", "resnet_flax.tools.reproduce", "plain", "--seeds=1", "--dry_run"
    assert "plain56" in run(*command, f"--workdir={tmp_path}/paper", cwd=tmp_path)


def test_commands_say_their_version(installed, tmp_path):
    out = run(installed, "-m", "resnet_flax.main", "--version", cwd=tmp_path)
    name, version = out.split()
    assert name == "resnet_flax"
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert "python -m resnet_flax.tools.predict" in run(
        installed, "-m", "resnet_flax", cwd=tmp_path
    )


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for p in (ROOT / "resnet_flax").rglob("*.py")}
    found = {".".join(p.relative_to(ROOT).parts) for p in folders} | {"resnet_flax.configs"}
    assert set(settings["packages"]) == found
