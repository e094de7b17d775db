"""tests/benchmarks: what `side_by_side` and `growth` make of timings; small real turns."""

import json
import math

import pytest

from tests.benchmarks import growth, pytorch_step, side_by_side

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


def test_the_net_in_pytorch_is_the_same_and_learns():
    pytest.importorskip("torch").set_num_threads(1)  # Tests share the cores.
    run, parameters, _ = pytorch_step.make(8, BATCH, "bfloat16", ("channels-last",), "cpu")
    assert parameters == PARAMETERS
    first = run(pytorch_step.BATCHES)
    # The same eight batches, again and again.
    assert 0 < run(4 * pytorch_step.BATCHES) < first


def test_variants_take_turns_and_those_that_cannot_are_named(tmp_path, capsys):
    out, graph = tmp_path / "turns.json", "PyTorch float32 whole-step graph"
    names = [FLAX, "this package float32 on one device"]
    flags = "--model=resnet8 --batch=16 --rounds=2 --seconds=1e-9".split()
    side_by_side.main([*flags, f"--variants={','.join(names)},*float32 whole*", f"--out={out}"])
    result = json.loads(out.read_text())
    assert list(result["variants"]) == names
    for row in result["variants"].values():
        assert row["parameters"] == PARAMETERS
        assert row["steps"] == 1
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert math.isfinite(row["loss"])
    assert result["not_run"] == {graph: "exists on gpu only"}
    assert f"not run: {graph}: exists on gpu only" in capsys.readouterr().out
    # No GPU is here, and perhaps no PyTorch.
    side_by_side.main([*flags, "--platform=gpu", "--variants=PyTorch float32", f"--out={out}"])
    result = json.loads(out.read_text())
    assert result["variants"] == {}
    reason = result["not_run"]["PyTorch float32"]
    assert reason.startswith("ModuleNotFoundError") or reason.endswith("sees no GPU")


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
