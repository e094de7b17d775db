"""Checks `models.fused` on this machine's device: python -m tests.benchmarks.kernel_check

Compares each layer of a CIFAR net at a batch of 128 (on a CPU 2, interpreted) with XLA's
convolution in float32: values and gradients must agree to bfloat16's rounding, and be the same to
the bit when computed twice. Else the exit status is 1.
"""

import functools
import sys

import jax
import jax.numpy as jnp

from resnet_flax.models import deferred, fused

# (side, channels, outputs, strides, with a shortcut)
LAYERS = [
    (32, 16, 16, 1, False), (32, 16, 16, 1, True), (32, 16, 32, 2, True), (16, 32, 32, 1, True),
    (16, 32, 64, 2, False), (8, 64, 64, 1, True),
]  # fmt: skip
# Of the norm: bfloat16 has 8 bits, and a gradient is rounded several times.
_TOLERANCE = 0.01


def _layer(own, strides, groups, y, shortcut, scale, bias, kernel):
    x = deferred.Normalized(y, deferred.sums(y, groups), scale, bias, 1e-5, shortcut, True)
    if own:
        out = fused.convolve(x, kernel, strides)
        return x.computed, out.y, out.sums
    value = x.compute()
    y = jax.lax.conv_general_dilated(
        value.astype(jnp.float32),
        kernel.astype(jnp.float32),
        (strides, strides),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    return value, y, deferred.sums(y, groups)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _both_ways(own, strides, groups, arguments, gradients):
    out, pull = jax.vjp(functools.partial(_layer, own, strides, groups), *arguments)
    return out, pull(jax.tree.map(lambda g, o: g.astype(o.dtype), gradients, out))


def check(side, channels, outputs, strides, with_shortcut, batch, groups=2):
    """The largest error of a layer, relative to the norm, and whether two results are equal."""
    keys = iter(jax.random.split(jax.random.key(side + channels), 9))

    def draw(*shape, dtype=jnp.bfloat16):
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    image = (batch, side, side, channels)
    arguments = (
        draw(*image),
        draw(*image) if with_shortcut else None,
        1 + draw(channels, dtype=jnp.float32) / 10,
        draw(channels, dtype=jnp.float32),
        (draw(3, 3, channels, outputs, dtype=jnp.float32) / 12).astype(jnp.bfloat16),
    )
    below = (batch, side // strides, side // strides, outputs)
    sums = tuple(draw(groups, outputs, dtype=jnp.float32) / 100 for _ in range(2))
    gradients = draw(*image), draw(*below), sums
    first, second = (_both_ways(True, strides, groups, arguments, gradients) for _ in range(2))
    plain = _both_ways(False, strides, groups, arguments, gradients)

    def error(ours, theirs):
        ours, theirs = (x.astype(jnp.float32) for x in (ours, theirs))
        return float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))

    same = all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), first, second)))
    return max(jax.tree.leaves(jax.tree.map(error, first, plain))), same


def main():
    """Prints a line for each layer."""
    on_cpu = jax.default_backend() == "cpu"
    print(jax.devices()[0].device_kind, flush=True)
    failed = False
    for layer in LAYERS:
        error, same = check(*layer, batch=2 if on_cpu else 128)
        failed |= not same or not error < _TOLERANCE
        twice = "the same twice" if same else "NOT THE SAME"
        print(layer, f"off by {error:.5f}", twice, flush=True)
    sys.exit("WRONG" if failed else None)


if __name__ == "__main__":
    main()
