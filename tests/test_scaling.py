"""tests/benchmarks/scaling.py: what it counts, and what README of launch/ concludes from it."""

import math

import jax
import pytest

from resnet_flax.models import count, create_model
from tests.benchmarks import scaling

EACH = 16
NORMS = 7  # The stem's and two in each of the three blocks of resnet8.


@pytest.fixture(scope="module")
def compiled():
    assert jax.device_count() == 8
    return {group: scaling.compile_step("resnet8", EACH, group) for group in (0, EACH)}


def test_groups_that_fit_on_a_device_need_no_collectives_for_statistics(compiled):
    counts = {group: scaling.collectives(step.as_text()) for group, step in compiled.items()}
    # Mean, variance, and one on the way back; XLA joins the first layer's last one to the
    # gradients.
    assert 3 * NORMS - 2 <= len(counts[0]["statistics"]) <= 3 * NORMS
    assert counts[EACH]["statistics"] == []
    least = 4 * sum(layer.parameters for layer in count.layers(create_model("resnet8"), 32))
    for found in counts.values():
        assert least <= sum(found["gradients"]) + sum(found["statistics"]) <= 1.03 * least
        assert set(found) == {"statistics", "gradients"}


def test_operations_are_those_of_one_device(compiled):
    # Two to a multiply-add, forwards and, towards weights and input, backwards.
    forwards = sum(layer.multiply_adds for layer in count.layers(create_model("resnet8"), 32))
    assert compiled[EACH].cost_analysis()["flops"] == pytest.approx(6 * forwards * EACH, rel=0.1)


def test_the_model_by_hand():
    chip = scaling.Hardware("chip", 1e12, lambda n: 1e9, lambda n: 1e-3)
    counts = {"flops": 1e12, "collectives": {"statistics": [0] * 100, "gradients": [4_000_000]}}
    # Computing 2 s at half of the peak; waiting 101 times 1 ms, and for 2 x 3/4 x 4 ms of bytes.
    share = scaling.efficiency(counts, chip, devices=4, utilisation=0.5)
    assert share == pytest.approx(2 / (2 + 0.101 + 0.006))
    latencies = {h.name: [1e6 * h.latency(n) for n in scaling.COUNTS] for h in scaling.HARDWARE}
    assert latencies["TPU v5e"] == pytest.approx([8, 28, 32])
    assert latencies["TPU v5p"] == pytest.approx([6, 12, 20])
    tree = [4.4 + 14 * 0.52, *(4.4 + 14 * 0.936 + 10 * math.log2(n) for n in (8, 32))]
    assert latencies["H100/H200"] == pytest.approx(tree)


def test_lines_of_a_program():
    text = """
  %a = f32[1,16]{1,0} all-reduce(%x), channel_id=1, metadata={op_name="jit(f)/stem_bn/reduce_sum"}
  %b = (f32[1,16]{1,0}, f32[2,32]{1,0}) all-reduce(%x, %y), metadata={op_name="f/(bn1/sum:bn2/sum)"}
  %c = (f32[3,3,16,16], /*index=1*/f32[1,16], f32[]) all-reduce(%x), metadata={op_name="f/bn1/sum"}
  %d = bf16[10]{0} all-reduce-start(%x), metadata={op_name="jit(f)/head"}
  %e = bf16[10]{0} all-reduce-done(%d), metadata={op_name="jit(f)/head"}
  %f = s32[8]{0} all-gather(%x), dimensions={0}
  %g = f32[4]{0} add(%all-reduce.1, %y)
"""
    assert scaling.collectives(text) == {
        "statistics": [64, 64 + 256],
        "gradients": [4 * 9 * 256 + 64 + 4, 20],
        "all-gather": [32],
    }
