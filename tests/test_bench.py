"""`tools.bench`: small real runs, what it refuses, and how it reads XLA's texts."""

import importlib.util
import json
import subprocess

import numpy as np
import pytest

from resnet_flax.devices import hardware
from resnet_flax.errors import UserError
from resnet_flax.tools import bench, bench_case, bench_compile, bench_program

SMALL = "--dtypes=float32 --repeats=2 --seconds=0.01 --eval_examples=5".split()


@pytest.mark.slow
def test_a_small_real_run(tmp_path, capsys):
    out = tmp_path / "bench.json"
    flags = [*SMALL, "--models=resnet8", "--batch_sizes=16", "--devices=2", "--examples=64"]
    bench.main([*flags, f"--out={out}"])
    printed = capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    found = row["measured"]
    assert (found["devices"], found["chunk_steps"], found["dtype"]) == (2, 1, "float32")
    # XLA counts all but the gradient towards the images, for a device, and some besides.
    assert found["step_operations"] == 6 * 12_239_488 * 16
    assert 2 * found["xla"]["flops"] == pytest.approx(found["step_operations"], rel=0.15)
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
    case = bench_case.Case("resnet18", 4, "float32", 2, examples=3, eval_examples=5)
    (run,) = bench_case.make_setups(case)
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
        ("--compile_for=h100", "XLA's compiler for GPUs: pip install '.[offline_gpu]'"),
        ("--compile_for=v6e", "XLA's compiler for TPUs: pip install '.[offline_tpu]'"),
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
        bench_case.make_setups(bench_case.Case("resnet8", 18, devices=9, examples=18))


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
        pytest.skip(f"no compiler for {target}: pip install '.[offline_{platform}]'")
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


# Two steps; in each a loop of three turns that says so, and one of five by its condition.
HLO = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%fused_all-reduce (p: f32[8]) -> f32[8] {
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), channel_id=1, to_apply=%add
}
%inner (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0} fusion(%p.1), calls=%other, backend_config={"estimated_cycles":"10","x":"1"}
  ROOT %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_all-reduce
}
%counts.1 (p.2: (s32[], f32[8])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(99)
  %constant.5 = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %less = pred[]{:T(512)} compare(s32[]{:T(128)} %i, s32[]{:T(128)} %constant.5), direction=LT
}
%asks (p.3: (s32[], f32[8])) -> pred[] {
  ROOT %flag = pred[] get-tuple-element(%p.3), index=2
}
%step (p.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = f32[8]{0} convolution(%p.4), backend_config={"estimated_cycles":"100"}
  %d = s32[] while(%c), condition=%asks, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %e = f32[8]{0} all-reduce-start(%d), to_apply=%add, metadata={op_name="a/while/body"}
  ROOT %f = (s32[], f32[8]) while(%e), condition=%counts.1, body=%inner
}
%counts (p.5: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[] constant(2)
  ROOT %less.1 = pred[] compare(%i.1, %constant.2), direction=LT
}
ENTRY %main (p.6: s32[]) -> (s32[], f32[8]) {
  %g = s32[] fusion(%p.6), backend_config={"estimated_cycles":"7"}
  %h = (s32[], f32[8]) while(%g), condition=%counts, body=%small
  ROOT %j = (s32[], f32[8]) while(%h), condition=%counts, body=%step
}
%small (p.7: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %k = f32[8]{0} copy(%p.7), backend_config={"estimated_cycles":"1"}
}
"""

THUNKS = """\
000: kCommandBuffer [source       | next=034 (1)]
    001: kCustomKernel [source | sink] loop_add_fusion_15 grid: [1, 1, 1] threads: [100, 1, 1]
002: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion_6 grid: [1, 1, 1]
  body:
    004: kCopy [source | sink] kCopy
005: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    006: kCustomKernel [source | sink] loop_compare_fusion_6 grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=090 (1)]
        007: kCustomKernel [source        | next=038 (2)] loop_convert_fusion_26
        008: kConvolution  [prev=037 (1)  | next=039 (1)] kConvolution
        009: kAsyncStart   [source        | next=137 (26)] stream=computation_stream[1]
            010: kDynamicSliceFusion [source | sink] params=1, results=1
                011: kCopy [source | sink] kCopy
        012: kAsyncDone    [source        | sink         ] async_id=113
    013: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        014: kCustomKernel [source | sink] loop_compare_fusion
      body:
        000: kCommandBuffer [source | sink]
            015: kCustomKernel [source        | next=093 (1) ] loop_convert_fusion
            016: kMemset32BitValue [source | sink]
        017: kAllReduce [source | sink] kAllReduce
    018: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        019: kCustomKernel [source | sink] loop_compare_fusion
      body:
        020: kAsyncStart    [prev=000 (1) | next=038 (2)] stream=computation_stream[0]
            021: kCollectiveKernel [source | sink] kCollectiveKernel
        022: kAsyncDone     [source       | sink        ] async_id=35
    023: kGemm [source | sink]
024: kCopy [source | sink] kCopy
"""


def test_loops_inside_a_step_count_as_often_as_they_turn():
    step = 100 + (3 + 5) * 10
    assert bench_program.count(HLO, "", "tpu", 2) == {
        "all_reduces": 1 + 3 + 5,
        "cycles_per_step": step,
        "cycles_per_chunk": 7 + 2 * 1 + 2 * step,
    }
    assert bench_program.count(HLO, THUNKS, "gpu", 2) == {
        "all_reduces": 1 + 3 + 5,
        "launches": 3 + 3 * 3 + 5 * 1 + 1,
        "host_submissions": 1 + 3 * 2 + 5 * 1 + 1,
    }
    # A chunk of one step has no loop around it.
    program = HLO.replace("ENTRY ", "").replace("%step (", "ENTRY %step (")
    thunks = "\n".join(line.removeprefix("    ") for line in THUNKS.splitlines()[11:-1])
    found = bench_program.count(program, thunks, "gpu", 1)
    assert (found["launches"], found["host_submissions"]) == (18, 13)
    found = bench_program.count(program, "", "tpu", 1)
    assert found["cycles_per_step"] == found["cycles_per_chunk"] == 180


CONVOLUTION = 'convolution(%p.4), backend_config={"estimated_cycles":"100"}'


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"known_trip_count":{"n":"3"}', "", "how often a loop of the program turns"),
        ("constant(2)", "constant(3)", "no loop of 2 turns"),
        (" while(", " call(", "no loop of 2 turns"),
        (CONVOLUTION, "conditional(%p.4)", "branch"),
    ],
)
def test_programs_that_cannot_be_counted(old, new, reason):
    assert old in HLO
    for platform in ("tpu", "gpu"):
        found = bench_program.count(HLO.replace(old, new), THUNKS, platform, 2)
        assert list(found) == ["error"]
        assert reason in found["error"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (THUNKS, "", "no list of launches"),
        ("kGemm", "kConditional", "kConditional executes"),
        ("kAsyncStart", "kNew", "kNew executes"),
        ("002: kWhile", "002: kCopy", "different loops"),
        ("    018: kWhile", "    018: kSequential", "different loops"),
    ],
)
def test_thunks_that_cannot_be_counted(old, new, reason):
    assert old in THUNKS
    found = bench_program.count(HLO, THUNKS.replace(old, new), "gpu", 2)
    assert reason in found["error"]
    assert found["all_reduces"] == 9
