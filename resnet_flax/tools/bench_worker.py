"""Measures one case of `tools.bench` in this process, which it has for itself.

python -m resnet_flax.tools.bench_worker JSON      (see `Case`; prints one JSON object)

Everything that is timed is what a training run executes: `experiment.build`, its train chunk and
scorer, its feed, the same number of steps a dispatch, in the order of `loop.Loop`.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import base_config, imagenet_config, override, validate
from resnet_flax.data.dataset import Dataset, Split
from resnet_flax.devices import cpu, hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.models import count
from resnet_flax.runs import record
from resnet_flax.tools import bench_limits, entry
from resnet_flax.training import experiment, feed, seeds
from resnet_flax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Case:
    """What to measure, and how.

    Attributes:
      model: name of a net.
      batch_size: examples a step, over all devices.
      dtype: of activations: "float32", "bfloat16"; "auto": bfloat16 off the CPU.
      devices: number of them; 0: as a run would choose.
      repeats: timings of each thing.
      seconds: least length of one.
      steps: instead, least number of training steps of one; 0: by `seconds`.
      examples: training images; 0: 50,000, or of ImageNet's size two batches.
      eval_examples: test images; 0: 10,000, on a CPU 2,000; or of ImageNet's size two batches.
      parts: of "train", "eval", "ceilings", or "first_step" alone.
      overrides: further changes of the configuration, as text, by key.
      started: `time.time()` when the process was asked for, for "first_step".
    """

    model: str
    batch_size: int
    dtype: str = "auto"
    devices: int = 0
    repeats: int = 5
    seconds: float = 2.0
    steps: int = 0
    examples: int = 0
    eval_examples: int = 0
    parts: tuple[str, ...] = ("train", "eval", "ceilings")
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    started: float = 0.0


def make_config(case: Case) -> ConfigDict:
    """The case's configuration.

    Raises:
      UserError: it makes no sense.
    """
    large = models.get_architecture(case.model).image_size > 32
    config = imagenet_config() if large else base_config()
    config.model.name, config.model.dtype = case.model, case.dtype
    config.data.batch_size, config.train.cpu_devices = case.batch_size, case.devices
    # Labels are noise: a net that runs away from them would be measured on infinities.
    config.optim.learning_rate = 1e-3
    override(config, case.overrides)
    validate(config)
    return config


def _mesh(case: Case, config: ConfigDict) -> Mesh:
    mesh = hardware.choose_mesh(config)
    if not case.devices or mesh.size == case.devices:
        return mesh
    if mesh.size < case.devices:
        raise UserError(f"--devices={case.devices}, but there are {len(jax.devices())}")
    return sharding.make_mesh(jax.devices()[: case.devices], config.data.batch_size)


def make_experiment(case: Case) -> Experiment | seeds.Group:
    """The case's experiment, on noise of the size of the net's data set.

    Where the case sets `train.num_seeds`: so many in one program.

    Images of CIFAR's size lie on the devices. Larger ones come from the host's memory batch by
    batch, as in a run, but decoded already.
    """
    config = make_config(case)
    mesh = _mesh(case, config)
    architecture = models.get_architecture(case.model)
    side, classes = architecture.image_size, architecture.num_classes
    is_resident = side == 32
    on_cpu = sharding.platform(mesh) == "cpu"
    train_size = case.examples or (50_000 if is_resident else 2 * case.batch_size)
    test_size = case.eval_examples or (2_000 if on_cpu else 10_000)
    if not is_resident:
        test_size = case.eval_examples or 2 * config.eval.batch_size
    random = np.random.default_rng(0)

    def noise(size):
        images = random.integers(0, 256, (size, side, side, 3), np.uint8)
        return Split(images, random.integers(0, classes, size, np.int32))

    names = tuple(map(str, range(classes)))
    data = Dataset("noise", noise(train_size), None, noise(test_size), names, "", None)
    configs = seeds.member_configs(config)
    if len(configs) > 1:
        return seeds.build(configs, [data] * len(configs), mesh)
    run = experiment.build(config, data, mesh)
    if not is_resident:
        # Before their first use: both are cached properties.
        rest = {k: run.train_feed.resident[k] for k in ("mean", "std", "key")}
        vars(run).update(
            train_feed=HostFeed(data.train, rest, mesh, case.batch_size),
            eval_feeds={"test": HostFeed(data.test, rest, mesh, config.eval.batch_size)},
        )
    return run


class HostFeed:
    """Stands in for `feed.StreamedFeed` with images that need no decoding, again and again."""

    default_chunk = 1

    def __init__(self, split, resident: dict[str, Any], mesh: Mesh, batch_size: int):
        """Begins nothing; `split` is in memory, `resident` as in `steps`, without images."""
        self.size, self.resident = len(split), resident
        self._split, self._mesh, self._batch = split, mesh, batch_size

    def _put(self, positions) -> dict[str, Any]:
        labels = np.where(positions < 0, -1, self._split.labels[positions])
        arrays = {"images": self._split.images[positions], "labels": labels}
        by_batch = sharding.split(self._mesh, 1)
        return {name: sharding.put(value[None], by_batch) for name, value in arrays.items()}

    def chunk(self, step: int, count: int) -> dict[str, Any]:
        """One step's examples; `count` must be 1."""
        if count != 1:
            raise ValueError(f"{count} steps a dispatch, streamed images go one by one")
        return self._put((step * self._batch + np.arange(self._batch)) % self.size)

    def batches(self, batch_size: int):
        """Every example once."""
        for row in feed.padded_rows(self.size, batch_size, self._mesh.size):
            yield self._put(row)

    def close(self) -> None:
        """Nothing to end."""


class Trainer:
    """Chunks of training steps, dispatched and read as `loop.Loop` does."""

    def __init__(self, run: Experiment | seeds.Group):
        """Compiles, and notes how long that took."""
        self._feed, self._step = run.train_feed, 0
        platform = sharding.platform(run.mesh)
        self.length = feed.chunk_steps(self._feed, run.config.train.chunk_steps, platform)
        self.state = run.create_state()
        chunk = run.make_train_chunk()
        begin = time.perf_counter()
        lowered = chunk.lower(*self._arguments())
        self.trace_seconds = time.perf_counter() - begin
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin - self.trace_seconds
        cpu.limit_kept_memory(self.compiled)
        self.loss = math.nan

    def _arguments(self):
        batches = self._feed.chunk(self._step, self.length)
        return self.state, self._feed.resident, batches, None

    def run(self, chunks: int) -> float:
        """Seconds a step, over `chunks` chunks; the only waiting is for a chunk's predecessor."""
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


def measure(case: Case) -> dict[str, Any]:
    """All of the case's parts but "first_step"; keys as in the code."""
    run = make_experiment(case)
    environment = record.environment(run.mesh)
    environment.pop("command")
    forward = sum(
        x.multiply_adds for x in count.layers(run.model, run.dataset.train.image_shape[0])
    )
    platform = sharding.platform(run.mesh)
    found: dict[str, Any] = {
        "environment": environment,
        "platform": platform,
        "devices": run.mesh.size,
        "seeds": len(run.members),
        "dtype": str(run.model.dtype),
        "scanned": run.model.scan,
        "layers": models.get_architecture(case.model).weighted_layers,
        "multiply_adds": forward,
    }
    trainer = Trainer(run)
    found["chunk_steps"] = trainer.length
    found["trace_seconds"] = trainer.trace_seconds
    found["compile_seconds"] = trainer.compile_seconds
    found["program"] = bench_limits.program(
        trainer.compiled, getattr(run.train_feed.resident.get("images"), "nbytes", 0)
    )
    if "train" in case.parts:
        trainer.run(1)
        step = trainer.run(1)
        chunks = math.ceil((case.steps or case.seconds / step) / trainer.length)
        trainer.run(chunks)
        found["steps"] = chunks * trainer.length
        found["step_seconds"] = [trainer.run(chunks) for _ in range(case.repeats)]
        found["loss"] = trainer.loss
        found["train_memory"] = bench_limits.peak_memory(run.mesh)
    if "eval" in case.parts:
        variables, member = run.evaluated(trainer.state, 0), run.members[0]
        score = functools.partial(run.make_scorer(), run=member)
        examples = score(variables)["test"].examples
        times = []
        for _ in range(case.repeats):
            begin = time.perf_counter()
            score(variables)
            times.append(time.perf_counter() - begin)
        found["eval_examples"], found["eval_batch_size"] = examples, run.config.eval.batch_size
        found["eval_seconds"] = times
        found["eval_memory"] = bench_limits.peak_memory(run.mesh)
    if "ceilings" in case.parts:
        found["ceilings"] = bench_limits.ceilings(
            run.mesh, run.model.dtype, repeats=case.repeats, seconds=case.seconds
        )
    return found


def first_step(case: Case) -> dict[str, float]:
    """Seconds from the asking for this process to the first results on the host, and on the way."""
    moments = {}

    def note(name):
        moments[name] = time.time() - case.started

    note("imported")
    run = make_experiment(case)
    note("data")
    trainer = Trainer(run)
    note("compiled")
    trainer.run(1)
    note("first_chunk")
    return {**moments, "trace": trainer.trace_seconds, "compile": trainer.compile_seconds}


def main(argv: list[str]) -> None:
    """Prints what was measured."""
    # As `main` does, before anything large is allocated.
    cpu.keep_freed_memory()
    case = json.loads(argv[0])
    case = Case(**{**case, "parts": tuple(case.get("parts", ("train", "eval", "ceilings")))})
    print(json.dumps(first_step(case) if "first_step" in case.parts else measure(case)))


if __name__ == "__main__":
    entry.run(main)
