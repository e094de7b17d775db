"""Measures a case of `tools.bench` in a process of its own: a configuration, and noise for data.

python -m resnet_flax.tools.bench_measure CASE     (a `Case` as JSON) prints a JSON object.
"""

import dataclasses
import json
import math
import pathlib
import re
import statistics
import time
import timeit
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import base_config, override, validate
from resnet_flax.data.dataset import Dataset, Split
from resnet_flax.data.streaming import Geometry, StreamedSplit
from resnet_flax.devices import cpu, hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.models import count
from resnet_flax.runs import environment
from resnet_flax.tools import entry
from resnet_flax.training import feed, seeds, setup
from resnet_flax.training.setup import Setup

PARTS = "train", "eval", "ceiling"
"""What can be measured; "ceiling" is the rate of a product of large matrices."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure."""

    model: str
    batch_size: int  # examples a step, over all devices; 0: the recipe's
    dtype: str = "auto"
    devices: int = 0  # 0: as many as a run would use
    repeats: int = 5  # timings of each thing
    seconds: float = 2.0  # shortest timing
    examples: int = 0  # 0: 50,000, or two batches of ImageNet's size
    parts: Sequence[str] = PARTS
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the config


def make_config(case: Case) -> ConfigDict:
    """The case's configuration, by the paper's recipe for the model's data set."""
    config = base_config()
    if models.get_architecture(case.model).image_size > 32:
        config.data.update(name="imagenet2012", batch_size=256, pad=0, color=True)
    config.model.name, config.model.dtype = case.model, case.dtype
    config.data.batch_size = case.batch_size or config.data.batch_size
    config.data.workers, config.train.cpu_devices = 0, case.devices
    # The labels are noise: a model that diverges on them would be timed on infinities.
    config.optim.learning_rate = 1e-3
    override(config, case.overrides)
    validate(config)
    return config


class _Decoded(StreamedSplit):
    def example(self, index, random):
        return self.source.images[index], self.source.labels[index]


def _noise(case: Case, batch_size: int, most_tests: int) -> Dataset:
    """Training examples, and the first of them to test.

    Images of CIFAR's size lie on the devices. Larger ones are streamed, but need no decoding.
    """
    architecture = models.get_architecture(case.model)
    side, classes = architecture.image_size, architecture.num_classes
    is_resident = side == 32
    size = case.examples or (50_000 if is_resident else 2 * batch_size)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, side, side, 3), np.uint8)
    labels = random.integers(0, classes, size, np.int32)
    train, test = Split(images, labels), Split(images[:most_tests], labels[:most_tests])
    if not is_resident:
        geometry = Geometry(side, (side, side), side, side)
        train, test = (
            _Decoded(split, np.arange(len(split)), geometry, central)
            for split, central in ((train, False), (test, True))
        )
    return Dataset("noise", train, None, test, tuple(map(str, range(classes))), "")


def make_setups(case: Case) -> list[Setup]:
    """The case's setup on noise, one for each seed (`train.num_seeds`).

    Raises:
      UserError: there are not as many devices.
    """
    config = make_config(case)
    mesh = hardware.choose_mesh(config)
    if case.devices > mesh.size:
        raise UserError(f"--devices={case.devices}, but there are {mesh.size}")
    if case.devices:
        mesh = sharding.make_mesh(mesh.devices.flat[: case.devices], config.data.batch_size)
    most_tests = 2_000 if sharding.platform(mesh) == "cpu" else 10_000
    data = _noise(case, config.data.batch_size, most_tests)
    configs = [one for one, _ in seeds.split(config, pathlib.Path())]
    put, meshes = feed.put_once(), seeds.meshes(mesh, len(configs))
    return [setup.build(c, data, m, put=put) for c, m in zip(configs, meshes, strict=True)]


class Trainer:
    """Chunks of training steps, dispatched and read as `loop.Loop` does."""

    def __init__(self, setups: Sequence[Setup]):
        """Compiles the programs, and measures how long that takes."""
        self._setups, self._step, self.loss = setups, 0, math.nan
        first, self._groups = setups[0], seeds.programs([s.mesh for s in setups])
        self.length = feed.chunk_steps(
            first.train_feed, first.config.train.chunk_steps, sharding.platform(first.mesh)
        )
        self.states = [s.create_state() for s in setups]
        self.programs = {}  # by mesh
        self.compile_seconds = 0.0
        for group in self._groups:
            one = setups[group[0]]
            if one.mesh not in self.programs:
                chunk = one.make_train_chunk(several=len(group) > 1)
                lowered = chunk.lower(*self._arguments(group))
                begin = time.perf_counter()
                self.programs[one.mesh] = lowered.compile()
                self.compile_seconds += time.perf_counter() - begin
                cpu.limit_kept_memory(self.programs[one.mesh])

    def _arguments(self, group: Sequence[int]):
        feeds = [self._setups[i].train_feed for i in group]
        batches = [f.chunk(self._step, self.length) for f in feeds]
        return [self.states[i] for i in group], [f.resident for f in feeds], batches

    def _dispatch(self) -> list[Any]:
        found = []
        for group in self._groups:
            program = self.programs[self._setups[group[0]].mesh]
            states, sums = program(*self._arguments(group))
            for i, state in zip(group, states, strict=True):
                self.states[i] = state
            found += sums
        self._step += self.length
        return found

    def run(self, chunks: int) -> float:
        """Seconds a step, over `chunks` chunks; each is dispatched before its predecessor ends."""
        begin, pending = time.perf_counter(), None
        for _ in range(chunks):
            before, pending = pending, self._dispatch()
            if before is not None:
                jax.device_get(before)
        self.loss = float(np.mean([sums["loss"][-1] for sums in jax.device_get(pending)]))
        jax.block_until_ready(self.states)
        return (time.perf_counter() - begin) / (chunks * self.length)


def _peak_bytes(mesh: Mesh) -> int | None:
    stats = [device.memory_stats() or {} for device in mesh.devices.flat]
    if peak := max(s.get("peak_bytes_in_use", 0) for s in stats):
        return peak
    # A CPU: of this process. getrusage would count the parent's memory, too.
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def _matmul_rate(mesh: Mesh, dtype: Any, repeats: int) -> float:
    side, products = 1024 if sharding.platform(mesh) == "cpu" else 8192, 10
    shape, where = (mesh.size, side, side), sharding.split(mesh)
    # Random: products of zeros take less power, and can be faster for it.
    draw = jax.jit(lambda key: jax.random.normal(key, shape, dtype), out_shardings=where)
    a, b = (draw(key) for key in jax.random.split(jax.random.key(0)))
    product = jax.jit(jnp.matmul, out_shardings=where)

    def multiply():
        jax.block_until_ready([product(a, b) for _ in range(products)])

    multiply()  # compiles
    seconds = min(timeit.repeat(multiply, number=1, repeat=repeats))
    return products * 2 * side**3 * mesh.size / seconds


def measure(case: Case) -> dict[str, Any]:
    """The parts of a case: times in seconds and rates a second, a list of one for each repeat."""
    setups = make_setups(case)
    run, trainer = setups[0], Trainer(setups)
    memory = next(iter(trainer.programs.values())).memory_analysis()
    side, images = run.dataset.train.image_shape[0], case.batch_size * len(setups)
    # Three passes. The gradient towards the images is counted too, though nobody computes it.
    multiply_adds = sum(layer.multiply_adds for layer in count.layers(run.model, side))
    operations = 3 * 2 * multiply_adds * images
    found: dict[str, Any] = {
        "environment": environment.describe(run.mesh),
        "dtype": str(run.model.dtype),
        "devices": len({device for s in setups for device in s.mesh.devices.flat}),
        "chunk_steps": trainer.length,
        "compile_seconds": trainer.compile_seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "step_operations": operations,
    }
    if "train" in case.parts:
        trainer.run(1)
        chunks = math.ceil(case.seconds / trainer.run(1) / trainer.length)
        trainer.run(chunks)
        found["step_seconds"] = [trainer.run(chunks) for _ in range(case.repeats)]
        found["train_images_per_second"] = [images / t for t in found["step_seconds"]]
        found["loss"], found["peak_bytes"] = trainer.loss, _peak_bytes(run.mesh)
    if "eval" in case.parts:
        variables = trainer.states[0].evaluated()
        examples = run.score(variables)["test"].examples
        times = timeit.repeat(lambda: run.score(variables), number=1, repeat=case.repeats)
        found["eval_images_per_second"] = [examples / t for t in times]
    if "ceiling" in case.parts:
        rate = _matmul_rate(run.mesh, run.model.dtype, case.repeats)
        found["matmul_operations_per_second"] = rate
        if "train" in case.parts:
            found["matmul_share"] = operations / statistics.median(found["step_seconds"]) / rate
    for s in setups:
        s.close()
    return found


def main(argv: list[str]) -> None:
    """Measures the case."""
    cpu.keep_freed_memory()  # as a run does, before anything large is allocated
    print(json.dumps(measure(Case(**json.loads(argv[0])))))


if __name__ == "__main__":
    entry.run(main)
