import atexit
import os
import pathlib
import shutil
import signal
import tempfile

# Before jax counts its devices: some tests compare eight devices with one.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)
# Many tests compile the same program, some in processes of their own: compile it once a session.
# The processes that pytest-xdist starts inherit the first one's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.mkdtemp(prefix="resnet_flax_tests_")
    atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(CACHE, "programs")
    os.environ["RESNET_FLAX_CACHE"] = os.path.join(CACHE, "kept")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

# A job in the background is started with these ignored, and would hand that on to the processes
# that some tests start and then send signals to.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(
            number,
            signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
        )

import jax
import pytest

from resnet_flax.config import base_config

jax.config.update("jax_num_cpu_devices", 8)

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def root():
    return ROOT


def make_small_config():
    """A run of seconds: 8 layers on the digits, 12 steps of 16, one device."""
    config = base_config()
    config.model.name = "resnet8"
    config.data.name = "digits"
    config.data.batch_size = 16
    config.data.flip = False
    config.optim.boundaries_steps = (6, 9)
    config.train.total_steps = 12
    config.train.cpu_devices = 1
    config.eval.every_steps = 4
    config.eval.batch_size = 128
    config.checkpoint.every_steps = 4
    config.log.every_steps = 2
    config.log.tensorboard = False
    return config


@pytest.fixture
def small_config():
    return make_small_config()


def stop_at_step(config, directory, step, **options):
    """Trains until `step`, where a SIGTERM ends it."""
    from resnet_flax import loop, train

    original = loop.Loop._train

    def stopping(self):
        original(self)
        if self.step >= step:
            self.stop_signal = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_train", stopping)
        return train.train(config, directory, **options)
