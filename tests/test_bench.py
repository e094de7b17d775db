"""`tools.bench`: the arithmetic of its report, its complaints, and one small real run."""

import json
import subprocess
import time

import jax
import numpy as np
import pytest

from resnet_flax.data.dataset import Split
from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.tools import bench, bench_limits, bench_report, bench_worker
from resnet_flax.training import feed

# 100 multiply-adds an image, 10 images: 6,000 operations a step. Half of the ceiling for 0.2 s.
MEASURED = {
    "multiply_adds": 100,
    "devices": 2,
    "chunk_steps": 5,
    "scanned": False,
    "program": {
        "operations": 2900.0,
        "bytes_accessed": 1500.0,
        "library_bytes": 0,
        "resident_bytes_counted": 500,
    },
    "step_seconds": [0.1, 0.4, 0.2],
    "eval_seconds": [2.0, 1.0],
    "eval_examples": 50,
    "ceilings": {"operations": 60_000.0, "bytes": 40_000.0},
}


def summarize(measured=None, **program):
    measured = MEASURED | (measured or {})
    return bench_report.summarize(measured | {"program": measured["program"] | program}, 10)


def test_the_arithmetic_of_a_row():
    found = summarize()
    assert found["step_seconds"] == {"median": 0.2, "min": 0.1, "max": 0.4}
    assert found["train_images_per_second"] == pytest.approx({"median": 50, "min": 25, "max": 100})
    assert found["eval_images_per_second"] == pytest.approx({"median": 37.5, "min": 25, "max": 50})
    assert found["step_operations"] == 6000
    assert found["step_operations_xla"] == 5800
    assert found["step_bytes"] == 2000
    # 0.1 s at the first ceiling and 0.05 s at the second, of 0.2 s.
    assert found["matmul_share"] == pytest.approx(0.5)
    assert found["bandwidth_share"] == pytest.approx(0.25)
    assert found["limit_seconds"] == pytest.approx(0.1)
    assert found["above_limit"] == pytest.approx(2)


def test_what_xla_does_not_know():
    # Each of the 5 turns of the loop counted.
    turns = summarize(operations=5 * 2900.0, bytes_accessed=5 * 1500.0)
    assert (turns["step_operations_xla"], turns["step_bytes"]) == (5800, 2000)
    # Convolutions that it does not know: with the bytes of cuDNN's calls; without any, unknown.
    assert summarize(operations=-3.0, library_bytes=4000)["step_bytes"] == 2 * (1000 + 4000)
    for found in (
        summarize(operations=-3.0),
        summarize(operations=None, bytes_accessed=None),
        summarize({"scanned": True}),
    ):
        assert found["step_bytes"] is None
        assert found["bandwidth_share"] is None
        assert found["limit_seconds"] == pytest.approx(0.1)


def test_bytes_in_a_programs_text():
    text = """
%region (p: (u8[10,4,4,3], bf16[8,16])) -> bf16[8,16] {
  %images = u8[10,4,4,3]{3,2,1,0} get-tuple-element(%p), index=0
  %index = s32[2]{0} get-tuple-element(%p), index=1
  %x = bf16[2,16]{1,0} fusion(%images, %index), kind=kLoop, calls=%fused_gather
  %w = bf16[3,3,16,16]{3,2,1,0} parameter(1)
  %conv = (bf16[2,16]{1,0}, u8[99]{0}) custom-call(%x, %w), custom_call_target="__cudnn$convForward"
  %other = f32[5]{0} custom-call(%x), custom_call_target="SomethingElse"
  ROOT %y = bf16[2,16]{1,0} fusion(%x), kind=kLoop, calls=%fused_add
}
"""
    library, fusions = bench_limits.traffic(text, resident_bytes=480)
    assert library == 2 * (2 * 16 + 9 * 16 * 16 + 2 * 16)
    assert fusions == 1
    assert bench_limits.traffic("", resident_bytes=0) == (0, 0)


def test_a_program_of_known_cost_is_counted_so():
    def pick(images, index):
        return images[index].astype("float32") * 2

    images, index = (jax.ShapeDtypeStruct(s, d) for s, d in (((99, 8), "u1"), ((4,), "i4")))
    small = jax.ShapeDtypeStruct((4, 8), "u1")
    seen = [
        bench_limits.program(jax.jit(pick).lower(x, index).compile(), x.size)
        for x in (images, small)
    ]
    moved = [s["bytes_accessed"] - s["resident_bytes_counted"] for s in seen]
    assert seen[0]["resident_bytes_counted"] in (0, 99 * 8)
    assert moved[0] - moved[1] <= 4 * 8
    assert seen[0]["argument_bytes"] == 99 * 8 + 4 * 4
    assert seen[0]["output_bytes"] == 4 * 8 * 4


def test_tables_have_dashes_where_nothing_was_measured():
    measured = MEASURED | {
        "dtype": "float32",
        "program": {},
        "train_memory": {"bytes": 3e6, "of": "device"},
    }
    row = {"case": {"model": "resnet8", "batch_size": 10}, "measured": measured, "summary": {}}
    lines = bench_report.table([row], bench_report.COST).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["resnet8", "10", "float32", "2", "5", *"-------", "3", "device"]
    assert {len(line) for line in lines} == {len(lines[0])}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models=resnet21"], "unknown model 'resnet21'"),
        (["--batch_sizes=128,x"], "--batch_sizes=128,x must be whole numbers"),
        (["--batch_sizes=0"], "0 is less than 1"),
        (["--dtypes=float16"], "'float16' must be one of auto, float32, bfloat16"),
        (["--parts=training"], "'training' must be one of train, eval"),
        (["--batch_sizes=16,20", "--devices=1,8"], "8 devices do not divide a batch of 20"),
        (["--repeats=0"], "--repeats=0 is less than 1"),
        (["--seconds=0"], "--seconds=0 and"),
        (["--examples=100"], "--examples=100 is less than a batch of 128"),
        (["--set=model.remat"], "must be KEY=VALUE"),
        (["--set=model.rematt=True"], "'model.remat'?"),
        (["--out=/nowhere/at/all/x.json"], "there is no directory /nowhere/at/all"),
        (["--model=resnet20"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(flags, message):
    with pytest.raises(UserError) as error:
        bench.main(flags)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_configurations_are_those_of_runs():
    config = bench_worker.make_config(bench_worker.Case("resnet50", 64, devices=2))
    assert (config.data.color, config.data.pad, config.model.dtype) == (True, 0, "auto")
    case = bench_worker.Case("resnet8", 16, dtype="bfloat16", overrides={"model.remat": "True"})
    config = bench_worker.make_config(case)
    assert (config.data.pad, config.data.flip, config.model.remat) == (4, True, True)
    with pytest.raises(UserError, match="learning_rate"):
        bench_worker.make_config(
            bench_worker.Case("resnet8", 16, overrides={"optim.learning_rate": "-1"})
        )
    with pytest.raises(UserError, match="jax already runs with 8 devices"):
        bench_worker.make_experiment(bench_worker.Case("resnet8", 18, devices=9, examples=18))


def test_images_from_the_hosts_memory():
    mesh = sharding.make_mesh(jax.devices()[:2], 4)
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    examples = bench_worker.HostFeed(Split(images, np.arange(5, dtype=np.int32)), {}, mesh, 4)
    batch = examples.chunk(1, 1)
    assert batch["labels"].tolist() == [[4, 0, 1, 2]]
    np.testing.assert_array_equal(batch["images"][0, :, 0, 0, 0], [4, 0, 1, 2])
    assert [b["labels"][0].tolist() for b in examples.batches(4)] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    with pytest.raises(ValueError, match="2 steps a dispatch"):
        examples.chunk(0, 2)
    assert feed.chunk_steps(examples, 0, "gpu") == 1
    assert feed.chunk_steps(examples, 7, "cpu") == 7


@pytest.mark.slow
def test_a_small_real_run(tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = "--models=resnet8 --batch_sizes=16 --dtypes=float32 --devices=2 --repeats=2 --steps=2"
    flags = [*flags.split(), "--seconds=0.05", "--examples=64", "--eval_examples=40"]
    flags.append("--parts=train,eval,ceilings")
    bench.main([*flags, f"--out={out}"])
    printed = capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    measured, summary = row["measured"], row["summary"]
    assert measured["multiply_adds"] == 12_239_488
    assert (measured["devices"], measured["chunk_steps"], measured["steps"]) == (2, 1, 2)
    assert len(measured["step_seconds"]) == len(measured["eval_seconds"]) == 2
    assert np.isfinite(measured["loss"])
    assert measured["eval_examples"] == 40
    # All but the gradient towards the images, and some that are no convolution's.
    assert summary["step_operations_xla"] == pytest.approx(summary["step_operations"], rel=0.15)
    shares = summary["matmul_share"], summary["bandwidth_share"]
    assert min(shares) > 0
    assert max(shares) * summary["above_limit"] == pytest.approx(1)
    assert measured["train_memory"]["bytes"] > measured["program"]["temp_bytes"] > 0
    assert "resnet8" in printed
    assert "TFLOP/s" in printed
    # What is there is not measured again, what is asked for besides is; failures are told.
    before = out.read_text()
    bench.main([*flags, f"--out={out}"])
    assert json.loads(out.read_text())["rows"] == json.loads(before)["rows"]
    with pytest.raises(UserError, match="1 of 1 combinations"):
        bench.main([*flags, "--set=optim.learning_rate=-1", "--json"])
    (failed,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert "optim.learning_rate=-1" in failed["error"]


def test_a_worker_finds_no_programs_in_the_users_cache(monkeypatch):
    environments = []

    def run(command, *, env, **options):
        environments.append(env)
        return subprocess.CompletedProcess(command, 0, stdout='{"train_seconds": [1.0]}', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("RESNET_FLAX_CACHE", "/somewhere")
    bench.run_worker({})
    bench.run_worker({}, cache="/elsewhere")
    assert [env["RESNET_FLAX_CACHE"] for env in environments] == ["", ""]
    assert "JAX_COMPILATION_CACHE_DIR" not in environments[0]
    assert environments[1]["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_first_step_is_measured_with_an_empty_cache_and_a_full_one(monkeypatch):
    caches = []

    def run_worker(case, *, timeout, cache):
        caches.append((cache, case["parts"]))
        return {"first_chunk": 1.0}

    monkeypatch.setattr(bench, "run_worker", run_worker)
    row = bench.run_case({"model": "resnet8", "parts": ["first_step"]})
    assert row["first_step"] == {"cold": {"first_chunk": 1.0}, "cached": {"first_chunk": 1.0}}
    assert caches[0] == caches[1]
    assert caches[0][1] == ["first_step"]
    case = bench_worker.Case(
        "resnet8", 16, "float32", 2, examples=64, eval_examples=1, started=time.time()
    )
    moments = bench_worker.first_step(case)
    assert 0 < moments["imported"] < moments["data"] < moments["compiled"] < moments["first_chunk"]
    assert moments["trace"] + moments["compile"] <= moments["compiled"] - moments["data"]
