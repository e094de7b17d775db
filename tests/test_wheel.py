"""The wheel, installed without the checkout: its configurations, published nets and commands."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest

from tests.conftest import ROOT

TEXT = {"capture_output": True, "text": True}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The Python of an environment with the wheel, and with this environment's other packages."""
    here = tmp_path_factory.mktemp("wheel")
    # From a copy of what git knows: a build leaves files, and packs up what lies about.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, **TEXT
    ).stdout
    for name in filter(lambda f: (ROOT / f).is_file(), files.splitlines()):
        (here / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q", "--no-input"]
    options = ["--no-deps", "--no-build-isolation", f"--wheel-dir={here}"]
    subprocess.run([*pip, "wheel", *options, str(here / "source")], check=True, **TEXT)
    (wheel,) = here.glob("*.whl")
    venv.create(here / "venv", with_pip=False, symlinks=True)
    python = here / "venv/bin/python"
    subprocess.run(
        [*pip, f"--python={python}", "install", "--no-deps", str(wheel)], check=True, **TEXT
    )
    packages = sysconfig.get_path("purelib", vars={"base": str(here / "venv")})
    # A line of a .pth file brings the packages, but not the editable installation among them.
    (pathlib.Path(packages) / "others.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(python, cwd, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, **TEXT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_quickstart_trains_by_the_config_that_comes_with_it(installed, tmp_path):
    out = run(
        *(installed, tmp_path, "-m", "resnet_flax.main", "--config=configs/quickstart.py"),
        *(
            "--config.model.name=resnet8",
            "--config.train.total_steps=2",
            "--config.train.cpu_devices=1",
        ),
    )
    assert "resnet8 on digits" in out
    assert (tmp_path / "runs/quickstart/seed0/result.json").exists()


def test_published_nets_load(installed, tmp_path):
    code = (
        "import resnet_flax as r; print(r.__file__, r.load_pretrained('resnet20').class_names[0])"
    )
    place, name = run(installed, tmp_path, "-c", code).split()
    assert name == "airplane"
    assert not place.startswith(str(ROOT))


def test_commands_say_their_version(installed, tmp_path):
    out = run(installed, tmp_path, "-m", "resnet_flax.main", "--version")
    name, version = out.split()
    assert name == "resnet_flax"
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text()
    assert "python -m resnet_flax.tools.predict" in run(installed, tmp_path, "-m", "resnet_flax")


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent for p in (ROOT / "resnet_flax").rglob("*.py")}
    found = {".".join(p.relative_to(ROOT).parts) for p in folders} | {"resnet_flax.configs"}
    assert set(settings["packages"]) == found
