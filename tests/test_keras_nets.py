"""The nets of Keras's example: its counts, and its structure written out a second time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.tools import summary
from tests.test_models import check_scanned_and_unrolled_agree


def conv(k, a, b):
    return k * k * a * b + b


def version1(depth):
    n = (depth - 2) // 6
    total = conv(3, 3, 16) + 2 * 16 + 64 * 10 + 10
    width = 16
    for new in (16, 32, 64):
        for _ in range(n):
            total += conv(3, width, new) + conv(3, new, new) + 2 * 2 * new
            total += conv(1, width, new) if width != new else 0
            width = new
    return total


def version2(depth):
    n = (depth - 2) // 9
    total = conv(3, 3, 16) + 2 * 16 + 2 * 256 + 256 * 10 + 10
    width = 16
    for middle, out in ((16, 64), (64, 128), (128, 256)):
        for i in range(n):
            total += conv(1, width, middle) + conv(3, middle, middle) + conv(1, middle, out)
            total += 2 * (width + 2 * middle)
            total += conv(1, width, out) if i == 0 else 0
            width = out
    return total - 2 * 16  # The first unit has no first BN.


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_version_1_has_the_examples_parameters(depth):
    total = summary.summarize(f"resnet{depth}_keras_v1")
    assert total["parameters"] == version1(depth)
    if depth == 20:
        assert total["parameters"] == 273_066
        assert {row["kind"] for row in total["layers"]} == {"Conv", "BatchNorm", "Dense"}


@pytest.mark.parametrize(("depth", "count"), [(56, 1_663_338), (110, 3_302_442)])
def test_version_2_has_the_examples_parameters(depth, count):
    assert summary.summarize(f"resnet{depth}_keras_v2")["parameters"] == version2(depth) == count


@pytest.fixture
def small_v2():
    model = create_model("resnet56_keras_v2")
    return model.clone(stage_sizes=(3, 2), widths=(4, 8), out_widths=(16, 16))


def small_v1():
    return create_model("resnet20_keras_v1").clone(stage_sizes=(3, 2), widths=(4, 8))


def test_scanned_and_unrolled_agree(small_v2):
    check_scanned_and_unrolled_agree(small_v2)
    check_scanned_and_unrolled_agree(small_v1())


def filled(model, x):
    """Variables in which every bias, scale and statistic matters."""
    rng = np.random.RandomState(0)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree.map(lambda v: np.float32(0.5 * rng.rand(*v.shape) + 0.1), abstract)


class Reader:
    """Layers in evaluation mode, from a net's variables, as Keras defines them."""

    def __init__(self, variables):
        self.params, self.stats = variables["params"], variables["batch_stats"]

    def conv(self, block, name, x, stride=1):
        p = self.params[block][name] if block else self.params[name]
        size = p["kernel"].shape[0]
        # TensorFlow's `same`, of an even side: what is missing, the smaller half first.
        missing = max(size - stride, 0)
        pads = ((missing // 2, missing - missing // 2),) * 2
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (stride, stride), pads, dimension_numbers=dims
        )
        return y + p["bias"]

    def norm(self, block, name, x):
        p = self.params[block][name] if block else self.params[name]
        s = self.stats[block][name] if block else self.stats[name]
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-3) * p["scale"] + p["bias"]

    def head(self, x):
        return (
            jnp.mean(x, axis=(1, 2)) @ self.params["head"]["kernel"] + self.params["head"]["bias"]
        )


def test_version_1_equals_its_description():
    model, x = small_v1(), np.random.RandomState(1).randn(2, 8, 8, 3).astype(np.float32)
    variables = filled(model, x)
    net = Reader(variables)
    y = jax.nn.relu(net.norm("", "stem_bn", net.conv("", "stem_conv", x)))
    for stage, count in ((1, 3), (2, 2)):
        for i in range(1, count + 1):
            block, stride = f"stage{stage}_block{i}", 2 if (stage, i) == (2, 1) else 1
            z = jax.nn.relu(net.norm(block, "bn1", net.conv(block, "conv1", y, stride)))
            z = net.norm(block, "bn2", net.conv(block, "conv2", z))
            y = net.conv(block, "proj_conv", y, 2) if stride == 2 else y
            y = jax.nn.relu(y + z)
    np.testing.assert_allclose(model.apply(variables, x), net.head(y), rtol=1e-4)


def test_version_2_equals_its_description(small_v2):
    x = np.random.RandomState(1).randn(2, 8, 8, 3).astype(np.float32)
    variables = filled(small_v2, x)
    net = Reader(variables)
    y = jax.nn.relu(net.norm("", "stem_bn", net.conv("", "stem_conv", x)))
    # In its second stage this small net keeps the channels, but not the side: a projection too.
    for stage, count in ((1, 3), (2, 2)):
        for i in range(1, count + 1):
            block, stride = f"stage{stage}_block{i}", 2 if (stage, i) == (2, 1) else 1
            z = y if (stage, i) == (1, 1) else jax.nn.relu(net.norm(block, "bn1", y))
            z = jax.nn.relu(net.norm(block, "bn2", net.conv(block, "conv1", z, stride)))
            z = jax.nn.relu(net.norm(block, "bn3", net.conv(block, "conv2", z)))
            z = net.conv(block, "conv3", z)
            y = net.conv(block, "proj_conv", y, stride) + z if i == 1 else y + z
    y = jax.nn.relu(net.norm("", "final_bn", y))
    np.testing.assert_allclose(small_v2.apply(variables, x), net.head(y), rtol=1e-4)


def test_initial_kernels_are_truncated_and_biases_zero():
    model = small_v1().clone(widths=(16, 64))
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    layer = params["stage2_block2"]["conv2"]
    std = np.sqrt(2 / (9 * 64))
    assert abs(np.std(layer["kernel"]) / std - 1) < 0.02
    assert np.abs(layer["kernel"]).max() < 2.3 * std
    np.testing.assert_array_equal(layer["bias"], 0)


def test_its_shortcuts_are_no_option():
    with pytest.raises(UserError, match="shortcuts of its own"):
        create_model("resnet20_keras_v1", shortcut="A")
