"""`tools.bench_program`: how it reads XLA's texts."""

import pytest

from resnet_flax.tools import bench_program

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
