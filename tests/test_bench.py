"""`tools.bench`: small real runs, what it refuses, real compilations."""

import importlib.util
import json
import subprocess

import numpy as np
import pytest

from resnet_flax.devices import hardware
from resnet_flax.errors import UserError
from resnet_flax.tools import bench, bench_compile, bench_measure

SMALL = "--dtypes=float32 --repeats=2 --seconds=0.01".split()


@pytest.mark.slow
def test_a_small_real_run(tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = [*SMALL, "--models=resnet8", "--batch_sizes=16", "--devices=2", "--examples=64"]
    bench.main([*flags, f"--out={out}"])
    printed = capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    found = row["measured"]
    assert (found["devices"], found["chunk_steps"], found["dtype"]) == (2, 1, "float32")
    assert found["step_operations"] == 6 * 12_239_488 * 16
    for key in ("step_seconds", "train_images_per_second", "eval_images_per_second"):
        assert len(found[key]) == 2
        assert min(found[key]) > 0
    needed = found["step_operations"] / found["matmul_operations_per_second"]
    assert found["matmul_share"] * np.median(found["step_seconds"]) == pytest.approx(needed)
    assert np.isfinite(found["loss"])
    assert found["peak_bytes"] > found["temporary_bytes"] > 0
    head, cells, about = printed.splitlines()
    assert head.split() == bench._MEASURED
    assert cells.split()[:4] == ["resnet8", "16", "float32", "2"]
    assert about.startswith(found["environment"]["hardware"])
    # What is there is not measured again.
    bench.main([*flags, f"--out={out}"])
    assert json.loads(out.read_text())["rows"] == [row]


def test_images_of_imagenets_size_are_streamed():
    case = bench_measure.Case("resnet18", 4, "float32", 2, examples=5)
    (run,) = bench_measure.make_setups(case)
    batch = run.train_feed.chunk(0, 1)
    assert (batch["images"].shape, batch["images"].dtype) == ((1, 4, 224, 224, 3), np.uint8)
    for image, label in zip(batch["images"][0], batch["labels"][0], strict=True):
        (i,) = np.flatnonzero(run.dataset.train.source.labels == label)
        np.testing.assert_array_equal(image, run.dataset.train.source.images[i])
    rows = [b["labels"][0].tolist() for b in run.eval_feeds["test"].batches(4)]
    assert rows[1][1:] == [-1] * 3
    run.close()
    assert run.config.data.color
    assert run.config.data.pad == 0


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--models=resnet21", "unknown model 'resnet21'"),
        ("--batch_sizes=128,x", "--batch_sizes: invalid whole_numbers value: '128,x'"),
        ("--batch_sizes=-1", "config.data.batch_size=-1"),
        ("--dtypes=float16", "'float16' must be one of auto, float32, bfloat16"),
        ("--parts=training", "'training' must be one of train, eval"),
        ("--repeats=0", "--repeats=0 and --seconds=2 must be above 0"),
        ("--set=model.remat", "config.model.remat= must be true or false"),
        ("--set=model.rematt=True", "is no config key (did you mean --config.model.remat?)"),
        ("--set=optim.learning_rate=-1", "config.optim.learning_rate=-1"),
        ("--out=/nowhere/at/all/x.json", "there is no directory /nowhere/at/all"),
        ("--model=resnet20", "unrecognized arguments"),
        ("--compile_for=h200", "invalid choice: 'h200'"),
        ("--compile_for=h100", "XLA's compiler for GPUs: pip install '.[offline-gpu]'"),
        ("--compile_for=v6e", "XLA's compiler for TPUs: pip install '.[offline-tpu]'"),
    ],
)
def test_wrong_arguments(flag, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        bench.main([flag])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="jax already runs with 8 devices"):
        bench_measure.make_setups(bench_measure.Case("resnet8", 18, devices=9, examples=18))


@pytest.fixture
def workers(monkeypatch):
    """Commands and environments of worker processes, which fail for resnet50."""
    calls = []

    def run(command, *, env, **options):
        calls.append((command, env))
        if "resnet50" in command[3]:
            return subprocess.CompletedProcess(command, 1, "", "warning\nerror: out of memory\n")
        return subprocess.CompletedProcess(command, 0, 'a line\n{"launches": 1234}\n', "")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("RESNET_FLAX_CACHE", "/somewhere")
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    return calls


def test_what_fails_is_told_and_the_rest_is_printed(workers, capsys):
    flags = ["--compile_for=h100", "--models=resnet8,resnet50"]
    with pytest.raises(UserError, match="1 of 2 combinations"):
        bench.main([*flags, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"command", "rows"}
    good, failed = content["rows"]
    assert list(good) == bench.COMPILED
    assert list(failed) == [*bench.COMPILED, "error"]
    assert (failed["model"], failed["devices"], failed["error"]) == ("resnet50", 1, "out of memory")
    # The batch sizes of the recipes.
    assert [json.loads(command[3])["batch_size"] for command, _ in workers] == [128, 256]
    with pytest.raises(UserError, match="1 of 2 combinations"):
        bench.main(flags)
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split() == bench.COMPILED
    assert first.split() == "resnet8 h100 1 1,234 - - - - - - -".split()
    assert second.split() == "resnet50 h100 1 - - - - - - - -".split()
    assert last == "resnet50: out of memory"
    with pytest.raises(UserError, match="--out is for measurements"):
        bench.main([*flags, "--out=x.json"])


def test_a_worker_finds_no_compiled_programs(workers):
    for target in (None, "h100", "v5e"):
        bench.run_case({"model": "resnet8", "devices": 1}, target)
    measured, gpu, tpu = [environment for _, environment in workers]
    assert {env["RESNET_FLAX_CACHE"] for _, env in workers} == {""}
    assert gpu["JAX_ENABLE_COMPILATION_CACHE"] == tpu["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert measured["XLA_FLAGS"] == tpu["XLA_FLAGS"] == "--xla_one=1"
    assert gpu["XLA_FLAGS"].startswith("--xla_one=1 --xla_dump_to=/")


def test_compiler_options_are_the_platforms_own(monkeypatch):
    assert list(hardware.compiler_options("gpu")) == ["xla_gpu_enable_command_buffer"]
    assert list(hardware.compiler_options("cpu")) == ["xla_cpu_experimental_ynn_fusion_type"]
    assert hardware.compiler_options("tpu") is None
    # An option that this XLA does not know.
    monkeypatch.setitem(hardware._COMPILER_OPTIONS, "gpu", {"xla_gpu_of_another_version": "1"})
    assert hardware.compiler_options("gpu") is None


def compiled(target, capsys, *flags):
    """The row of a real compilation."""
    platform = bench_compile.TARGETS[target]
    if not any(map(importlib.util.find_spec, bench._COMPILERS[platform])):
        pytest.skip(f"no compiler for {target}: pip install '.[offline-{platform}]'")
    bench.main([f"--compile_for={target}", "--json", *flags])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row) == bench.COMPILED
    # The images are among the arguments.
    assert row["argument_bytes"] > 50_000 * 32 * 32 * 3
    assert row["temporary_bytes"] > 0
    return row


def test_a_gpus_step_is_one_graph(capsys):
    row = compiled("h100", capsys)
    # Of 19 convolutions: forwards, backwards towards weights and all activations but the images.
    assert 19 + 19 + 18 < row["launches"] <= 240
    assert (row["host_submissions"], row["all_reduces"]) == (1, 0)
    assert row["cycles_per_step"] is row["cycles_per_chunk"] is None
    own = compiled("h100", capsys, "--set=model.kernels=always")
    assert own["launches"] <= 150
    assert own["host_submissions"] == 1


def test_seeds_are_branches_of_one_graph(capsys):
    rows = [compiled("h100", capsys, "--models=resnet8", *flags)
            for flags in ((), ("--set=train.num_seeds=2",))]  # fmt: skip
    assert rows[0]["launches"] < rows[1]["launches"] <= 2 * rows[0]["launches"] + 5
    assert rows[1]["host_submissions"] == 1


def test_several_gpus_and_nets_whose_blocks_are_a_loop(capsys):
    row = compiled("h100", capsys, "--devices=2", "--set=model.scan=always")
    # A mean and a variance for each of 19 layers, and the gradients.
    assert row["all_reduces"] > 2 * 19
    assert row["launches"] > row["host_submissions"] >= row["all_reduces"]


def test_a_tpus_cycles(capsys):
    row = compiled("v5e", capsys, "--models=resnet8")
    step, chunk = row["cycles_per_step"], row["cycles_per_chunk"]
    assert 0 <= chunk - 100 * step < 5 * step
    assert step > 10_000
    assert row["launches"] is row["host_submissions"] is None
    with pytest.raises(UserError, match="1 of 1"):
        bench.main(["--compile_for=v5e", "--devices=2"])
    assert "--devices=2: of v5e there can be 1, 4, 8," in capsys.readouterr().out
