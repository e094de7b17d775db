"""Optimizers and learning-rate schedules, as optax transformations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

# Share of the smoothed training error kept at each step: a mean over about 50 steps.
_ERROR_MEMORY = 0.98


def make_schedule(
    kind: str,
    *,
    learning_rate: float,
    total_steps: int,
    boundaries: tuple[int, ...] = (),
    decay_factor: float = 0.1,
    decay_factors: tuple[float, ...] = (),
) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0.

    "piecewise" multiplies `learning_rate` by `decay_factor` at each boundary [R §4.2], or by one of
    `decay_factors` after each; "cosine" is half a cosine from it to 0 at `total_steps`; the third
    kind is "constant".
    """
    if kind == "piecewise" and decay_factors:
        rates = [learning_rate * factor for factor in (1.0, *decay_factors)]
        return optax.join_schedules([optax.constant_schedule(r) for r in rates], boundaries)
    if kind == "piecewise":
        scales = dict.fromkeys(boundaries, decay_factor)
        return optax.piecewise_constant_schedule(learning_rate, scales)
    if kind == "cosine":
        return optax.cosine_decay_schedule(learning_rate, total_steps)
    if kind == "constant":
        return optax.constant_schedule(learning_rate)
    raise ValueError(f"unknown schedule {kind!r}")


class RateState(NamedTuple):
    """State of `scale_by_rate`: all scalars."""

    count: jax.Array  # int32, updates so far
    error: jax.Array  # float32, smoothed training error
    warming: jax.Array  # bool, whether the warm-up by error goes on
    rate: jax.Array  # float32, learning rate of the last update


def scale_by_rate(
    schedule: optax.Schedule,
    *,
    warmup_steps: int = 0,
    warmup_error: float = 0.0,
    warmup_rate: float = 0.01,
    warmup_linear: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate, which may warm up first.

    The warm-up lasts until the smoothed training error is below `warmup_error` or, if that is 0,
    for `warmup_steps`; it stays at `warmup_rate` or, with `warmup_linear`, rises from there. The
    schedule counts from step 0 either way. `update` takes the batch's error, 0 to 1, as `error`.

    The paper trains its 110-layer net at 0.01 until the training error is below 80 % (about 400
    iterations), then at 0.1 [R §4.2]: `warmup_error=0.8`, or [I] `warmup_steps=400`.
    """

    def init(_: Any) -> RateState:
        return RateState(
            count=jnp.zeros((), jnp.int32),
            error=jnp.ones((), jnp.float32),
            warming=jnp.asarray(warmup_error > 0),
            rate=jnp.zeros((), jnp.float32),
        )

    def update(updates, state, params=None, *, error=0.0, **extra):
        del params, extra
        count = state.count.astype(jnp.float32)
        rate = jnp.asarray(schedule(count), jnp.float32)
        if warmup_error > 0:
            rate = jnp.where(state.warming, warmup_rate, rate)
        elif warmup_steps > 0 and warmup_linear:
            share = jnp.minimum(count / warmup_steps, 1.0)
            rate = warmup_rate + share * (rate - warmup_rate)
        elif warmup_steps > 0:
            rate = jnp.where(count < warmup_steps, warmup_rate, rate)
        smoothed = _ERROR_MEMORY * state.error + (1 - _ERROR_MEMORY) * error
        new = RateState(
            count=state.count + 1,
            error=smoothed.astype(jnp.float32),
            warming=state.warming & (smoothed >= warmup_error),
            rate=rate,
        )
        return jax.tree.map(lambda u: -rate * u, updates), new

    return optax.GradientTransformationExtraArgs(init, update)


def kernels_only(params: Any) -> Any:
    """A mask: true for kernels, false for batch-norm scales and all biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _decay(weight_decay: float, everything: bool) -> optax.GradientTransformation:
    return optax.add_decayed_weights(weight_decay, None if everything else kernels_only)


def sgd(
    rate: optax.GradientTransformation,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    decay_norm_and_bias: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent with momentum and coupled weight decay [R §4.2].

    g = gradient + weight_decay * p;  v = momentum * v + g;  p = p - rate * v
    (Nesterov: p = p - rate * (g + momentum * v)).

    `rate` is a `scale_by_rate`. Every parameter decays, as in the paper's text, or kernels only.
    """
    decay = _decay(weight_decay, decay_norm_and_bias)
    return optax.chain(decay, optax.trace(momentum, nesterov), rate)


def adam(
    rate: optax.GradientTransformation,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) with coupled weight decay; arguments as in `sgd`.

    The decay is part of the gradient before its moments are taken (L2 regularisation, unlike
    AdamW's). `momentum` is b1; b2 is 0.999, and 1e-7, as in Keras, is added to the root.
    """
    scale = optax.scale_by_adam(b1=momentum, eps=1e-7)

    def update(updates, state, params=None):
        # optax raises a decay to a whole number of steps, which strict promotion would refuse.
        with jax.numpy_dtype_promotion("standard"):
            return scale.update(updates, state, params)

    moments = optax.GradientTransformation(scale.init, update)
    return optax.chain(_decay(weight_decay, decay_norm_and_bias), moments, rate)


def last_rate(opt_state: Any) -> jax.Array:
    """The learning rate of the last update, float32 scalar, from the state of `sgd` or `adam`."""
    return opt_state[-1].rate
