"""Random numbers that depend on the seed alone, whatever JAX's and Flax's switches."""

import contextlib
from collections.abc import Iterator

import flax
import jax
import jax.numpy as jnp


def make_key(seed: int | jax.Array) -> jax.Array:
    """The typed threefry key of `seed`, 0 to 2**32 - 1, which may be traced.

    `jax.random.key` follows JAX_DEFAULT_PRNG_IMPL and JAX_RANDOM_SEED_OFFSET; this does not.
    """
    return jax.random.wrap_key_data(jnp.array([0, seed], jnp.uint32), impl="threefry2x32")


@contextlib.contextmanager
def default_switches() -> Iterator[None]:
    """Resets, inside, every switch that changes what is drawn from a key. Also a decorator."""
    with (
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        flax.config.temp_flip_flag("fix_rng_separator", False),
    ):
        yield
