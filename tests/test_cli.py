"""The command line as a user meets it: real processes and hostile input; kills: see `faults`."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import commands
from tests.conftest import ROOT
from tests.faults import harness

SMALL = [*harness.FLAGS, "--config.train.cpu_devices=2"]


def run(*args):
    return commands.run("resnet_flax.main", *args)


@pytest.fixture(scope="module")
def uninterrupted(undisturbed):
    """A finished run that nobody may change, and how its process ended."""
    return undisturbed().directory, undisturbed().outcome


def test_a_run_says_what_was_learned_and_what_to_run_next(uninterrupted):
    directory, done = uninterrupted
    assert "resnet8 on digits:" in done.out
    assert "% test error" in done.out
    assert "--config=configs/cifar10_short.py" in done.out
    assert "step 40/40" in done.err
    assert "images/s" in done.err
    assert "left" in done.err
    result = json.loads((directory / "result.json").read_text())
    assert f"{100 * result['test_error_last']:.2f} %" in done.out
    (start,) = json.loads((directory / "run.json").read_text())["starts"]
    assert "-m resnet_flax.main --config=configs/quickstart.py" in start["command"]
    # A relative one works too.
    assert start["command"].endswith(f" --workdir={os.path.relpath(directory, ROOT)}")


def test_a_finished_run_gives_its_result_as_json_too(uninterrupted):
    directory = uninterrupted[0]
    done = run(*SMALL, f"--workdir={directory}", "--json")
    assert json.loads(done.stdout) == json.loads((directory / "result.json").read_text())
    assert run("--version").stdout.startswith("resnet_flax ")


def test_evaluate_mode_gives_the_same_numbers(uninterrupted, tmp_path):
    directory = tmp_path / "run"  # Evaluation writes in it.
    shutil.copytree(uninterrupted[0], directory)
    result = json.loads((directory / "result.json").read_text())
    done = run("--mode=evaluate", f"--workdir={directory}", "--json")
    found = json.loads(done.stdout)
    assert found["test"]["confusion"] == result["test_confusion_last"]
    assert found == json.loads((directory / "evaluation.json").read_text())
    assert (directory / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    # With changes of the run's own configuration, none of which may make it another.
    weights = f"--weights={directory}/weights.safetensors"
    done = run("--mode=evaluate", weights, "--config.eval.batch_size=77")
    assert done.returncode == 0, done.stderr
    assert f"({result['test_wrong_last']} of {result['test_examples']} wrong)" in done.stdout
    assert done.stdout.count("%") == 11  # the whole and ten classes
    done = run("--mode=evaluate", weights, "--config.eval.batch_size=many")
    assert "--config.eval.batch_size=many must be a whole number" in done.stderr
    done = run("--mode=evaluate", f"--workdir={directory}", "--config.model.shortcut=B")
    assert "belongs to a run of another config" in done.stderr


QUICK = "--config=configs/quickstart.py"
BAD_INPUT = {
    "no config": ([], "no configuration given; try --config=configs/quickstart.py"),
    "config file absent": (["--config=configs/absent.py"], "configs/absent.py"),
    "config file no text": (["--config=results/cifar10_short/curves.png"], "not a text file"),
    "config file broken": (["--config={tmp}/broken.py"], "SyntaxError"),
    "config is a dict": (["--config={tmp}/dict.py"], "returns a dict, must be a ConfigDict"),
    "no such user": ([QUICK, "--workdir=~nosuchuser/x"], "~nosuchuser/x"),
    "workdir in a bucket": ([QUICK, "--workdir=gs://bucket/x"], "gs://bucket/x: runs and weights"),
    "misspelt key": (
        [QUICK, "--config.optim.lerning_rate=0.1"],
        "did you mean --config.optim.learning_rate?",
    ),
    "unknown flag": ([QUICK, "--workdirr=x"], "workdirr"),
    "unknown mode": ([QUICK, "--mode=test"], "--mode=test must be one of train, evaluate"),
    "stray argument": ([QUICK, "stray"], "unexpected argument 'stray'"),
    "unknown data": ([QUICK, "--config.data.name=cifar11"], "unknown data set 'cifar11'"),
    "devices": (
        [QUICK, "--config.data.batch_size=63", "--config.train.cpu_devices=2"],
        "batch_size=63 is not divisible by the 2 cpu devices",
    ),
    "archive": (
        [QUICK, "--config.data.name=cifar10", "--config.data.archive=README.md",
         "--config.data.data_dir={tmp}"],
        "README.md",
    ),
    "nothing to evaluate": (["--mode=evaluate"], "nothing to evaluate"),
    "changes of nothing": (["--config.data.pad=3"], "no configuration given"),
    "change without value": (
        ["--mode=evaluate", "--config.data.pad", "3"],
        "--config.data.pad=VALUE",
    ),
    "before --config": (["--config.train.total_steps=0", QUICK], "must be a positive duration"),
    "given twice": (
        ["--config.optim.boundaries_steps=5,6", QUICK, "--config.optim.boundaries_steps=5,3"],
        "boundaries_steps=(5, 3) must be in rising order",
    ),
    "no such run": (["--mode=evaluate", "--workdir={tmp}/absent"], "absent does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_error_and_leaves_nothing(name, tmp_path):
    args, message = BAD_INPUT[name]
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    (tmp_path / "dict.py").write_text("def get_config():\n    return {'seed': 1}\n")
    args = [a.replace("{tmp}", str(tmp_path)) for a in args]
    if not any(a.startswith("--workdir") or a.startswith("--mode=evaluate") for a in args):
        args.append(f"--workdir={tmp_path}/run")
    done = run(*args)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") or lines[-2].startswith("error: ")
    assert message in done.stderr
    assert len(lines) <= 3
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    for directory in ("/proc/run", file):  # Even root may not write there.
        done = run(*SMALL, f"--workdir={directory}")
        assert done.returncode == 1
        assert done.stderr.startswith("error: cannot write in workdir")
    assert file.read_text() == "precious"


@pytest.mark.parametrize(
    "command",
    [
        ("main", *SMALL),
        ("tools.predict", "--weights=resnet20", str(ROOT / "results/report/fig6.png")),
    ],
)
def test_hardware_that_is_not_there_is_named_in_a_line(command, tmp_path):
    name, *flags = command
    flags += [f"--workdir={tmp_path}/run"] if name == "main" else []
    done = subprocess.run(
        [sys.executable, "-m", f"resnet_flax.{name}", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: JAX_PLATFORMS=nonsense: jax finds no such devices here")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
