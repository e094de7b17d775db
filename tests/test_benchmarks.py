"""tests/benchmarks: what `side_by_side` and `growth` make of timings; small real turns."""

import json
import math

import pytest

from tests.benchmarks import growth, pytorch_step, side_by_side

MODEL, BATCH, PARAMETERS = "resnet8", 4, 75_290
FLAX, OURS = "usual Flax float32", "this package float32"


def test_ratios_are_paired_and_of_one_dtype():
    found = {
        FLAX: {"seconds": [0.2, 0.4, 0.9]},
        OURS: {"seconds": [0.1, 0.1, 0.3]},
        "PyTorch bfloat16 compiled": {"seconds": [0.05, 0.05, 0.05]},
    }
    assert side_by_side.ratios(found, FLAX, OURS) == pytest.approx([2, 3, 4])
    assert side_by_side.ratios(found, "usual Flax bfloat16", OURS) is None
    text = side_by_side.table({"variants": found, "not_run": {"PyTorch float32": "why"}}, BATCH)
    _, flax, ours, compiled, last = text.splitlines()
    assert "1.00 (1.00 to 1.00)" in flax
    assert "3.00 (2.00 to 4.00)" in flax
    assert ours.split()[:6] == ["this", "package", "float32", "100", "100", "40"]
    # There is nothing of its own dtype.
    assert compiled.split()[-2:] == ["-", "-"]
    assert last == "not run: PyTorch float32: why"


def test_the_net_in_pytorch_is_the_same_and_learns():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # Tests share the cores.
    try:
        run, parameters, _ = pytorch_step.make(8, BATCH, "bfloat16", ("channels-last",), "cpu")
        assert parameters == PARAMETERS
        first = run(pytorch_step.BATCHES)
        # The same eight batches, again and again.
        assert 0 < run(4 * pytorch_step.BATCHES) < first
    finally:
        torch.set_num_threads(threads)


def test_variants_take_turns_and_those_that_cannot_are_named(tmp_path, capsys):
    out = tmp_path / "turns.json"
    patterns = f"{FLAX},this package float32 on one device,*float32 CUDA graphs"
    flags = f"--model={MODEL} --batch=16 --rounds=2 --steps=1".split()
    side_by_side.main([*flags, f"--variants={patterns}", f"--out={out}"])
    result = json.loads(out.read_text())
    assert set(result["variants"]) == set(patterns.split(",")[:2])
    for row in result["variants"].values():
        assert row["parameters"] == PARAMETERS
        assert row["steps"] == row["unit"] == 1
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        assert math.isfinite(row["loss"])
    assert result["not_run"] == {"PyTorch float32 CUDA graphs": "exists on gpu only"}
    printed = capsys.readouterr().out
    assert "not run: PyTorch float32 CUDA graphs: exists on gpu only" in printed


def test_without_a_gpu_nothing_runs_there_and_all_is_told():
    found = side_by_side.measure(
        ["PyTorch float32", "this package float32 on one device"],
        model=MODEL,
        batch=16,
        platform="gpu",
        rounds=1,
        seconds=0.1,
        steps=1,
        timeout=300,
    )
    assert found["variants"] == {}
    reason = found["not_run"]["PyTorch float32"]
    assert reason == "PyTorch is not installed" or reason.endswith("sees no GPU")
    assert found["not_run"]["this package float32 on one device"] == "exists on cpu only"


@pytest.mark.parametrize("wrong", ["--model=resnet21", "--variants=none*", "--rounds=0"])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit):
        side_by_side.main([wrong])
    assert wrong.split("=")[0] in capsys.readouterr().err


def test_powers():
    assert growth.power([1, 2, 8], [3, 6, 12]) == [None, pytest.approx(1), pytest.approx(0.5)]


def growth_row(seconds):
    return {
        "case": {"batch_size": 10},
        "summary": {"step_seconds": {"median": seconds, "min": seconds, "max": 2 * seconds}},
        "measured": {
            "trace_seconds": 1.0,
            "compile_seconds": 4 * seconds,
            "program": {"temp_bytes": 5e6},
            "scanned": False,
        },
    }


def test_a_table_of_growth():
    rows = [growth_row(0.1), {"error": "out of memory"}, growth_row(0.4)]
    head, first, second, failed = growth.table("depth", [20, 44, 80], rows).splitlines()
    assert head.split()[0] == "depth"
    assert first.split() == "20 100 (100 to 200) - 100 1.0 0.4 - 5 no".split()
    assert second.split() == "80 400 (400 to 800) 1.00 25 1.0 1.6 1.00 5 no".split()
    assert failed == "failed: depth 44: out of memory"


def test_a_start_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(growth.sys, "executable", "/bin/false")
    found = growth.measure_start([], 1, timeout=60)
    assert found["error"].startswith("status 1 after 0 s")
    assert growth.describe_start(found).startswith("start failed: status 1")
    runs = [{"first_record": s, "end": 9.0} for s in (3.0, 1.0, 2.0)]
    assert growth.describe_start({"cold": runs}) == (
        "start, cold: first record after 2.0 s (1.0 to 3.0), 3 run(s)"
    )


def test_growth_is_measured_once(tmp_path, capsys, monkeypatch):
    calls = []

    def run_case(case, *, timeout):
        calls.append(case["model"])
        return {"case": case, **{k: v for k, v in growth_row(0.1).items() if k != "case"}}

    monkeypatch.setattr(growth.bench, "run_case", run_case)
    monkeypatch.setattr(growth, "measure_start", lambda *args: {"cold": [{"first_record": 1.0}]})
    out = tmp_path / "growth.json"
    flags = ["--depths=resnet8,resnet20", "--batches=8,16", "--devices=1", "--seeds=1,2"]
    flags.append(f"--out={out}")
    for _ in range(2):
        growth.main(flags)
    # ResNet-20 with a batch of 16 is in two tables.
    assert calls == ["resnet8"] + ["resnet20"] * 5
    content = json.loads(out.read_text())
    assert len(content["rows"]) == 6
    assert content["rows"][1]["case"]["overrides"] == {"train.num_seeds": "2"}
    assert content["start"] == {"configs/quickstart.py": {"cold": [{"first_record": 1.0}]}}
    printed = capsys.readouterr().out
    assert "start, cold: first record after 1.0 s" in printed
    # As long a step for two nets as for one.
    assert "nets an hour, 2 seeds together: 2.00 times as many" in printed
    with pytest.raises(SystemExit):
        growth.main(["--parts=width", f"--out={out}"])
