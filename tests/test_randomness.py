"""What is drawn does not depend on global switches."""

import contextlib

import flax
import jax
import numpy as np

from resnet_flax.devices import randomness
from resnet_flax.runs import checkpoint
from resnet_flax.training import augment
from tests.conftest import make_small_config, stop_at_step
from tests.test_models import jit

SWITCHES = {
    "jax_enable_x64": True,
    "jax_threefry_partitionable": False,
    "jax_random_seed_offset": 7,
    "jax_default_prng_impl": "rbg",
    "flax_fix_rng_separator": True,
}


@contextlib.contextmanager
def switched():
    """All switches that change what is drawn, the other way round."""
    with contextlib.ExitStack() as undo:
        for name, value in SWITCHES.items():
            config = flax.config if "flax" in name else jax.config
            undo.callback(config.update, name, getattr(config, name))
            config.update(name, value)
        yield


def test_keys_are_those_of_jax():
    for seed in (0, 1, 2**31 - 1):
        assert randomness.make_key(seed) == jax.random.key(seed, impl="threefry2x32")
        assert jax.jit(randomness.make_key)(seed) == randomness.make_key(seed)


def test_64_bits_draw_the_same():
    def draw():
        key = randomness.make_key(3)
        images = np.arange(2 * 16, dtype=np.float32).reshape(2, 4, 4, 1)
        crops = augment.draw_crops(key, 2, pad=2, flip=True)
        return augment.crop_and_mirror(images, crops, pad=2), augment.color_shift(key, 2)

    with jax.enable_x64(True):
        wide = jit(draw)()
    jax.tree.map(np.testing.assert_array_equal, wide, jit(draw)())
    assert [x.dtype for x in wide] == [np.float32, np.float32]


def test_a_run_is_the_same_whatever_the_switches(tmp_path, compiled_for_once):
    config = make_small_config()
    config.model.survival, config.data.flip = 0.5, True
    stop_at_step(config, tmp_path / "default", 2)
    with switched():
        stop_at_step(config, tmp_path / "switched", 2)
    found = [checkpoint.read(tmp_path / n / "checkpoints/2")[0] for n in ("default", "switched")]
    jax.tree.map(np.testing.assert_array_equal, *found)
