import atexit
import dataclasses
import fcntl
import functools
import json
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
from resnet_flax.devices import cpu

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()  # Counted now: a test that asks for fewer must not decide for all after it.

ROOT = pathlib.Path(__file__).parent.parent

# The files that take longest, longest first: pytest-xdist gives a file at a time to a worker, and
# one that begins last would be waited for by all the others.
LONG = """
    test_distributed test_train test_seeds test_steps test_folder faults/test_disk faults/test_stop
    test_docs test_cli test_packing test_models test_variants test_notebook test_convert
    test_convert_torch test_cpu_convolution test_fused test_stochastic_depth test_randomness
    test_launch_tpu test_fitting test_pretrained test_deferred test_augment test_outputs test_export
    test_wheel test_config
""".split()


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {f"tests/{name}.py": i for i, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(LONG)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores: tests of several processes wait now and then."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return len(cpu.describe_cores()["cores"]) + 1


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
    """Trains until `step`, where a SIGTERM ends it; 0: before anything is compiled."""
    from resnet_flax.training import loop, train

    begin, original = loop.Loop.run, loop.Loop._train

    def beginning(self):
        if step == 0:
            self.stop_signal = signal.SIGTERM
        return begin(self)

    def stopping(self, turn):
        original(self, turn)
        if self.step >= step:
            self.stop_signal = signal.SIGTERM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "run", beginning)
        patch.setattr(loop.Loop, "_train", stopping)
        return train.train(config, directory, **options)


@pytest.fixture(scope="module")
def compiled_for_once():
    """Training steps in this process compile fast, and run slower."""
    from resnet_flax.devices import hardware

    usual = hardware.compiler_options

    def options(platform, **how):
        return (usual(platform, **how) or {}) | {"xla_backend_optimization_level": 0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "compiler_options", options)
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A function from a number of devices to a finished run that nothing has happened to.

    One for all tests and workers: nobody may change it. Its directory was given as a relative path.
    """
    from tests.faults import harness

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # That of all workers.

    @functools.cache
    def get(devices=2):
        run = harness.Run(folder / "undisturbed" / f"devices{devices}", devices)
        run.directory.parent.mkdir(exist_ok=True)
        said = run.directory.with_suffix(".json")
        with open(run.directory.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not said.exists():
                outcome = run.finish(f"--workdir={os.path.relpath(run.directory, ROOT)}")
                outcome.assert_finished()
                said.write_text(json.dumps(dataclasses.asdict(outcome)))
        run.outcome = harness.Outcome(**json.loads(said.read_text()))
        return run

    return get
