import jax
import numpy as np
import optax
import pytest

from resnet_flax.training import optim

PARAMS = {"conv": {"kernel": np.array([[1.0, -2.0]], np.float32)}, "bn": {"scale": np.float32([3])}}


def constant_rate(rate, **options):
    return optim.scale_by_rate(optax.constant_schedule(rate), **options)


def run(optimizer, gradients, errors=None):
    params, state, rates = PARAMS, optimizer.init(PARAMS), []
    for gradient, error in zip(gradients, errors or [0.0] * len(gradients), strict=True):
        updates, state = optimizer.update(gradient, state, params, error=error)
        params = optax.apply_updates(params, updates)
        rates.append(float(optim.last_rate(state)))
        assert optim.last_rate(state).dtype == np.float32
    return params, rates


def sgd(p, gradients, decay, momentum, nesterov=False):
    v = 0
    for gradient in gradients:
        g = gradient + decay * p
        v = momentum * v + g
        p = p - 0.1 * (g + momentum * v if nesterov else v)
    return p


def adam(p, gradients, decay, momentum):
    m = v = 0
    for t, gradient in enumerate(gradients, 1):
        g = gradient + decay * p
        m, v = momentum * m + (1 - momentum) * g, 0.999 * v + 0.001 * g**2
        p = p - 0.1 * m / (1 - momentum**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)
    return p


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize(
    ("name", "formula", "options"),
    [("sgd", sgd, {}), ("sgd", sgd, {"nesterov": True}), ("adam", adam, {})],
)
def test_optimizers_are_their_formulas_with_the_decay_in_the_gradient(
    name, formula, options, decay_all
):
    rng = np.random.RandomState(0)
    gradients = [
        jax.tree.map(lambda p: rng.randn(*p.shape).astype(np.float32), PARAMS) for _ in range(4)
    ]
    optimizer = getattr(optim, name)(
        constant_rate(0.1), momentum=0.8, weight_decay=0.5, decay_norm_and_bias=decay_all, **options
    )
    got, rates = run(optimizer, gradients)
    np.testing.assert_allclose(rates, 0.1, rtol=1e-6)
    for a, b, decay in (("conv", "kernel", 0.5), ("bn", "scale", 0.5 * decay_all)):
        own = [gradient[a][b] for gradient in gradients]
        expected = formula(PARAMS[a][b].astype(np.float64), own, decay, 0.8, **options)
        np.testing.assert_allclose(got[a][b], expected, rtol=1e-4)


def test_schedules():
    def check(kind, rates, **options):
        schedule = optim.make_schedule(kind, learning_rate=0.1, total_steps=64_000, **options)
        for step, rate in rates.items():
            np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-8)

    rates = {0: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001}
    check("piecewise", rates, boundaries=(32_000, 48_000))
    rates = {0: 0.1, 80: 0.1, 81: 1e-2, 121: 1e-3, 161: 1e-4, 199: 5e-5}
    boundaries, factors = (81, 121, 161, 181), (1e-1, 1e-2, 1e-3, 0.5e-3)
    check("piecewise", rates, boundaries=boundaries, decay_factors=factors)
    check("cosine", {0: 0.1, 32_000: 0.05, 64_000: 0})
    check("constant", {0: 0.1, 63_999: 0.1})
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        optim.make_schedule("step", learning_rate=0.1, total_steps=1)


def test_warm_up_by_steps():
    for linear, expected in ((False, [0.01] * 3 + [0.1] * 2), (True, [0.01, 0.04, 0.07, 0.1, 0.1])):
        rate = constant_rate(0.1, warmup_steps=3, warmup_rate=0.01, warmup_linear=linear)
        np.testing.assert_allclose(run(optim.sgd(rate), [PARAMS] * 5)[1], expected, rtol=1e-5)


def test_warm_up_by_error_ends_once_and_for_all():
    # 1.0, falling towards 0.5 with a memory of 50 steps; afterwards the error jumps up again.
    errors = [0.5] * 60 + [1.0] * 200
    rate = constant_rate(0.1, warmup_error=0.8, warmup_rate=0.01)
    rates = run(optim.sgd(rate), [PARAMS] * 260, errors)[1]
    smoothed, length = 1.0, 0
    while smoothed >= 0.8:
        smoothed = 0.98 * smoothed + 0.02 * errors[length]
        length += 1
    assert 10 < length < 60
    np.testing.assert_allclose(rates, [0.01] * length + [0.1] * (260 - length), rtol=1e-6)
