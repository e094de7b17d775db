"""Times a training step against the same net written the usual Flax way, in turns.

    python tests/benchmarks/train_step.py --model=resnet20 --rounds=10

Each variant lives in a process of its own, all at once but only one of them working at a time, so
that a change of the machine's speed meets all alike. Data lie in memory; the usual way is handed
batches that are ready, while this package's step crops, mirrors and normalises them itself.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def usual_flax(name: str, batch: int):
    """An ordinary linen net and optax step, one device, nothing tuned."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    depth = int(name.removeprefix("resnet"))

    class Block(nn.Module):
        filters: int
        strides: int

        @nn.compact
        def __call__(self, x, train):
            norm = lambda: nn.BatchNorm(use_running_average=not train, momentum=0.9)  # noqa: E731
            y = nn.Conv(self.filters, (3, 3), self.strides, padding=1, use_bias=False)(x)
            y = nn.relu(norm()(y))
            y = nn.Conv(self.filters, (3, 3), padding=1, use_bias=False)(y)
            y = norm()(y)
            if self.strides > 1:
                x = x[:, ::2, ::2]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.filters // 2)))
            return nn.relu(x + y)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(16, (3, 3), padding=1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            for stage in range(3):
                for block in range((depth - 2) // 6):
                    x = Block(16 * 2**stage, 2 if stage and not block else 1)(x, train)
            return nn.Dense(10)(x.mean(axis=(1, 2)))

    net = Net()
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    rng = np.random.RandomState(0)
    images = rng.randn(8, batch, 32, 32, 3).astype(np.float32)
    labels = rng.randint(0, 10, (8, batch))
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

    def run(number):
        nonlocal state
        state, loss = step(state, images[number % 8], labels[number % 8])
        loss.block_until_ready()

    return run


def this_package(name: str, batch: int, devices: int, keep_memory: bool):
    """The package's own chunk, as `train` runs it."""
    from resnet_flax import cpu

    if keep_memory:
        cpu.keep_freed_memory()
    import jax
    import numpy as np

    from resnet_flax import experiment
    from resnet_flax.config import base_config
    from resnet_flax.data.dataset import Dataset, Split

    config = base_config()
    config.model.name, config.data.batch_size = name, batch
    config.train.cpu_devices = devices
    rng = np.random.RandomState(0)
    labels = rng.randint(0, 10, 5000).astype(np.int32)
    split = Split(rng.randint(0, 256, (5000, 32, 32, 3)).astype(np.uint8), labels)
    data = Dataset("noise", split, None, split, tuple("0123456789"), "", None)
    run_ = experiment.build(config, data, devices.choose_mesh(config))
    state, chunk = run_.create_state(), run_.make_train_chunk()

    def run(number):
        nonlocal state
        feed = run_.train_feed
        state, sums = chunk(state, feed.resident, feed.chunk(number, 1))
        jax.block_until_ready((state, sums))

    return run


VARIANTS = {
    "usual Flax": lambda m, b: usual_flax(m, b),
    "this package, 1 device": lambda m, b: this_package(m, b, 1, True),
    "this package, as it trains": lambda m, b: this_package(m, b, 0, True),
}


def serve(variant: str, model: str, batch: int) -> None:
    """Runs one variant: reads a number of steps a line, answers with seconds per step."""
    run = VARIANTS[variant](model, batch)
    number = 0
    for _ in range(3):
        run(number)
        number += 1
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start = time.perf_counter()
            run(number)
            times.append(time.perf_counter() - start)
            number += 1
        print(json.dumps(times), flush=True)


def main() -> None:
    """Prints a table: median step of each variant, and ratios paired round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=6, help="per variant and round")
    parser.add_argument("--serve", choices=VARIANTS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.model, args.batch)
    shared = ["--model", args.model, "--batch", str(args.batch)]
    workers = {}
    for name in VARIANTS:
        workers[name] = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, *shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert workers[name].stdout.readline().strip() == "ready", f"{name} failed"
    medians = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            worker.stdin.write(f"{args.steps}\n")
            worker.stdin.flush()
            medians[name].append(statistics.median(json.loads(worker.stdout.readline())))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    base = medians["usual Flax"]
    print(f"{args.model}, batch {args.batch}: {args.rounds} rounds of {args.steps} steps")
    print(
        f"{'variant':<28}{'ms/step':>9}{'fastest':>9}{'images/s':>10}{'speed-up (min to max)':>28}"
    )
    for name, values in medians.items():
        median = statistics.median(values)
        ratios = [b / v for b, v in zip(base, values, strict=True)]
        print(
            f"{name:<28}{1e3 * median:>9.0f}{1e3 * min(values):>9.0f}{args.batch / median:>10.0f}"
            f"{statistics.median(ratios):>14.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
