"""tests/benchmarks: what `side_by_side` and `growth` make of timings; small real turns."""

import functools
import json
import math
from concurrent import futures

import jax
import numpy as np
import pytest

from tests.benchmarks import flax_step, growth, pytorch_step, side_by_side

BATCH, PARAMETERS = 4, 75_290  # Of resnet8.
FLAX, OURS = "usual Flax float32", "this package float32"


def test_ratios_are_paired_and_of_one_dtype():
    found = {
        FLAX: {"seconds": [0.2, 0.4, 0.9]},
        OURS: {"seconds": [0.1, 0.1, 0.3]},
        "PyTorch bfloat16 compiled": {"seconds": [0.05, 0.05, 0.05]},
    }
    assert side_by_side.ratios(found, FLAX, OURS) == pytest.approx([2, 4, 3])
    assert side_by_side.ratios(found, "usual Flax bfloat16", OURS) is None
    result = {"batch": BATCH, "variants": found, "not_run": {"PyTorch float32": "why"}}
    _, flax, ours, compiled, last = side_by_side.table(result).splitlines()
    assert "1 (1 to 1)" in flax
    assert "3 (2 to 4)" in flax
    assert ours.split() == "this package float32 100 (100 to 300) 40 3 (2 to 4) 1 (1 to 1)".split()
    # There is nothing of its own dtype.
    assert compiled.split()[-2:] == ["-", "-"]
    assert last == "not run: PyTorch float32: why"


def test_the_net_in_pytorch_is_the_same_and_learns(monkeypatch):
    pytest.importorskip("torch").set_num_threads(1)  # Tests share the cores.
    monkeypatch.setattr(pytorch_step, "BATCHES", 1)
    run, parameters, _ = pytorch_step.make(8, BATCH, "bfloat16", ("channels-last",), "cpu")
    assert parameters == PARAMETERS
    first = run(1)
    assert 0 < run(9) < first


def test_the_usual_net_in_flax_is_the_same():
    net, images = flax_step.make_net(8, np.float32), np.zeros((BATCH, 32, 32, 3))
    init = functools.partial(net.init, train=False)
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS


def test_variants_take_turns_and_those_that_cannot_are_named(tmp_path, capsys, monkeypatch):
    turns, out = [], tmp_path / "turns.json"
    torch, graph = "PyTorch float32", "PyTorch float32 whole-step graph"

    def build(name, args):
        if name == torch:
            raise RuntimeError("sees no GPU")
        return lambda steps: 0.5, PARAMETERS, {}, 1

    def take_turn(name, steps):
        turns.append(name)
        return 0.1, 0.5

    monkeypatch.setattr(futures, "ProcessPoolExecutor", lambda n, _: futures.ThreadPoolExecutor(n))
    monkeypatch.setattr(side_by_side, "load", lambda *_: None)
    monkeypatch.setattr(side_by_side, "build", build)
    monkeypatch.setattr(side_by_side, "take_turn", take_turn)
    variants = f"{OURS},{FLAX},{torch},*float32 whole*"
    side_by_side.main([f"--variants={variants}", "--rounds=3", "--seconds=1e-9", f"--out={out}"])
    assert turns == [FLAX, OURS, OURS, FLAX, FLAX, OURS]
    result = json.loads(out.read_text())
    row = {"steps": 1, "parameters": PARAMETERS, "about": {}, "seconds": [0.1] * 3, "loss": 0.5}
    assert result["variants"] == {FLAX: row, OURS: row}
    not_run = {torch: "RuntimeError: sees no GPU", graph: "exists on gpu only"}
    assert result["not_run"] == not_run
    printed = capsys.readouterr().out
    for name, reason in not_run.items():
        assert f"not run: {name}: {reason}" in printed


@pytest.mark.slow
def test_variants_in_processes_of_their_own(tmp_path):
    out = tmp_path / "turns.json"
    names = [FLAX, "this package float32 on one device"]
    flags = "--model=resnet8 --batch=16 --rounds=2 --seconds=1e-9".split()
    side_by_side.main([*flags, f"--variants={','.join(names)}", f"--out={out}"])
    result = json.loads(out.read_text())
    assert list(result["variants"]) == names
    for row in result["variants"].values():
        assert (row["parameters"], row["steps"], len(row["seconds"])) == (PARAMETERS, 1, 2)
        assert min(row["seconds"]) > 0
        assert math.isfinite(row["loss"])


@pytest.mark.parametrize("wrong", ["--model=resnet21", "--variants=none*", "--rounds=0"])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit):
        side_by_side.main([wrong])
    assert wrong.split("=")[0] in capsys.readouterr().err


def growth_row(seconds):
    measured = {"step_seconds": [seconds, seconds, 2 * seconds], "compile_seconds": 4 * seconds}
    measured |= {"train_images_per_second": [10 / seconds], "temporary_bytes": 5_000_000}
    return {"measured": measured}


def test_a_table_of_growth():
    assert growth.power([1, 2, 8], [3, 6, 12]) == [None, pytest.approx(1), pytest.approx(0.5)]
    rows = [growth_row(0.1), {"error": "out of memory"}, growth_row(0.4)]
    head, first, second, failed = growth.table("depth", [20, 44, 80], rows).splitlines()
    assert head.split()[0] == "depth"
    assert first.split() == "20 100 (100 to 200) - 100 (100 to 100) 0.4 - 5".split()
    assert second.split() == "80 400 (400 to 800) 1 25 (25 to 25) 1.6 1 5".split()
    assert failed == "failed: depth 44: out of memory"


def test_a_start_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(growth.sys, "executable", "/bin/false")
    assert growth.measure_start([], 1) == {"error": "status 1: "}


def test_growth_is_measured_once(tmp_path, capsys, monkeypatch):
    calls = []

    def run_case(case, target):
        calls.append(case["model"])
        return {"case": case, **growth_row(0.1)}

    monkeypatch.setattr(growth.bench, "run_case", run_case)
    monkeypatch.setattr(growth, "measure_start", lambda *args: {"cold": [1.0], "cached": [0.5]})
    out = tmp_path / "growth.json"
    flags = ["--depths=resnet8,resnet20", "--batches=8,16", "--devices=1", "--seeds=1,2"]
    flags.append(f"--out={out}")
    for _ in range(2):
        growth.main(flags)
    # ResNet-20 with a batch of 16 is in two tables.
    assert calls == ["resnet8"] + ["resnet20"] * 5
    content = json.loads(out.read_text())
    assert len(content["rows"]) == 6
    assert content["rows"][-1]["case"]["overrides"] == {"train.num_seeds": "2"}
    assert content["start"] == {"configs/quickstart.py": {"cold": [1.0], "cached": [0.5]}}
    printed = capsys.readouterr().out
    # As long a step for two nets as for one.
    assert "nets an hour, 2 seeds together: 2.00 times as many" in printed
    with pytest.raises(SystemExit):
        growth.main(["--parts=width", f"--out={out}"])
