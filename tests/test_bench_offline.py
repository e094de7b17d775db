"""`tools.bench --compile_for`: reading XLA's texts, its complaints, and small real compilations."""

import importlib.util
import json

import pytest

from resnet_flax.devices import hardware
from resnet_flax.errors import UserError
from resnet_flax.tools import bench, bench_offline

# Two steps; in each a loop of three turns that says so, and one of five by its condition.
HLO = """
HloModule jit_train_chunk, is_scheduled=true, entry_computation_layout={(s32[])->s32[]}

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


def test_cycles_and_all_reduces_of_nested_loops():
    found = bench_offline.count(HLO, "", "tpu", 2)
    step = 100 + (3 + 5) * 10
    assert found == {
        "all_reduces": 1 + 3 + 5,
        "cycles_per_step": step,
        "cycles_per_chunk": 7 + 2 * 1 + 2 * step,
    }


def test_launches_of_nested_loops():
    found = bench_offline.count(HLO, THUNKS, "gpu", 2)
    assert found == {
        "all_reduces": 1 + 3 + 5,
        "launches": 3 + 3 * 3 + 5 * 1 + 1,
        "host_submissions": 1 + 3 * 2 + 5 * 1 + 1,
    }


def test_a_chunk_of_one_step_has_no_loop():
    program = HLO.replace("ENTRY ", "").replace("%step (", "ENTRY %step (")
    thunks = "\n".join(
        line.removeprefix("    ") for line in THUNKS.splitlines()[11:] if "024" not in line
    )
    found = bench_offline.count(program, thunks, "gpu", 1)
    assert (found["launches"], found["host_submissions"]) == (18, 13)
    found = bench_offline.count(program, "", "tpu", 1)
    assert found["cycles_per_step"] == found["cycles_per_chunk"] == 180


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"known_trip_count":{"n":"3"}', "", "how often a loop of the program turns"),
        ("constant(2)", "constant(3)", "no loop of 2 turns"),
        (" convolution(", " conditional(", "which branch of the program"),
    ],
)
def test_what_cannot_be_told_has_a_reason(old, new, reason):
    # A conditional that the compiler gives no cycles.
    text = HLO.replace('"estimated_cycles":"100"', "") if "convolution" in old else HLO
    for platform in ("tpu", "gpu"):
        found = bench_offline.count(text.replace(old, new), THUNKS, platform, 2)
        assert reason in found["error"]
        assert not set(found) & {"launches", "cycles_per_step", "all_reduces"}


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
    found = bench_offline.count(HLO, THUNKS.replace(old, new), "gpu", 2)
    assert reason in found["error"]
    assert found["all_reduces"] == 9


def test_what_stands_in_an_environment(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_one=1")
    found = bench_offline.environment("h100", "/some/where")
    assert found["XLA_FLAGS"].split()[:2] == ["--xla_one=1", "--xla_dump_to=/some/where"]
    assert "XLA_FLAGS" not in bench_offline.environment("v5e", "/some/where")


def test_compiler_options_are_the_platforms_own(monkeypatch):
    assert list(hardware.compiler_options("gpu")) == ["xla_gpu_enable_command_buffer"]
    assert list(hardware.compiler_options("cpu")) == ["xla_cpu_experimental_ynn_fusion_type"]
    assert hardware.compiler_options("tpu") is None
    # An option that this XLA does not know.
    monkeypatch.setitem(hardware._COMPILER_OPTIONS, "gpu", {"xla_gpu_of_another_version": "1"})
    assert hardware.compiler_options("gpu") is None


def has_compiler(target):
    names = bench_offline._COMPILERS[bench_offline.TARGETS[target]]
    return any(map(importlib.util.find_spec, names))


@pytest.mark.parametrize("target", ["h100", "v5e", "v6e"])
def test_a_missing_compiler_is_named(target, monkeypatch):
    monkeypatch.setattr(bench_offline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        bench.main([f"--compile_for={target}"])
    kind = {"h100": "gpu"}.get(target, "tpu")
    assert str(error.value) == (
        f"--compile_for={target} needs XLA's compiler for {kind.upper()}s: "
        f"pip install '.[offline_{kind}]'"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compile_for=h200"], "--compile_for=h200 must be one of h100, v5e, v6e"),
        (["--compile_for=v5e", "--devices=2"], "--devices=2: of v5e there can be 1, 4, 8,"),
        (["--compile_for=v5e", "--out=x.json"], "--out is for measurements"),
        (["--compile_for=h100", "--models=resnet21"], "unknown model 'resnet21'"),
    ],
)
def test_wrong_arguments(flags, message, monkeypatch):
    monkeypatch.setattr(bench_offline.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=message):
        bench.main(flags)


def test_what_fails_is_told_and_the_rest_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(bench_offline.importlib.util, "find_spec", lambda name: True)
    seen = []

    def run_worker(case, *, timeout, module, variables):
        seen.append(case)
        if case["model"] == "resnet50":
            raise UserError("out of memory")
        numbers = {"model": case["model"], "target": "h100", "devices": 1, "launches": 1234}
        return dict.fromkeys(bench_offline.KEYS) | numbers

    monkeypatch.setattr(bench, "run_worker", run_worker)
    flags = ["--compile_for=h100", "--models=resnet8,resnet50"]
    with pytest.raises(UserError, match="1 of 2 combinations"):
        bench.main([*flags, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert set(content) == {"command", "rows"}
    good, failed = content["rows"]
    assert list(good) == bench_offline.KEYS
    assert list(failed) == [*bench_offline.KEYS, "error"]
    assert (failed["model"], failed["devices"], failed["error"]) == ("resnet50", 1, "out of memory")
    # The batch sizes of the recipes.
    assert [case["batch_size"] for case in seen] == [128, 256]
    with pytest.raises(UserError, match="1 of 2 combinations"):
        bench.main(flags)
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["net", "batch", "dtype"]
    assert first.split() == "resnet8 128 auto 1 x h100 1,234 - - - - - - -".split()
    assert second.split() == "resnet50 256 auto 1 x h100 - - - - - - - -".split()
    assert last == "resnet50: out of memory"


def compiled(target, capsys, *flags):
    """The rows of a real compilation."""
    if not has_compiler(target):
        kind = bench_offline.TARGETS[target]
        pytest.skip(f"no compiler for {target}: pip install '.[offline_{kind}]'")
    bench.main([f"--compile_for={target}", "--json", *flags])
    rows = json.loads(capsys.readouterr().out)["rows"]
    for row in rows:
        assert list(row) == bench_offline.KEYS
        # The images are among the arguments.
        assert row["argument_bytes"] > 50_000 * 32 * 32 * 3
        assert row["temporary_bytes"] > 0
    return rows


def test_a_gpus_step_is_one_graph(capsys):
    (row,) = compiled("h100", capsys, "--models=resnet8")
    # Of seven convolutions: forwards, backwards towards weights and all activations but the images.
    assert row["launches"] > 7 + 7 + 6
    assert row["host_submissions"] == 1
    assert row["all_reduces"] == 0
    assert row["cycles_per_step"] is row["cycles_per_chunk"] is None


def test_kernels_of_our_own_make_a_step_shorter(capsys):
    launches = {}
    for kernels in ("never", "always"):
        flags = "--models=resnet8,resnet20", f"--set=model.kernels={kernels}"
        rows = compiled("h100", capsys, *flags)
        assert [row["host_submissions"] for row in rows] == [1, 1]
        launches[kernels] = [row["launches"] for row in rows]
    assert launches["always"][0] < launches["never"][0]
    assert launches["always"][1] <= 150
    assert launches["never"][1] <= 240


def test_several_gpus_and_nets_whose_blocks_are_a_loop(capsys):
    flags = "--models=resnet20", "--devices=2", "--set=model.scan=always"
    (row,) = compiled("h100", capsys, *flags)
    # A mean and a variance for each of 19 layers, and the gradients.
    assert row["all_reduces"] > 2 * 19
    assert row["launches"] > row["host_submissions"] >= row["all_reduces"]


def test_a_tpus_cycles(capsys):
    (row,) = compiled("v5e", capsys, "--models=resnet8")
    step, chunk = row["cycles_per_step"], row["cycles_per_chunk"]
    assert 0 <= chunk - 100 * step < 5 * step
    assert step > 10_000
    assert row["launches"] is row["host_submissions"] is None
