"""The nets are the paper's, to the last parameter. Numbers: He et al. 2015 and 2016."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES, count, layout, resolve_shortcut
from resnet_flax.models.layers import BatchNorm, relu

# Parameters and multiply-adds (of bottlenecks with the stride in the 1x1). The parameters of all
# nets, with each shortcut, are in the table of docs/nets.md.
TOTALS = {
    "resnet20": (269_722, 40_551_040),
    "resnet32": (464_154, 68_862_592),
    "resnet44": (658_586, 97_174_144),
    "resnet56": (853_018, 125_485_696),
    "resnet110": (1_727_962, 252_887_680),
    "resnet1202": (19_421_274, 2_829_238_912),
    "resnet20_bottleneck": (220_378, 30_591_488),
    "resnet47_bottleneck": (498_586, 70_699_520),
    "resnet164_bottleneck": (1_704_154, 244_500_992),
    "resnet1001_bottleneck": (10_328_602, 1_487_849_984),
}
IMAGE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
# Each program of these tests runs once: compiling it well takes longer than running it badly.
ONCE = {"xla_backend_optimization_level": 0}


def variables_of(model, image=IMAGE):
    # The scanned form has the same variables, stacked, and traces in a moment at any depth.
    return jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), image)


def small(name, sizes=(1, 1), **options):
    """A net that compiles fast; the first block of its second stage changes the shape."""
    model, count = create_model(name, **options), len(sizes)
    widths = model.out_widths and (16, 32)[:count]
    return model.clone(stage_sizes=sizes, widths=(4, 8)[:count], out_widths=widths)


def jit(function, **options):
    return jax.jit(function, compiler_options=ONCE, **options)


def fill(model, x, seed=0):
    """Variables that are all different and matter, for images of the shape of `x`."""
    random = np.random.default_rng(seed)

    def value(path, x):
        size = np.sqrt(2 / np.prod(x.shape[:-1])) if path[-1].key == "kernel" else 0.1
        drawn = size * random.standard_normal(x.shape)
        return np.asarray(1 + drawn if path[-1].key in ("scale", "var") else drawn, x.dtype)

    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(value, abstract)


def totals(name, **options):
    """Parameters and multiply-adds."""
    rows = count.layers(create_model(name, **options), 32)
    return sum(x.parameters for x in rows), sum(x.multiply_adds for x in rows)


@pytest.mark.parametrize("name", TOTALS)
def test_nets_have_the_papers_parameters_and_multiply_adds(name):
    assert totals(name) == TOTALS[name]


def depth_of(name):
    return int("".join(c for c in name.split("_")[0] if c.isdigit()))


def test_weighted_layers_are_the_name_s_number():
    assert {name: net.weighted_layers for name, net in ARCHITECTURES.items()} == {
        name: depth_of(name) for name in ARCHITECTURES
    }


# The shallowest net of each kind.
KINDS = {(a.block, a.shortcut, a.image_size): n for n, a in reversed(ARCHITECTURES.items())}


@pytest.mark.parametrize("name", KINDS.values())
def test_weighted_layers_are_the_kernels_but_for_those_of_shortcuts(name):
    layers = 0
    params = variables_of(create_model(name))["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [p.key for p in path]
        if keys[-1] == "kernel" and not {"proj_conv", "gate_conv"} & set(keys):
            layers += leaf.shape[0] if keys[0].endswith("_rest") else 1
        # No convolution has a bias but the gates and those of the Keras nets.
        if keys[-1] == "bias" and keys[-2] != "gate_conv" and "keras" not in name:
            assert "conv" not in keys[-2]
    assert layers == depth_of(name)


def test_stride_in_the_3x3_costs_more_and_keeps_the_parameters():
    plain, wide = (totals("resnet47_bottleneck", stride_in_3x3=x) for x in (False, True))
    # Two first 1x1 convolutions work on four times the pixels.
    extra = 3 * (64 * 32 * 16 * 16 + 128 * 64 * 8 * 8)
    assert wide == (plain[0], plain[1] + extra)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_20", {}, "did you mean 'resnet20'.*summary --list"),
        ("resnet21", {}, "did you mean 'resnet20'"),
        ("ResNet56", {}, "did you mean 'resnet56'"),
        ("resnet110_preakt", {}, "did you mean 'resnet110_preact'"),
        ("resnet20", {"shortcut": "D"}, "known: A, B, C"),
        ("plain20", {"shortcut": "B"}, "plain and has no shortcuts.*'resnet20'"),
        ("highway32", {"shortcut": "A"}, "'highway32' has shortcuts of its own"),
        ("resnet110_conv_shortcut", {"shortcut": "C"}, "shortcuts of its own"),
        ("resnet20_keras_v1", {"shortcut": "A"}, "shortcuts of its own"),
        ("resnet20", {"num_classes": -1}, "num_classes=-1"),
        ("resnet20", {"dtype": "float33"}, "unknown dtype 'float33'"),
        ("resnet20", {"dtype": "int32"}, "unknown dtype 'int32'"),
        (20, {}, "unknown model 20"),
        ("resnet20", {"survival": 0}, "survival=0 must be above 0"),
        ("plain20", {"survival": 0.5}, "'plain20' has plain layers"),
        ("highway20", {"survival": 0.5}, "'highway20' has plain layers"),
        *(
            (name, {"zero_init_last": True}, f"{name!r} has no branches that end in batch norm")
            for name in ("plain20", "highway20", "resnet20_preact", "resnet56_keras_v2")
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line_that_helps(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        create_model(name, **options)
    assert len(str(caught.value)) < 160


def test_an_option_that_is_none_is_a_type_error():
    with pytest.raises(TypeError, match="surprise"):
        create_model("resnet20", surprise=1)


def test_default_shortcuts_are_the_papers():
    assert resolve_shortcut("resnet110", None) == "A"
    assert resolve_shortcut("plain20", "auto") == "none"
    assert resolve_shortcut("resnet47_bottleneck", "auto") == "B"
    assert resolve_shortcut("resnet110_preact", "auto") == "B"
    assert resolve_shortcut("resnet110_preact", "A") == "A"


@pytest.mark.parametrize("name", ["resnet20_preact", "resnet47_preact"])
def test_the_first_preactivation_block_activates_before_it_splits(name):
    """[I, Appendix]: "the first activation right after conv1 and before splitting"."""
    model = small(name, (1,))
    x = -np.ones((1, 8, 8, 3), np.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: np.ones(v.shape, v.dtype), abstract)
    # With its last convolution at zero a block is its shortcut: of the activated input, which is
    # max(0, -27) in the middle of the picture.
    first = variables["params"]["stage1_block1"]
    first[max(k for k in first if k.startswith("conv"))]["kernel"] *= 0
    if "proj_conv" in first:
        first["proj_conv"]["kernel"] = np.ones_like(first["proj_conv"]["kernel"])
    _, found = jit(functools.partial(model.apply, capture_intermediates=True))(variables, x)
    found = found["intermediates"]
    assert float(found["stem_conv"]["__call__"][0][0, 4, 4, 0]) == -27
    np.testing.assert_allclose(found["stage1_block1"]["__call__"][0][0, 4, 4], 0, atol=1e-6)


def reference_conv(x, kernel, stride):
    """A convolution written out: zero padding by 1 on every side."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((-(-x.shape[0] // stride), -(-x.shape[1] // stride), kernel.shape[-1]))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            window = padded[i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[i, j] = np.einsum("hwc,hwcd->d", window, kernel)
    return out


def norm(p, s, x, epsilon=1e-5):
    return (x - s["mean"]) / np.sqrt(s["var"] + epsilon) * p["scale"] + p["bias"]


def numpy_net(params, stats, x, plain):
    """An independent forward pass in evaluation mode, from the paper's text."""
    x = reference_conv(x, params["stem_conv"]["kernel"], 1)
    x = np.maximum(norm(params["stem_bn"], stats["stem_bn"], x), 0)
    for stage in (1, 2):
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
    model = small("plain20" if plain else "resnet20")
    x = np.random.RandomState(0).randn(1, 6, 8, 3).astype(np.float32)
    variables = fill(model, x)
    want = numpy_net(variables["params"], variables["batch_stats"], x[0], plain)
    got = jit(model.apply)(variables, x)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_initialisation_is_he_normal_and_not_truncated():
    model = create_model("resnet20").clone(stage_sizes=(1,), widths=(64,))
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
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
    variables = fill(norm.clone(train=False), x)
    variables["params"] = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
    variables["batch_stats"] = {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}
    got, new = jit(functools.partial(norm.apply, mutable=["batch_stats"]))(variables, x)
    parts = np.split(x.astype(np.float64), 4 // (group or 4))
    means = np.array([p.mean(axis=(0, 1, 2)) for p in parts])
    variances = np.array([p.var(axis=(0, 1, 2)) for p in parts])
    want = [(p - m) / np.sqrt(v + 1e-5) for p, m, v in zip(parts, means, variances, strict=True)]
    np.testing.assert_allclose(got, np.concatenate(want), atol=2e-4)
    stats = new["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.25 * means.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * variances.mean(axis=0), rtol=1e-4)


@pytest.mark.parametrize(
    ("mean", "error", "group"), [(0, 1e-6, None), (10, 1e-5, 16), (1000, 1e-3, 16)]
)
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

    got, got_x = jit(jax.grad(loss, argnums=(0, 1)))(params, x)
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

    def normalise(x):
        return norm.apply(variables, x, mutable=["batch_stats"])

    def outputs(x):
        y, new = normalise(x)
        return relu(y), new["batch_stats"]

    def along(t):
        return jnp.sum(jnp.sin(normalise(x + t * direction)[0]))

    @jit
    def run():
        ahead = jax.jvp(outputs, (x,), (direction,))
        _, pull = jax.vjp(outputs, x)
        slope = jax.grad(along)
        return ahead, pull(ahead[0]), slope(1e-2), slope(-1e-2), jax.grad(slope)(0.0)

    ((y, stats), (dy, dstats)), (back,), above, below, curvature = run()
    ahead = np.vdot(y, dy) + sum(np.vdot(stats[k], dstats[k]) for k in stats)
    assert ahead == pytest.approx(np.vdot(back, direction), rel=1e-4)
    # Twice as well: the curvature along a line, against differences of the slope.
    assert float(curvature) == pytest.approx(float(above - below) / 2e-2, rel=2e-2)


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


def run_once(model, variables, x, **options):
    """Output, new statistics, and the gradients of a training step's parameters and images."""

    def loss(params, x):
        out, new = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"], **options
        )
        # Each number has a weight of its own.
        parts = [y * jnp.cos(jnp.arange(y.size)).reshape(y.shape) for y in jax.tree.leaves(out)]
        return sum(map(jnp.sum, parts)), (out, new)

    return jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], x)


def distance(one, other):
    """How far the arrays are from their counterparts, at most, in parts of their size."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    found = [0.0]
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # A bias before a normalisation has no gradient but rounding.
        found.append(np.linalg.norm(a - b) / max(np.linalg.norm(a), 0.1))
    return max(found)


@pytest.mark.parametrize(
    ("name", "options", "remat"),
    [
        ("resnet20", {"survival": 0.5}, True),
        ("resnet110_dropout_shortcut", {}, False),
        pytest.param("resnet20", {}, False, marks=pytest.mark.slow),
        *(
            pytest.param(name, {}, True, marks=pytest.mark.slow)
            for name in (
                "resnet20_preact highway20 resnet110_exclusive_gating resnet110_relu_only_preact "
                "resnet20_keras_v1 resnet56_keras_v2"
            ).split()
        ),
    ],
)
def test_scanned_and_unrolled_agree_with_and_without_remat(name, options, remat):
    unrolled = small(name, (3,), **options)
    x = np.random.default_rng(2).standard_normal((4, 6, 6, 3), np.float32)
    canonical = fill(unrolled, x)
    stacked = layout.to_scanned(canonical)
    jax.tree.map(np.testing.assert_array_equal, layout.to_canonical(stacked), canonical)
    scanned = unrolled.clone(scan=True, remat=remat)
    own = jax.eval_shape(scanned.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, stacked)
    want, found = run_once(unrolled, canonical, x), run_once(scanned, stacked, x)
    assert distance(want, layout.to_canonical(found)) < 1e-3


def test_shapes_alone_have_both_layouts_too():
    abstract = variables_of(small("resnet20", (3, 1)))
    canonical = layout.to_canonical(abstract)
    assert set(canonical["params"]) == {
        "stem_conv", "stem_bn", "head", "stage2_block1", *(f"stage1_block{i}" for i in (1, 2, 3))
    }  # fmt: skip
    assert jax.eval_shape(layout.to_scanned, canonical) == abstract


def test_bfloat16_computes_in_it_and_answers_in_float32():
    model = create_model("resnet8", dtype="bfloat16")
    # Whole images and nets: for these alone does jaxlib 0.11.2 merge the last layers, wrongly.
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    variables = fill(model, x)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jit(model.apply)(variables, x)
    assert logits.dtype == jnp.float32
    exact = jit(create_model("resnet8").apply)(variables, x)
    assert 0 < np.abs(logits - exact).max() < 0.1


# A net for each block.
BLOCKS = {a.block: name for name, a in ARCHITECTURES.items() if a.shortcut in ("A", "B", "bare")}


@pytest.mark.parametrize("name", BLOCKS.values())
def test_zero_init_last_is_for_the_normalisation_right_before_the_addition(name):
    # Past the refusal, where there is none.
    model = small(name).clone(zero_init_last=True)
    zeros, last = set(), {}

    def note(next_fun, args, kwargs, context):
        module = context.module
        if isinstance(module, BatchNorm):
            if module.scale_init is nn.initializers.zeros:
                zeros.add(module.path)
            if module.name.startswith("bn"):
                last[module.path[0]] = module.path
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    assert zeros == (set(last.values()) if ARCHITECTURES[name].block.ends_in_norm else set())
