"""The same training step written several ways: the processes of `side_by_side`.

python -m tests.benchmarks.variants VARIANT MODEL BATCH PLATFORM

All are the CIFAR net of [R §4.2] with option A and basic blocks, SGD with momentum 0.9 and weight
decay 1e-4 on every parameter, cross-entropy. What all but this package's own lack is its data
pipeline: they are handed float32 batches that lie on the device already, while its step picks,
crops, mirrors and normalises uint8 images from the whole data set itself.

float32 means what each framework's convolutions make of it: on recent NVIDIA GPUs both use TF32.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable

from tests.benchmarks.pytorch_step import BATCHES, DECAY, MOMENTUM, RATE


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to write the step.

    Attributes:
      kind: "flax", "ours" or "torch".
      dtype: of activations.
      platforms: where it exists.
      options: of it.
    """

    kind: str
    dtype: str
    platforms: tuple[str, ...] = ("cpu", "gpu")
    options: tuple[str, ...] = ()


def _torch(dtype, *options, platforms=("cpu", "gpu")):
    return Variant("torch", dtype, platforms, options)


# "compiled" and what follows are channels-last too; "CUDA graphs" is torch.compile's mode
# "reduce-overhead", "whole-step graph" one CUDA graph of a compiled net's forwards, backwards and
# update.
VARIANTS = {
    "usual Flax float32": Variant("flax", "float32"),
    "usual Flax bfloat16": Variant("flax", "bfloat16"),
    "this package float32 on one device": Variant("ours", "float32", ("cpu",), ("one device",)),
    "this package float32": Variant("ours", "float32"),
    "this package bfloat16": Variant("ours", "bfloat16"),
    "this package bfloat16 with kernels": Variant("ours", "bfloat16", ("gpu",), ("kernels",)),
    # With models/cpu_convolution.py or not: each platform's runs do what is not named here.
    "this package float32 without CPU convolutions": Variant(
        "ours", "float32", ("cpu",), ("never",)
    ),
    "this package float32 with CPU convolutions": Variant("ours", "float32", ("gpu",), ("always",)),
    "this package bfloat16 with CPU convolutions": Variant(
        "ours", "bfloat16", ("gpu",), ("always",)
    ),
    "PyTorch float32": _torch("float32"),
    "PyTorch float32 channels-last": _torch("float32", "channels-last"),
    "PyTorch bfloat16 channels-last": _torch("bfloat16", "channels-last"),
} | {
    f"PyTorch {dtype} {name}": _torch(dtype, "channels-last", name, platforms=platforms)
    for dtype in ("float32", "bfloat16")
    for name, platforms in (
        ("compiled", ("cpu", "gpu")),
        ("CUDA graphs", ("gpu",)),
        ("whole-step graph", ("gpu",)),
    )
}


@dataclasses.dataclass
class Built:
    """A variant, ready to run.

    Attributes:
      run: from a number of steps to the last loss; waits for it.
      parameters: how many are trained.
      about: versions and hardware.
      unit: steps that it does at once.
    """

    run: Callable[[int], float]
    parameters: int
    about: dict
    unit: int = 1


def depth_of(name: str) -> int:
    """The n of `resnet<n>`.

    Raises:
      ValueError: it is none of these nets.
    """
    digits = name.removeprefix("resnet")
    if not digits.isdigit() or int(digits) % 6 != 2 or int(digits) < 8:
        raise ValueError(f"--model={name} must be resnet<6n+2>, for example resnet20")
    return int(digits)


def usual_flax(name: str, batch: int, dtype: str) -> Built:
    """An ordinary linen net and optax step, one device, nothing tuned."""
    import flax
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    depth, dtype = depth_of(name), jnp.dtype(dtype)

    def norm(train):
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)

    def conv(filters, strides=1):
        return nn.Conv(filters, (3, 3), strides, padding=1, use_bias=False, dtype=dtype)

    class Block(nn.Module):
        filters: int
        strides: int

        @nn.compact
        def __call__(self, x, train):
            y = nn.relu(norm(train)(conv(self.filters, self.strides)(x)))
            y = norm(train)(conv(self.filters)(y))
            if self.strides > 1:
                x = x[:, ::2, ::2]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.filters // 2)))
            return nn.relu(x + y)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.relu(norm(train)(conv(16)(x)))
            for stage in range(3):
                for block in range((depth - 2) // 6):
                    x = Block(16 * 2**stage, 2 if stage and not block else 1)(x, train)
            return nn.Dense(10)(x.mean(axis=(1, 2)).astype(jnp.float32))

    net = Net()
    optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))
    random = np.random.default_rng(0)
    images = [
        jax.device_put(random.standard_normal((batch, 32, 32, 3), np.float32))
        for _ in range(BATCHES)
    ]
    labels = [jax.device_put(random.integers(0, 10, batch)) for _ in range(BATCHES)]
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), images[0], False)
    state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])

    @jax.jit
    def step(state, x, y):
        params, stats, opt_state = state

        def loss_fn(params):
            logits, new = net.apply(
                {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, new["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    def run(steps):
        nonlocal state
        for i in range(steps):
            state, loss = step(state, images[i % BATCHES], labels[i % BATCHES])
        jax.block_until_ready(state)
        return float(loss)

    parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
    about = {"jax": jax.__version__, "flax": flax.__version__}
    return Built(run, parameters, about)


def this_package(name: str, batch: int, dtype: str, options: tuple[str, ...]) -> Built:
    """What a training run executes, on the number of devices that it chooses."""
    import jax

    from resnet_flax.runs import environment
    from resnet_flax.tools import bench_worker

    devices = 1 if "one device" in options else 0
    how = next((option for option in options if option in ("always", "never")), "auto")
    overrides = {"model.cpu_convolutions": how}
    if "kernels" in options:
        overrides["model.kernels"] = "always"
    case = bench_worker.Case(name, batch, dtype, devices, overrides=overrides)
    run = bench_worker.make_experiment(case)
    about = environment.describe(run.mesh)
    trainer = bench_worker.Trainer(run)

    def steps(count):
        trainer.run(count // trainer.length)
        return trainer.loss

    parameters = sum(x.size for x in jax.tree.leaves(run.abstract_state().params))
    about["devices"] = run.mesh.size
    return Built(steps, parameters, about, trainer.length)


def _touch(variant: Variant, platform: str) -> str | None:
    """Loads the framework and its device; says what is missing."""
    if variant.kind == "torch":
        try:
            import torch
        except ImportError:
            return "PyTorch is not installed"
        if platform == "gpu":
            if not torch.cuda.is_available():
                return f"PyTorch {torch.__version__} sees no GPU"
            torch.zeros(1, device="cuda")
        return None
    # As `main` does, before anything large is allocated.
    from resnet_flax.devices import cpu

    if variant.kind == "ours":
        cpu.keep_freed_memory()
    if platform == "gpu":
        import jax

        jax.devices()
    return None


def _build(variant: Variant, name: str, batch: int, platform: str) -> Built:
    if variant.kind == "flax":
        return usual_flax(name, batch, variant.dtype)
    if variant.kind == "ours":
        return this_package(name, batch, variant.dtype, variant.options)
    from tests.benchmarks import pytorch_step

    device = "cuda" if platform == "gpu" else "cpu"
    return Built(*pytorch_step.make(depth_of(name), batch, variant.dtype, variant.options, device))


def main(name: str, model: str, batch: str, platform: str) -> None:
    """Answers each line of input, a number of steps (0: get ready), with a JSON object."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    variant, built = VARIANTS[name], None
    if reason := _touch(variant, platform):
        return answer(cannot=reason)
    answer(loaded=True)
    for line in sys.stdin:
        begin, steps = time.perf_counter(), int(line)
        if built is None:
            built = _build(variant, model, int(batch), platform)
            built.run(math.ceil(5 / built.unit) * built.unit)
            start_seconds = time.perf_counter() - begin
            count, took = built.unit, 0.0
            while took < 0.2:
                begin = time.perf_counter()
                built.run(count)
                took = time.perf_counter() - begin
                each, count = took / count, 2 * count
            answer(
                unit=built.unit,
                parameters=built.parameters,
                about=built.about,
                start_seconds=start_seconds,
                step_seconds=each,
            )
            continue
        loss = built.run(steps)
        answer(seconds=time.perf_counter() - begin, steps=steps, loss=loss)


if __name__ == "__main__":
    main(*sys.argv[1:])
