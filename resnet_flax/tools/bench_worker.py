"""Measures or compiles one case of `tools.bench`, in a process of its own: prints a JSON object.

python -m resnet_flax.tools.bench_worker CASE [TARGET FOLDER]     (CASE: a `Case` as JSON)

What is timed or compiled is what a training run executes, in the order of its loop.
"""

import dataclasses
import json
import math
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import base_config, flatten, imagenet_config, override
from resnet_flax.data.dataset import Dataset, Split
from resnet_flax.data.streamed import Crops, StreamedSplit
from resnet_flax.devices import cpu, hardware, sharding
from resnet_flax.errors import UserError, did_you_mean, first_line
from resnet_flax.models import count
from resnet_flax.runs import record
from resnet_flax.tools import bench_program, entry
from resnet_flax.training import experiment, feed, seeds
from resnet_flax.training.experiment import Experiment
from resnet_flax.validation import validate

TARGETS = {"h100": "gpu", "v5e": "tpu", "v6e": "tpu"}
"""Devices to compile for, and their platforms."""

# Slices of TPUs by the number of devices.
_SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure, and how."""

    model: str
    batch_size: int  # examples a step, over all devices; 0: the recipe's
    dtype: str = "auto"
    devices: int = 0  # 0: as many as a run would use
    repeats: int = 5  # timings of each thing
    seconds: float = 2.0  # shortest timing
    examples: int = 0  # for training; 0: 50,000, or two batches of ImageNet's size
    eval_examples: int = 0  # 0: 10,000, on a CPU 2,000, or two batches of ImageNet's size
    parts: Sequence[str] = ("train", "eval", "ceiling")
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the config


def make_config(case: Case) -> ConfigDict:
    """The case's configuration, by the paper's recipe for the model's data set.

    Raises:
      UserError: it makes no sense.
    """
    large = models.get_architecture(case.model).image_size > 32
    config = imagenet_config() if large else base_config()
    config.model.name, config.model.dtype = case.model, case.dtype
    config.data.batch_size = case.batch_size or config.data.batch_size
    config.data.workers, config.train.cpu_devices = 0, case.devices
    # The labels are noise: a model that diverges on them would be timed on infinities.
    config.optim.learning_rate = 1e-3
    known = flatten(config)
    for key in case.overrides.keys() - known.keys():
        raise UserError(f"--set={key}: there is no such config key{did_you_mean(key, known)}")
    override(config, case.overrides)
    validate(config)
    return config


class _Decoded(StreamedSplit):
    def example(self, index, random):
        return self.source.images[index], self.source.labels[index]


def make_experiment(case: Case) -> Experiment | seeds.Group:
    """The case's experiment on noise, or several (`train.num_seeds`) in one program.

    Images of CIFAR's size lie on the devices. Larger ones are streamed as in a run, but need no
    decoding.

    Raises:
      UserError: the case makes no sense, or there are too few devices.
    """
    config, architecture = make_config(case), models.get_architecture(case.model)
    mesh = hardware.choose_mesh(config)
    if case.devices > mesh.size:
        raise UserError(f"--devices={case.devices}, but there are {mesh.size}")
    if case.devices:
        mesh = sharding.make_mesh(mesh.devices.flat[: case.devices], config.data.batch_size)
    side, classes = architecture.image_size, architecture.num_classes
    is_resident, on_cpu = side == 32, sharding.platform(mesh) == "cpu"
    random = np.random.default_rng(0)

    def noise(examples, resident, batch_size, central):
        size = examples or (resident if is_resident else 2 * batch_size)
        images = random.integers(0, 256, (size, side, side, 3), np.uint8)
        split = Split(images, random.integers(0, classes, size, np.int32))
        crops = Crops(side, (side, side), central)
        return split if is_resident else _Decoded(split, np.arange(size), crops)

    train = noise(case.examples, 50_000, config.data.batch_size, False)
    test = noise(case.eval_examples, 2_000 if on_cpu else 10_000, config.eval.batch_size, True)
    data = Dataset("noise", train, None, test, tuple(map(str, range(classes))), "", None)
    configs = seeds.member_configs(config)
    if len(configs) > 1:
        return seeds.build(configs, [data] * len(configs), mesh)
    return experiment.build(config, data, mesh)


class Trainer:
    """Chunks of training steps, dispatched and read as `loop.Loop` does."""

    def __init__(self, run: Experiment | seeds.Group):
        """Compiles, and notes how long that took."""
        self._feed, self._step, self.loss = run.train_feed, 0, math.nan
        platform = sharding.platform(run.mesh)
        self.length = feed.chunk_steps(self._feed, run.config.train.chunk_steps, platform)
        self.state = run.create_state()
        chunk = run.make_train_chunk()
        lowered = chunk.lower(*self._arguments())
        begin = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        cpu.limit_kept_memory(self.compiled)

    def _arguments(self):
        batches = self._feed.chunk(self._step, self.length)
        return self.state, self._feed.resident, batches, None

    def run(self, chunks: int) -> float:
        """Seconds a step, over `chunks` chunks; each is dispatched before its predecessor ends."""
        begin, pending = time.perf_counter(), None
        for _ in range(chunks):
            self.state, sums = self.compiled(*self._arguments())
            self._step += self.length
            if pending is not None:
                jax.device_get(pending)
            pending = sums
        self.loss = float(np.mean(jax.device_get(pending)["loss"][-1]))
        jax.block_until_ready(self.state)
        return (time.perf_counter() - begin) / (chunks * self.length)


def _peak_bytes(mesh: Mesh) -> int | None:
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    if peak := max(s.get("peak_bytes_in_use", 0) for s in stats):
        return peak
    # A CPU: of this process. getrusage would count the parent's memory, too.
    status = pathlib.Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
    return 1024 * int(found[1]) if found else None


def _times(repeats: int, function: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return times


def _matmul_rate(mesh: Mesh, dtype: Any, repeats: int) -> float:
    side, products = 1024 if sharding.platform(mesh) == "cpu" else 8192, 10
    shape, where = (mesh.size, side, side), sharding.split(mesh)
    # Random: products of zeros take less power, and can be faster for it.
    draw = jax.jit(lambda key: jax.random.normal(key, shape, dtype), out_shardings=where)
    a, b = (draw(key) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul, out_shardings=where)
    # The first timing compiles.
    times = _times(
        1 + repeats, lambda: jax.block_until_ready([product(a, b) for _ in range(products)])
    )
    return products * 2 * side**3 * mesh.size / min(times[1:])


def measure(case: Case) -> dict[str, Any]:
    """The parts of a case: seconds, or rates a second, of each repeat.

    `xla` is the compiler's own count for the chunk of training steps and a device, as it is: the
    body of a loop once, and nothing for calls of a library such as cuDNN.
    """
    run = make_experiment(case)
    trainer, image = Trainer(run), run.dataset.train.image_shape
    cost, memory = trainer.compiled.cost_analysis() or {}, trainer.compiled.memory_analysis()
    images = run.config.data.batch_size * len(run.members)
    # Three passes. The gradient towards the images is counted too, though nobody computes it.
    multiply_adds = sum(layer.multiply_adds for layer in count.layers(run.model, image[0]))
    operations = 3 * 2 * multiply_adds * images
    found: dict[str, Any] = {
        "environment": record.environment(run.mesh),
        "dtype": str(run.model.dtype),
        "devices": run.mesh.size,
        "chunk_steps": trainer.length,
        "compile_seconds": trainer.compile_seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "step_operations": operations,
        "xla": {key: cost.get(key) for key in ("flops", "bytes accessed")},
    }
    if "train" in case.parts:
        trainer.run(1)
        chunks = math.ceil(case.seconds / trainer.run(1) / trainer.length)
        trainer.run(chunks)
        found["step_seconds"] = [trainer.run(chunks) for _ in range(case.repeats)]
        found["train_images_per_second"] = [images / t for t in found["step_seconds"]]
        found["loss"], found["peak_bytes"] = trainer.loss, _peak_bytes(run.mesh)
    if "eval" in case.parts:
        score, variables = run.make_scorer(), run.evaluated(trainer.state, 0)
        examples = score(variables, run.members[0])["test"].examples
        times = _times(case.repeats, lambda: score(variables, run.members[0]))
        found["eval_images_per_second"] = [examples / t for t in times]
    if "ceiling" in case.parts:
        rate = _matmul_rate(run.mesh, run.model.dtype, case.repeats)
        found["matmul_operations_per_second"] = rate
        if "train" in case.parts:
            found["matmul_share"] = operations / statistics.median(found["step_seconds"]) / rate
    run.close()
    return found


def _devices(target: str, count: int) -> list[Any]:
    if TARGETS[target] == "tpu":
        if count not in _SLICES:
            known = ", ".join(map(str, _SLICES))
            raise UserError(f"--devices={count}: of {target} there can be {known}")
        slice_name = f"{target}:{_SLICES[count]}"
        return list(topologies.get_topology_desc(slice_name, platform="tpu").devices)[:count]
    facts, host = pathlib.Path(__file__).with_name(f"{target}.txtpb").read_text(), f"1x1x{count}"
    there = topologies.get_topology_desc(platform="cuda", target_config=facts, topology=host)
    return list(there.devices)


def lower(here: Experiment, mesh: Mesh, platform: str, steps: int, batch_size: int):
    """The lowered chunk of `steps` training steps of `batch_size` examples, from shapes alone.

    `here` is the experiment on a CPU, with any batch size; the devices of `mesh` need not exist.
    `platform` chooses the model, see `experiment.make_model`.
    """
    run = dataclasses.replace(here, mesh=mesh, model=experiment.make_model(here.config, platform))

    def abstract(tree, where, *first_axes):
        def one(x):
            shape = (*first_axes, *x.shape[len(first_axes) :])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

        return jax.tree.map(one, tree)

    everywhere = sharding.replicated(mesh)
    state = abstract(run.abstract_state(), everywhere)
    resident = abstract(here.train_feed.resident, everywhere)
    batches = abstract(here.train_feed.chunk(0, 1), sharding.split(mesh, 1), steps, batch_size)
    # Pallas asks what it compiles for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return run.make_train_chunk().lower(state, resident, batches, None)


def _compile(case: Case, target: str, folder: str) -> dict[str, Any]:
    # `folder` is where this process's XLA_FLAGS let XLA write its list of launches.
    if case.overrides.get("train.num_seeds", "1") != "1":
        raise UserError("--compile_for compiles one net, not train.num_seeds of them together")
    here, platform = make_experiment(dataclasses.replace(case, devices=1)), TARGETS[target]
    steps = feed.chunk_steps(here.train_feed, here.config.train.chunk_steps, platform)
    try:
        batch_size = here.config.data.batch_size
        mesh = sharding.make_mesh(_devices(target, case.devices), batch_size)
        lowered = lower(here, mesh, platform, steps, batch_size)
        begin = time.perf_counter()
        compiled = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"{target}: {first_line(error)}") from error
    seconds, memory = time.perf_counter() - begin, compiled.memory_analysis()
    here.close()
    pattern = "*train_chunk*.thunk_sequence_after_thunk_passes.txt"
    thunks = "".join(path.read_text() for path in pathlib.Path(folder).glob(pattern))
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": round(seconds, 1),
        **bench_program.count(compiled.as_text(), thunks, platform, steps),
    }


def main(argv: list[str]) -> None:
    """Prints what was found."""
    # As `main` does, before anything large is allocated.
    cpu.keep_freed_memory()
    case = Case(**json.loads(argv[0]))
    print(json.dumps(_compile(case, *argv[1:]) if argv[1:] else measure(case)))


if __name__ == "__main__":
    entry.run(main)
