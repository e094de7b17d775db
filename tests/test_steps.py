"""The compiled functions: chunks, devices, evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax import create_model
from resnet_flax.data.dataset import Split
from resnet_flax.devices.hardware import check_memory, compiler_options, cpu, sharding
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.training import augment, evaluate, optim, state, steps
from resnet_flax.training.feed import ResidentFeed
from tests.test_models import ONCE, jit

SHAPE = (8, 8, 3)


def make_data(count=64, classes=10, seed=0):
    rng = np.random.RandomState(seed)
    labels = rng.randint(0, classes, count).astype(np.int32)
    # Each class has its own mean image: something can be learned.
    means = rng.randint(40, 216, (classes, *SHAPE))
    noise = rng.randint(-40, 40, (count, *SHAPE))
    return (means[labels] + noise).astype(np.uint8), labels


# Compiles quickly.
SMALL = create_model("resnet8").clone(stage_sizes=(1, 1), widths=(8, 16))
TINY = SMALL.clone(stage_sizes=(1,), widths=(8,))


@functools.cache
def shared(devices):
    """A `Setup` whose compiled functions several tests use."""
    return Setup(devices, ema_decay=0.75)


def make_rate(value=0.05, **options):
    return optim.scale_by_rate(optax.constant_schedule(value), **options)


SGD = optim.sgd(make_rate())


@functools.cache
def first_state(model, optimizer, seed, ema):
    """On the host."""
    create = functools.partial(state.create_state, model, optimizer, seed=seed, ema=ema)
    return jax.device_get(state.place(lambda: create(), None))


class Setup:
    """A net and data on some devices; `options` are those of `make_train_chunk`."""

    def __init__(self, devices=1, model=SMALL, optimizer=SGD, batch=16, **options):
        self.mesh = sharding.make_mesh(jax.devices()[:devices], batch)
        self.model, self.batch, self.optimizer = model, batch, optimizer
        self.everywhere = sharding.replicated(self.mesh)
        self.by_row = sharding.split(self.mesh, 1)
        by_batch = sharding.split(self.mesh)
        defaults = {"pad": 2, "flip": True, "label_smoothing": 0.0, "ema_decay": 0.0}
        options = defaults | {"compiler_options": ONCE} | options
        self.chunk = steps.make_train_chunk(
            self.model, self.optimizer, sharding=by_batch, **options
        )
        self.ema = options["ema_decay"] > 0
        self.eval_chunk = steps.make_eval_chunk(self.model, sharding=by_batch)
        self.statistics = steps.make_batch_statistics(
            self.model, sharding=by_batch, pad=0, flip=False
        )
        self.feed = self.put(*make_data())
        self.resident = self.feed.resident

    def put(self, images, labels):
        mean, std = np.full(SHAPE, 128, np.float32), np.full(1, 64, np.float32)
        split = Split(images, labels)
        return ResidentFeed(split, mean, std, seed=7, mesh=self.mesh, batch_size=self.batch)

    def state(self, seed=0):
        # What these choose is not in the variables.
        model = self.model.clone(bn_group_size=None, cpu_convolutions=False, defer=False)
        first = first_state(model, self.optimizer, seed, self.ema)
        # Copies: a step donates its state.
        return jax.device_put(jax.tree.map(np.copy, first), self.everywhere)

    def train(self, current, index):
        rows = sharding.put(index, self.by_row)
        (after,), (sums,) = self.chunk([current], [self.resident], [rows])
        return after, sums


def batches(count, batch=16):
    rng = np.random.RandomState(1)
    return np.stack([rng.permutation(64)[:batch] for _ in range(count)]).astype(np.int32)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def run(setup, steps):
    """Losses, and parameters and statistics, of single steps on one batch."""
    current, losses = setup.state(), []
    for _ in range(steps):
        current, sums = setup.train(current, batches(1))
        losses.append(float(sums["loss"][0]))
    return losses, jax.device_get((current.params, current.batch_stats))


def assert_same_run(one, other):
    assert_close(one, other, rtol=2e-3, atol=2e-4)
    # The first step differs by rounding only: same examples, same crops, same global statistics.
    np.testing.assert_allclose(one[0][0], other[0][0], rtol=1e-5)


def test_a_chunk_of_steps_equals_single_steps():
    setup = shared(1)
    index = batches(3)
    chunked, sums = setup.train(setup.state(), index)
    single, parts = setup.state(), []
    for row in index:
        single, part = setup.train(single, row[None])
        parts.append(part)
    assert int(single.step) == int(chunked.step) == 3
    assert_close(jax.device_get(single), jax.device_get(chunked), rtol=2e-4, atol=2e-5)
    together = {k: np.concatenate([p[k] for p in parts]) for k in sums}
    assert_close(together, jax.device_get(sums), rtol=1e-4)


def test_eight_devices_equal_one_and_draw_the_same_crops():
    assert_same_run(*(run(shared(devices), 6) for devices in (1, 8)))


def test_a_chunk_is_traced_once():
    setup = shared(1)
    current, _ = setup.train(setup.state(), batches(1))
    traced = setup.chunk._cache_size()
    for _ in range(2):
        current, _ = setup.train(current, batches(1))
    assert setup.chunk._cache_size() == traced


def test_what_is_fast_on_a_cpu_computes_the_same():
    kernels = compiler_options("cpu")
    assert kernels, "this XLA has lost the option; see hardware.py"
    model, options = SMALL.clone(cpu_convolutions=True), {"ema_decay": 0.75}
    fast = Setup(2, model, compiler_options=kernels, **options)
    assert_same_run(run(shared(1), 4), run(fast, 4))


def compile_sort():
    return jax.jit(lambda x: jnp.sort(jnp.sin(x) @ x)).lower(jnp.ones((64, 64))).compile()


@pytest.mark.parametrize(("has", "kept"), [(6, True), (5, False)])
def test_freed_memory_is_kept_where_there_is_room(has, kept, monkeypatch):
    compiled = compile_sort()
    need = compiled.memory_analysis().temp_size_in_bytes * jax.local_device_count()
    assert need > 0
    monkeypatch.setattr(cpu, "memory_bytes", lambda: has * need)
    said = []
    monkeypatch.setattr(cpu, "keep_freed_memory", said.append)
    cpu.limit_kept_memory(compiled)
    assert said == ([] if kept else [False])


def test_a_step_that_cannot_fit_is_refused(monkeypatch):
    compiled = compile_sort()
    m = compiled.memory_analysis()
    need = m.temp_size_in_bytes + m.argument_size_in_bytes + m.output_size_in_bytes
    monkeypatch.setattr(cpu, "memory_bytes", lambda: need * jax.local_device_count())
    check_memory(compiled, 128)
    monkeypatch.setattr(cpu, "memory_bytes", lambda: need * jax.local_device_count() - 1)
    with pytest.raises(UserError, match=r"needs 0\.0 GB of memory, .*batch_size=128"):
        check_memory(compiled, 128)


def test_groups_of_batch_norm_are_the_same_whatever_the_devices():
    # A group is two devices' examples, then half of one's.
    model = SMALL.clone(bn_group_size=4)
    grouped = [Setup(devices, model, ema_decay=0.75) for devices in (8, 2)]
    eight, two, ungrouped = (run(setup, 1)[0] for setup in (*grouped, shared(1)))
    np.testing.assert_allclose(eight, two, rtol=1e-5)
    assert abs(ungrouped[0] - eight[0]) > 1e-3


def test_one_batch_can_be_learned_by_heart():
    losses, _ = run(Setup(pad=0, ema_decay=0.75), 60)
    assert losses[-1] < 0.02


def test_first_step_is_golden():
    """Recorded once, from the code that the checks against numpy in this suite vouch for."""
    setup = Setup(model=create_model("resnet8"))
    current, sums = setup.train(setup.state(), batches(1))
    norm = jit(optax.tree.norm)(current.params)
    got = [float(sums["loss"][0]), float(sums["error"][0]), norm]
    np.testing.assert_allclose(got, [3.160926, 0.9375, 27.328737], rtol=1e-4)


def test_first_loss_and_update_equal_a_plain_computation():
    """The step against the same mathematics written without the package's step."""
    optimizer = optim.sgd(make_rate(warmup_steps=1, warmup_rate=0.03))
    setup = Setup(1, TINY, optimizer, pad=0, flip=False, label_smoothing=0.1)
    before = jax.device_get(setup.state())
    index = batches(1)
    images, labels = make_data()
    x = (images[index[0]].astype(np.float32) - 128) / 64

    def loss(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        logits, _ = setup.model.apply(variables, x, train=True, mutable=["batch_stats"])
        log_p = jax.nn.log_softmax(logits)
        own = log_p[jnp.arange(16), labels[index[0]]]
        return -jnp.mean(0.9 * own + 0.1 * log_p.mean(axis=1))

    want, grads = jax.device_get(jit(jax.value_and_grad(loss))(before.params))
    after, sums = setup.train(setup.state(), index)
    np.testing.assert_allclose(sums["loss"][0], want, rtol=1e-5)
    np.testing.assert_allclose(sums["rate"][0], 0.03, rtol=1e-6)
    expected = jax.tree.map(lambda p, g: p - 0.03 * (g + 1e-4 * p), before.params, grads)
    assert_close(jax.device_get(after.params), expected, rtol=1e-4, atol=1e-5)


def test_a_lost_net_is_noticed_even_where_its_loss_is_finite():
    setup = shared(1)
    current = setup.state()
    kernel = current.params["stem_conv"]["kernel"]
    current.params["stem_conv"]["kernel"] = kernel.at[0, 0, 0, 0].set(jnp.nan)
    _, sums = setup.train(current, batches(1))
    assert np.isnan(sums["loss"][0])


def test_averaged_weights_follow_their_formula():
    setup = shared(1)
    start = jax.device_get(setup.state())
    after, _ = setup.train(setup.state(), batches(1))
    want = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start.params, after.params)
    assert_close(jax.device_get(after.ema["params"]), jax.device_get(want), rtol=1e-5, atol=1e-6)
    assert after.evaluated() is after.ema


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (10, 8), (1000, 8)])
def test_every_example_is_scored_once_whatever_the_batch(batch_size, devices):
    setup = shared(devices)
    count = 43
    images, labels = make_data(count)
    feed = setup.put(images, labels)
    variables = setup.state().evaluated()
    score = evaluate.evaluate(setup.eval_chunk, variables, feed, batch_size=batch_size)
    x = (images.astype(np.float32) - 128) / 64
    logits = np.asarray(jit(setup.model.apply)(jax.device_get(variables), x))
    log_p = np.asarray(jax.nn.log_softmax(logits))
    assert score.examples == count
    assert score.wrong == int(np.sum(logits.argmax(axis=1) != labels))
    likeliest = logits.argsort(axis=1)[:, -5:]
    assert score.top5_wrong == int(np.sum(np.all(likeliest != labels[:, None], axis=1)))
    assert 0 < score.top5_wrong < score.wrong
    assert score.unreadable == 0
    np.testing.assert_allclose(score.loss, -log_p[np.arange(count), labels].mean(), rtol=1e-4)
    for k in range(10):
        if np.any(labels == k):
            want = np.mean(logits.argmax(axis=1)[labels == k] != k)
            np.testing.assert_allclose(score.class_errors()[k], want)


def test_several_evaluation_batches_in_one_dispatch_equal_one_by_one():
    setup = shared(1)
    variables = setup.state().evaluated()
    index = np.concatenate([np.arange(64), np.full(8, -1)]).astype(np.int32).reshape(3, 24)
    together = setup.eval_chunk(variables, setup.resident, index)
    parts = [setup.eval_chunk(variables, setup.resident, row[None]) for row in index]
    assert together["confusion"].sum() == 64
    np.testing.assert_array_equal(together["confusion"], sum(p["confusion"] for p in parts))
    np.testing.assert_allclose(together["loss"], sum(p["loss"] for p in parts), rtol=1e-5)


def test_reestimated_statistics_are_averages_over_training_batches():
    setup = shared(1)
    variables = setup.state().evaluated()
    got = evaluate.reestimate_statistics(
        setup.statistics, variables, setup.feed, examples=64, batch_size=16
    )
    assert got["params"] is variables["params"]
    # The stem's statistics can be had by hand: mean of its convolution over all the images.
    images, _ = make_data()
    x = (images.astype(np.float32) - 128) / 64
    kernel = variables["params"]["stem_conv"]["kernel"]
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    want = np.asarray(y).mean(axis=(0, 1, 2))
    stem = got["batch_stats"]["stem_bn"]
    np.testing.assert_allclose(stem["mean"], want, rtol=1e-3, atol=1e-5)


def test_initial_state_does_not_depend_on_layout_or_devices():
    model = TINY.clone(stage_sizes=(3,))

    def first(devices, model, seed):
        create = functools.partial(state.create_state, model, SGD, seed=seed, ema=False)
        everywhere = sharding.replicated(sharding.make_mesh(jax.devices()[:devices], 8))
        return state.place(lambda: create(), everywhere).evaluated()

    one, other = first(1, model, 3), first(8, model.clone(scan=True), 3)
    assert "stage1_rest" in other["params"]
    jax.tree.map(np.testing.assert_array_equal, one, layout.to_canonical(other))
    stems = [v["params"]["stem_conv"]["kernel"] for v in (one, first(1, model, 4))]
    assert not np.array_equal(*stems)


STRICT = (
    "resnet8 resnet20_bottleneck resnet47_preact highway20 resnet56_keras_v2 "
    "resnet110_exclusive_gating resnet110_shortcut_gating resnet110_dropout_shortcut "
    "resnet110_relu_only_preact"
).split()


@pytest.fixture
def strict():
    """No axis and no dtype is made up: users may set this for their own programs."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("name", STRICT)
def test_strict_promotion_nets(name, strict):
    def step(key, x):
        variables = None
        for options in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "defer": True}):
            model = create_model(name, **options).clone(
                stage_sizes=(1, 1), widths=(4, 8), out_widths=None
            )
            variables = variables or model.init(key, x)
            model.apply(variables, x)

            def total(params, model=model, stats=variables["batch_stats"]):
                options = {"train": True, "mutable": ["batch_stats"], "rngs": {"drop": key}}
                return model.apply({"params": params, "batch_stats": stats}, x, **options)[0].sum()

            jax.grad(total)(variables["params"])

    jax.eval_shape(step, jax.random.key(0), jnp.zeros((2, *SHAPE)))


def test_strict_promotion_training_and_evaluation(strict):
    optimizer = optim.sgd(make_rate(warmup_steps=2, warmup_linear=True))
    setup = Setup(1, SMALL, optimizer, ema_decay=0.5, compiler_options=None)
    images = jnp.zeros((2, 9, 9, 3), jnp.uint8)
    resident = {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}

    def everything():
        first = state.create_state(SMALL, setup.optimizer, seed=0, ema=True)
        index = jnp.asarray(batches(1))
        (trained,), _ = setup.chunk([first], [setup.resident], [index])
        setup.eval_chunk(trained.evaluated(), setup.resident, index)
        setup.statistics(trained.evaluated(), setup.resident, index[0], np.int32(0))
        steps.make_predict(SMALL, ten_crops=8)(trained.evaluated(), images, resident)
        for kind in ("piecewise", "cosine", "constant"):
            schedule = optim.make_schedule(
                kind, learning_rate=0.1, total_steps=9, boundaries=(3, 6)
            )
            rate = optim.scale_by_rate(schedule, warmup_steps=2)
            rate.update({}, rate.init({}))
        adam = optim.adam(rate, momentum=0.9, weight_decay=1e-4)
        params = {"kernel": jnp.ones((2, 2))}
        adam.update(params, adam.init(params), params)
        augment.color_shift(jax.random.key(0), 2)

    jax.eval_shape(everything)
