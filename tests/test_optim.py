import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_flax.training import optim

PARAMS = {"conv": {"kernel": np.array([[1.0, -2.0]], np.float32)}, "bn": {"scale": np.float32([3])}}


def constant_rate(rate):
    return optim.scale_by_rate(optax.constant_schedule(rate))


def run(optimizer, params, gradients, errors=None):
    state = optimizer.init(params)
    rates = []
    for i, gradient in enumerate(gradients):
        error = errors[i] if errors else 0.0
        updates, state = optimizer.update(gradient, state, params, error=error)
        params = optax.apply_updates(params, updates)
        rates.append(float(optim.last_rate(state)))
    return params, rates


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_all", [False, True])
def test_sgd_is_coupled_decay_then_momentum_then_rate(nesterov, decay_all):
    rng = np.random.RandomState(0)
    gradients = [
        jax.tree.map(lambda p: rng.randn(*p.shape).astype(np.float32), PARAMS) for _ in range(4)
    ]
    optimizer = optim.sgd(
        constant_rate(0.1),
        momentum=0.9,
        nesterov=nesterov,
        weight_decay=0.01,
        decay_norm_and_bias=decay_all,
    )
    got, _ = run(optimizer, PARAMS, gradients)
    for path, decays in ((("conv", "kernel"), True), (("bn", "scale"), decay_all)):
        p = PARAMS[path[0]][path[1]].astype(np.float64)
        v = np.zeros_like(p)
        for gradient in gradients:
            g = gradient[path[0]][path[1]] + (0.01 * p if decays else 0)
            v = 0.9 * v + g
            p = p - 0.1 * (g + 0.9 * v if nesterov else v)
        np.testing.assert_allclose(got[path[0]][path[1]], p, rtol=1e-5)


def test_piecewise_drops_at_32k_and_48k_iterations():
    schedule = optim.make_schedule(
        "piecewise", learning_rate=0.1, total_steps=64_000, boundaries=(32_000, 48_000)
    )
    for step, rate in ((0, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01), (48_000, 0.001)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-6)


def test_factors_are_of_the_first_rate():
    schedule = optim.make_schedule(
        "piecewise",
        learning_rate=1e-3,
        total_steps=200,
        boundaries=(81, 121, 161, 181),
        decay_factors=(1e-1, 1e-2, 1e-3, 0.5e-3),
    )
    for step, rate in ((0, 1e-3), (80, 1e-3), (81, 1e-4), (121, 1e-5), (161, 1e-6), (199, 5e-7)):
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)


@pytest.mark.parametrize("decay_all", [False, True])
def test_adam_is_its_formula_with_the_decay_in_the_gradient(decay_all):
    rng = np.random.RandomState(0)
    gradients = [
        jax.tree.map(lambda p: rng.randn(*p.shape).astype(np.float32), PARAMS) for _ in range(4)
    ]
    optimizer = optim.adam(
        constant_rate(0.1), momentum=0.8, weight_decay=0.5, decay_norm_and_bias=decay_all
    )
    got, rates = run(optimizer, PARAMS, gradients)
    np.testing.assert_allclose(rates, 0.1, rtol=1e-6)
    for path, decays in ((("conv", "kernel"), True), (("bn", "scale"), decay_all)):
        p = PARAMS[path[0]][path[1]].astype(np.float64)
        m = v = np.zeros_like(p)
        for t, gradient in enumerate(gradients, 1):
            g = gradient[path[0]][path[1]] + (0.5 * p if decays else 0)
            m, v = 0.8 * m + 0.2 * g, 0.999 * v + 0.001 * g**2
            p = p - 0.1 * m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)
        np.testing.assert_allclose(got[path[0]][path[1]], p, rtol=1e-4)


def test_cosine_and_constant():
    cosine = optim.make_schedule("cosine", learning_rate=0.2, total_steps=100)
    np.testing.assert_allclose([cosine(0), cosine(50), cosine(100)], [0.2, 0.1, 0], atol=1e-7)
    constant = optim.make_schedule("constant", learning_rate=0.2, total_steps=100)
    assert constant(99) == 0.2
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        optim.make_schedule("step", learning_rate=0.1, total_steps=1)


def rates_of(steps, errors=None, **options):
    rate = optim.scale_by_rate(optax.constant_schedule(0.1), **options)
    gradients = [PARAMS] * steps
    return run(optim.sgd(rate), PARAMS, gradients, errors)[1]


def test_warm_up_by_steps():
    rates = rates_of(5, warmup_steps=3, warmup_rate=0.01)
    np.testing.assert_allclose(rates, [0.01] * 3 + [0.1] * 2, rtol=1e-6)
    rates = rates_of(5, warmup_steps=3, warmup_rate=0.01, warmup_linear=True)
    np.testing.assert_allclose(rates, [0.01, 0.04, 0.07, 0.1, 0.1], rtol=1e-5)


def test_warm_up_by_error_ends_once_and_for_all():
    # 1.0, falling towards 0.5 with a memory of 50 steps; afterwards the error jumps up again.
    errors = [0.5] * 60 + [1.0] * 200
    rates = rates_of(260, errors, warmup_error=0.8, warmup_rate=0.01)
    smoothed, below = 1.0, None
    for i, error in enumerate(errors):
        smoothed = 0.98 * smoothed + 0.02 * error
        if below is None and smoothed < 0.8:
            below = i
    np.testing.assert_allclose(rates[: below + 1], 0.01, rtol=1e-6)
    np.testing.assert_allclose(rates[below + 1 :], 0.1, rtol=1e-6)
    assert 10 < below < 60


def test_kernels_only_leaves_out_scales_and_biases():
    tree = {"a": {"kernel": 0, "bias": 0}, "b": {"c": {"scale": 0, "kernel": 0}}}
    assert optim.kernels_only(tree) == {
        "a": {"kernel": True, "bias": False},
        "b": {"c": {"scale": False, "kernel": True}},
    }


def test_rate_of_a_step_is_float32_whatever_the_schedule():
    _, state = constant_rate(0.1).update(PARAMS, constant_rate(0.1).init(PARAMS))
    assert state.rate.dtype == jnp.float32
    assert state.count == 1
