"""The step of `side_by_side` the usual Flax way: a linen net, an optax step, nothing tuned."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.benchmarks.pytorch_step import BATCHES, DECAY, MOMENTUM, RATE


def make_net(depth, dtype):
    """The CIFAR ResNet of `depth` = 6n+2 layers with option A."""

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

    return Net()


def make(depth, batch, dtype):
    """As `pytorch_step.make`, on one device."""
    net = make_net(depth, jnp.dtype(dtype))
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
    return run, parameters, {"jax": jax.__version__, "flax": flax.__version__}
