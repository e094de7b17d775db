"""The nets are the paper's, to the last parameter. Numbers: He et al. 2015 and 2016."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES, blocks, layout, resolve_shortcut
from resnet_flax.models.activation import relu
from resnet_flax.models.norm import BatchNorm
from resnet_flax.models.zoo import cifar_architecture, get_architecture

# depth: parameters with options A, B, C, and multiply-adds with option A.
BASIC = {
    20: (269_722, 272_474, 283_962, 40_551_040),
    32: (464_154, 466_906, 489_594, 68_862_592),
    44: (658_586, 661_338, 695_226, 97_174_144),
    56: (853_018, 855_770, None, 125_485_696),
    110: (1_727_962, 1_730_714, 1_826_202, 252_887_680),
    1202: (19_421_274, 19_424_026, None, 2_829_238_912),
}
# depth: parameters post-activation, pre-activation, and multiply-adds (stride in the 1x1).
BOTTLENECK = {
    20: (220_378, 219_482, 30_591_488),
    47: (498_586, 497_690, 70_699_520),
    164: (1_704_154, 1_703_258, 244_500_992),
    1001: (10_328_602, 10_327_706, 1_487_849_984),
}
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
# Each program of these tests runs once: compiling it well takes longer than running it badly.
ONCE = {"xla_backend_optimization_level": 0}


def variables_of(model):
    # The scanned form has the same variables, stacked, and traces in a moment at any depth.
    return jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), IMAGE)


def parameters(model):
    return sum(x.size for x in jax.tree.leaves(variables_of(model)["params"]))


def multiply_adds(model):
    """Counted from the program itself: every convolution and matrix product of a forward pass."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "conv_general_dilated":
                kernel = eqn.invars[1].aval.shape  # HWIO
                total += eqn.outvars[0].aval.size * kernel[0] * kernel[1] * kernel[2]
            elif eqn.primitive.name == "dot_general":
                total += eqn.outvars[0].aval.size * eqn.invars[0].aval.shape[-1]
            repeats = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for sub in eqn.params.values():
                sub = getattr(sub, "jaxpr", sub)  # A closed one holds another.
                if hasattr(sub, "eqns"):
                    total += repeats * count(sub)
        return total

    model = model.clone(scan=True)
    return count(jax.make_jaxpr(model.apply)(variables_of(model), IMAGE).jaxpr)


@pytest.mark.parametrize("depth", BASIC)
def test_basic_nets_have_the_papers_parameters(depth):
    a, b, c, _ = BASIC[depth]
    assert parameters(create_model(f"resnet{depth}")) == a
    assert parameters(create_model(f"resnet{depth}", shortcut="A")) == a
    assert parameters(create_model(f"resnet{depth}", shortcut="B")) == b
    if c is not None:
        assert parameters(create_model(f"resnet{depth}", shortcut="C")) == c
    if f"plain{depth}" in ARCHITECTURES:
        assert parameters(create_model(f"plain{depth}")) == a
    if f"resnet{depth}_preact" in ARCHITECTURES:
        assert parameters(create_model(f"resnet{depth}_preact", shortcut="A")) == a


@pytest.mark.parametrize("depth", BOTTLENECK)
def test_bottleneck_nets_have_the_papers_parameters(depth):
    post, pre, _ = BOTTLENECK[depth]
    assert parameters(create_model(f"resnet{depth}_bottleneck")) == post
    if f"resnet{depth}_preact" in ARCHITECTURES and depth != 20:
        assert parameters(create_model(f"resnet{depth}_preact")) == pre


def test_preactivation_projections_have_no_normalisation():
    assert parameters(create_model("resnet20_preact")) == 272_282
    assert parameters(create_model("resnet110_preact")) == 1_730_522


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weighted_layers_are_the_name_s_number(name):
    depth = int("".join(c for c in name.split("_")[0] if c.isdigit()))
    assert ARCHITECTURES[name].weighted_layers == depth
    # And independently, from the kernels that there are, those of shortcuts aside.
    flat = jax.tree_util.tree_leaves_with_path(variables_of(create_model(name))["params"])
    layers = 0
    for path, leaf in flat:
        keys = [p.key for p in path]
        if keys[-1] == "kernel" and not {"proj_conv", "gate_conv"} & set(keys):
            layers += leaf.shape[0] if keys[0].endswith("_rest") else 1
    assert layers == depth


@pytest.mark.parametrize("depth", BASIC)
def test_multiply_adds_of_basic_nets(depth):
    assert multiply_adds(create_model(f"resnet{depth}")) == BASIC[depth][3]


@pytest.mark.parametrize("depth", BOTTLENECK)
def test_multiply_adds_of_bottleneck_nets(depth):
    assert multiply_adds(create_model(f"resnet{depth}_bottleneck")) == BOTTLENECK[depth][2]


def test_stride_in_the_3x3_costs_more_and_keeps_the_parameters():
    paper = create_model("resnet47_bottleneck")
    other = create_model("resnet47_bottleneck", stride_in_3x3=True)
    assert parameters(paper) == parameters(other)
    # Two first 1x1 convolutions work on four times the pixels.
    extra = 3 * (64 * 32 * 16 * 16 + 128 * 64 * 8 * 8)
    assert multiply_adds(other) - multiply_adds(paper) == extra


def test_no_convolution_has_a_bias():
    flat = jax.tree_util.tree_leaves_with_path(variables_of(create_model("resnet20", shortcut="C")))
    biases = [p for p, _ in flat if p[-1].key == "bias" and "conv" in p[-2].key]
    assert not biases


def test_unknown_names_are_refused_with_help():
    with pytest.raises(UserError, match=r"did you mean 'resnet20'.*summary --list"):
        create_model("resnet_20")
    with pytest.raises(UserError, match="known: A, B, C"):
        create_model("resnet20", shortcut="D")
    with pytest.raises(UserError, match="plain and has no shortcuts.*'resnet20'"):
        create_model("plain20", shortcut="B")
    with pytest.raises(UserError, match="num_classes=-1"):
        create_model("resnet20", -1)
    with pytest.raises(UserError, match="unknown dtype 'float33'"):
        create_model("resnet20", dtype="float33")
    with pytest.raises(ValueError, match="depth=21"):
        cifar_architecture(21, blocks.BasicBlock, "A")


def test_default_shortcuts_are_the_papers():
    assert resolve_shortcut("resnet110", None) == "A"
    assert resolve_shortcut("plain20", "auto") == "none"
    assert resolve_shortcut("resnet47_bottleneck", "auto") == "B"
    assert resolve_shortcut("resnet110_preact", "auto") == "B"
    assert resolve_shortcut("resnet110_preact", "A") == "A"


@pytest.mark.parametrize("name", ["resnet20_preact", "resnet47_preact"])
def test_the_first_preactivation_block_activates_before_it_splits(name):
    """[I, Appendix]: "the first activation right after conv1 and before splitting"."""
    model = create_model(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    variables = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), variables)
    # With its last convolution at zero a block is its shortcut: of the activated input, here
    # max(0, (x + shift)) with x = 9 * 3 * image in the middle of the picture.
    first = variables["params"]["stage1_block1"]
    last = max(k for k in first if k.startswith("conv"))
    first[last]["kernel"] *= 0
    x = -jnp.ones((1, 8, 8, 3))
    outputs = {}

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        outputs[context.module.path] = out
        return out

    with nn.intercept_methods(note):
        model.apply(variables, x)
    stem = outputs[("stem_conv",)][0, 4, 4]
    assert float(stem[0]) == -27
    np.testing.assert_allclose(outputs[("stage1_block1",)][0, 4, 4], 0, atol=1e-6)


def reference_conv(x, kernel, stride):
    """A convolution written out: zero padding by 1 on every side."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((-(-x.shape[0] // stride), -(-x.shape[1] // stride), kernel.shape[-1]))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            window = padded[i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[i, j] = np.einsum("hwc,hwcd->d", window, kernel)
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_pads_one_pixel_on_every_side(stride):
    rng = np.random.RandomState(0)
    x, kernel = rng.randn(6, 8, 3), rng.randn(3, 3, 3, 5)
    conv = blocks.Conv(5, strides=stride)
    got = conv.apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x)[None])[0]
    np.testing.assert_allclose(got, reference_conv(x, kernel, stride), atol=1e-5)


def test_option_a_takes_every_second_pixel_and_pads_channels_with_zeros():
    x = jnp.arange(2 * 4 * 4 * 2, dtype=jnp.float32).reshape(2, 4, 4, 2) + 1
    y = jnp.zeros((2, 2, 2, 4))
    out = blocks.pad_identity(x, y, 2, None, None)
    np.testing.assert_array_equal(out[..., 1:3], x[:, ::2, ::2])
    np.testing.assert_array_equal(out[..., 0], 0)
    np.testing.assert_array_equal(out[..., 3], 0)


def numpy_resnet8(params, stats, x, plain):
    """An independent forward pass in evaluation mode, from the paper's text."""

    def norm(p, s, x):
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]

    x = reference_conv(x, params["stem_conv"]["kernel"], 1)
    x = np.maximum(norm(params["stem_bn"], stats["stem_bn"], x), 0)
    for stage in (1, 2, 3):
        p, s = params[f"stage{stage}_block1"], stats[f"stage{stage}_block1"]
        stride = 1 if stage == 1 else 2
        y = reference_conv(x, p["conv1"]["kernel"], stride)
        y = np.maximum(norm(p["bn1"], s["bn1"], y), 0)
        y = norm(p["bn2"], s["bn2"], reference_conv(y, p["conv2"]["kernel"], 1))
        if not plain:
            shortcut = x[::stride, ::stride]
            half = (y.shape[-1] - x.shape[-1]) // 2
            y = y + np.pad(shortcut, ((0, 0), (0, 0), (half, half)))
        x = np.maximum(y, 0)
    return x.mean(axis=(0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("plain", [False, True])
def test_forward_pass_equals_one_written_out_in_numpy(plain):
    model = create_model("resnet8")
    if plain:
        model = model.clone(shortcut_changing=blocks.no_shortcut, shortcut_same=blocks.no_shortcut)
    init = jax.jit(model.init, compiler_options=ONCE)
    variables = init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))
    rng = np.random.RandomState(0)
    # Statistics and scales away from 0 and 1, so that each of them matters.
    variables = jax.tree.map(lambda x: x + 0.1 * np.abs(rng.randn(*x.shape)), variables)
    x = rng.randn(8, 8, 3)
    want = numpy_resnet8(variables["params"], variables["batch_stats"], x, plain)
    got = jax.jit(model.apply, compiler_options=ONCE)(variables, jnp.float32(x)[None])[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_initialisation_is_he_normal_and_not_truncated():
    model = create_model("resnet20").clone(stage_sizes=(1,), widths=(64,))
    init = jax.jit(model.init, compiler_options=ONCE)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = params["stage1_block1"]["conv2"]["kernel"]
    std = np.sqrt(2 / (9 * 64))
    assert abs(np.std(kernel) / std - 1) < 0.02
    # A normal truncated at two deviations would have none beyond 2.3 of its own.
    assert np.abs(kernel).max() > 3 * std
    np.testing.assert_array_equal(params["head"]["bias"], 0)


@pytest.mark.parametrize("group", [None, 2])
def test_batch_norm_is_over_the_batch_or_its_groups(group):
    x = 3 * np.random.RandomState(0).randn(4, 3, 3, 2).astype(np.float32) + 100
    norm = BatchNorm(train=True, momentum=0.75, group_size=group)
    variables = norm.clone(train=False).init(jax.random.key(0), x)
    got, new = norm.apply(variables, x, mutable=["batch_stats"])
    parts = np.split(x.astype(np.float64), 4 // (group or 4))
    means = np.array([p.mean(axis=(0, 1, 2)) for p in parts])
    variances = np.array([p.var(axis=(0, 1, 2)) for p in parts])
    want = [(p - m) / np.sqrt(v + 1e-5) for p, m, v in zip(parts, means, variances, strict=True)]
    np.testing.assert_allclose(got, np.concatenate(want), atol=2e-4)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.25 * means.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * variances.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize(("mean", "error"), [(0, 1e-6), (10, 1e-5), (1000, 1e-3)])
@pytest.mark.parametrize("group", [None, 16])
def test_gradients_of_batch_norm_by_their_definition(mean, error, group):
    random = np.random.default_rng(0)
    x = (random.standard_normal((32, 8, 8, 4)) + mean).astype(np.float32)
    weight = random.standard_normal(x.shape).astype(np.float32)
    params = {"scale": jnp.arange(1.0, 5.0), "bias": jnp.ones(4)}
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    norm = BatchNorm(train=True, group_size=group)

    def loss(params, x):
        variables = {"params": params, "batch_stats": stats}
        return jnp.sum(weight * norm.apply(variables, x, mutable=["batch_stats"])[0])

    got, got_x = jax.grad(loss, argnums=(0, 1))(params, x)
    # Ioffe & Szegedy 2015, section 3, in float64.
    want_x, want_scale = [], np.zeros(4)
    parts = (np.split(v.astype(np.float64), 32 // (group or 32)) for v in (x, weight))
    for y, g in zip(*parts, strict=True):
        inverse = 1 / np.sqrt(y.var(axis=(0, 1, 2)) + 1e-5)
        y = (y - y.mean(axis=(0, 1, 2))) * inverse
        slope = (g * y).mean(axis=(0, 1, 2))
        want_x.append(np.arange(1, 5) * inverse * (g - g.mean(axis=(0, 1, 2)) - y * slope))
        want_scale += (g * y).sum(axis=(0, 1, 2))
    for one, other in (
        (got_x, np.concatenate(want_x)),
        (got["scale"], want_scale),
        (got["bias"], weight.sum(axis=(0, 1, 2), dtype=np.float64)),
    ):
        assert np.linalg.norm(one - other) < error * np.linalg.norm(other)


def test_derivatives_of_batch_norm_go_both_ways():
    x, direction = np.random.default_rng(1).standard_normal((2, 6, 3, 3, 2)).astype(np.float32)
    norm = BatchNorm(train=True)
    variables = norm.init(jax.random.key(0), x)

    def outputs(x):
        y, new = norm.apply(variables, x, mutable=["batch_stats"])
        return relu(y), new["batch_stats"]

    (y, stats), (dy, dstats) = jax.jvp(outputs, (x,), (direction,))
    _, pull = jax.vjp(outputs, x)
    (back,) = pull((y, stats))
    ahead = np.vdot(y, dy) + sum(np.vdot(stats[k], dstats[k]) for k in stats)
    assert ahead == pytest.approx(np.vdot(back, direction), rel=1e-4)

    # Twice as well: the curvature along a line, against differences of the slope.
    def along(t):
        return jnp.sum(
            jnp.sin(norm.apply(variables, x + t * direction, mutable=["batch_stats"])[0])
        )

    slope = jax.jit(jax.grad(along))
    difference = float(slope(1e-2) - slope(-1e-2)) / 2e-2
    assert float(jax.grad(slope)(0.0)) == pytest.approx(difference, rel=2e-2)


def test_relu_is_that_of_flax():
    x = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(relu(x), nn.relu(x))
    ours, theirs = (jax.vmap(jax.grad(function))(x) for function in (relu, nn.relu))
    np.testing.assert_array_equal(ours, theirs)
    assert jnp.isnan(relu(jnp.nan))


def test_batch_norm_refuses_a_batch_that_does_not_divide():
    norm = BatchNorm(train=True, group_size=3)
    with pytest.raises(ValueError, match="batch of 4 .* bn_group_size=3"):
        norm.init(jax.random.key(0), jnp.zeros((4, 2, 2, 1)))


@pytest.mark.parametrize("name", ["resnet20", "resnet20_preact"])
def test_scanned_and_unrolled_agree_with_and_without_remat(name):
    # Two stages are enough to have blocks that change the shape, and fast to compile.
    model = create_model(name).clone(stage_sizes=(3, 2), widths=(4, 8))
    check_scanned_and_unrolled_agree(model, remat=True)


def check_scanned_and_unrolled_agree(unrolled, remat=False):
    scanned = unrolled.clone(scan=True)
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))
    stacked = jax.jit(scanned.init, compiler_options=ONCE)(jax.random.key(0), x)
    canonical = layout.to_canonical(stacked)
    own = jax.eval_shape(unrolled.init, jax.random.key(0), x)
    assert jax.tree.structure(canonical) == jax.tree.structure(own)
    jax.tree.map(np.testing.assert_array_equal, layout.to_scanned(canonical), stacked)

    def loss(params, model, stats):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(logits**2), new["batch_stats"]

    def run(model, variables):
        gradient = jax.value_and_grad(loss, has_aux=True)
        return jax.jit(gradient, static_argnums=1, compiler_options=ONCE)(
            variables["params"], model, variables["batch_stats"]
        )

    (want, stats), grads = run(unrolled, canonical)
    for other in (scanned, scanned.clone(remat=True)) if remat else (scanned,):
        (got, other_stats), other_grads = run(other, stacked)
        np.testing.assert_allclose(got, want, rtol=1e-4)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)  # noqa: E731
        jax.tree.map(close, layout.to_canonical(other_stats), stats)
        jax.tree.map(close, layout.to_canonical(other_grads), grads)


def test_bfloat16_computes_in_it_and_answers_in_float32():
    model = create_model("resnet8", dtype="bfloat16")
    # Whole images: only for these does jaxlib 0.11.2 merge the last layers, wrongly.
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(model.init, compiler_options=ONCE)(jax.random.key(0), x)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply, compiler_options=ONCE)(variables, x)
    assert logits.dtype == jnp.float32
    exact = jax.jit(create_model("resnet8").apply, compiler_options=ONCE)(variables, x)
    assert 0 < np.abs(logits - exact).max() < 0.1


@pytest.mark.parametrize("name", ["resnet8", "resnet20_bottleneck"])
def test_zero_init_last_makes_each_block_its_shortcut(name):
    def scales(**options):
        model = create_model(name, **options).clone(stage_sizes=(1, 1), widths=(4, 8))
        params = jax.jit(model.init, compiler_options=ONCE)(
            jax.random.key(0), jnp.zeros((1, 8, 8, 3))
        )["params"]
        return {
            "/".join(p.key for p in path[:-1]): float(leaf.max())
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == "scale"
        }

    last = "bn2" if name == "resnet8" else "bn3"
    assert set(scales().values()) == {1}
    for layer, scale in scales(zero_init_last=True).items():
        assert scale == (0 if layer.endswith(last) and layer.startswith("stage") else 1), layer


@pytest.mark.parametrize(
    "name", ["plain20", "highway20", "resnet20_preact", "resnet56_keras_v2", "resnet164_preact"]
)
def test_zero_init_last_is_refused_where_it_would_do_nothing_or_kill_the_net(name):
    with pytest.raises(UserError, match=f"{name!r} has no branches that end in batch norm"):
        create_model(name, zero_init_last=True)


def test_branches_that_end_in_normalisation_say_so():
    """The block's word against what initialisation does."""
    one_each = {a.block: name for name, a in ARCHITECTURES.items() if a.shortcut in ("A", "B")}
    assert len(one_each) == 8
    for block, name in one_each.items():
        model = create_model(name).clone(stage_sizes=(1,), widths=(4,), zero_init_last=True)
        init = jax.jit(model.init, compiler_options=ONCE)
        params = init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
        scales = [v["scale"] for k, v in params["stage1_block1"].items() if "bn" in k]
        assert any((s == 0).all() for s in scales) == block.ends_in_norm, name


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet21", "resnet20"), ("ResNet56", "resnet56"), ("resnet110_preakt", "resnet110_preact")],
)
def test_an_unknown_name_suggests_a_net_of_its_depth_in_one_line(name, near):
    with pytest.raises(UserError, match=f"did you mean '{near}'") as caught:
        get_architecture(name)
    assert len(str(caught.value)) < 160
