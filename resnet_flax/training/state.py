"""Everything a training step changes, and how it begins."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from resnet_flax.devices import randomness
from resnet_flax.models import layout
from resnet_flax.models.resnet import ResNet


@flax.struct.dataclass
class TrainState:
    """State of a run, together with (seed, config) all that the next step depends on.

    Attributes:
      step: int32 scalar, steps done.
      params: float32 parameters, in the model's layout (see `models.layout`).
      batch_stats: float32 running means and variances, in the model's layout.
      opt_state: state of the optimizer.
      ema: `{"params": …, "batch_stats": …}` averaged over steps, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any

    def evaluated(self) -> dict[str, Any]:
        """The variables that evaluation uses: the averaged ones where there are any."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def initial_variables(model: ResNet, key: jax.Array, image_shape: tuple[int, ...]) -> Any:
    """`{"params": …, "batch_stats": …}` in the model's layout.

    Drawn by the scanned form of the net whatever the model's own: the values do not depend on the
    layout, and a thousand layers compile in seconds. `key` is a typed PRNG key.
    """
    variables = model.clone(scan=True).init(key, jnp.zeros((1, *image_shape)))
    return variables if model.scan else layout.to_canonical(variables)


def abstract_variables(model: ResNet) -> Any:
    """Shapes and dtypes of a net's variables in the canonical layout."""
    scanned = model.clone(scan=True)

    def initialise(key):
        # Any side will do: no variable depends on it.
        return initial_variables(scanned, key, (32, 32, 3))

    return layout.to_canonical(jax.eval_shape(initialise, jax.random.key(0)))


def create_state(
    model: ResNet,
    optimizer: optax.GradientTransformation,
    *,
    seed: int | jax.Array,
    image_shape: tuple[int, ...],
    ema: bool,
    variables: Any = None,
) -> TrainState:
    """A run's first state; to be traced, see `place`.

    `ema`: whether averaged weights are kept. `variables`, in the model's layout, are what to begin
    with instead of random draws from the seed.
    """
    if variables is None:
        variables = initial_variables(model, randomness.make_key(seed), image_shape)
    params, batch_stats = variables["params"], variables["batch_stats"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        # Copies: a donated state must not hold one buffer twice.
        ema=jax.tree.map(jnp.copy, dict(variables)) if ema else None,
    )


def place(create: Callable[..., TrainState], sharding: Sharding, *arguments: Any) -> TrainState:
    """Computes a state, `create(*arguments)`, where it will stay: every leaf under `sharding`."""
    # Run once: on a CPU, compiling the many random draws well takes longer than drawing badly.
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(create, out_shardings=sharding, compiler_options=options)(*arguments)
