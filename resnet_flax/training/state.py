"""Everything a training step changes, and how it begins."""

import functools
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
    """What the next step depends on, beside the seed and the configuration.

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
        """The variables to evaluate: the averaged ones if there are any."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def initial_variables(model: ResNet, key: jax.Array) -> dict[str, Any]:
    """`{"params": …, "batch_stats": …}` in the model's layout, drawn from a typed PRNG key.

    The scanned form of the net draws them whatever the model's own form: the values do not depend
    on the layout, and a thousand layers compile in seconds.
    """
    # No variable depends on the images' side.
    variables = model.clone(scan=True).init(key, jnp.zeros((1, 32, 32, 3)))
    return variables if model.scan else layout.to_canonical(variables)


def abstract_variables(model: ResNet) -> dict[str, Any]:
    """Shapes and dtypes of a net's variables in the canonical layout."""
    draw = functools.partial(initial_variables, model.clone(scan=True))
    return layout.to_canonical(jax.eval_shape(draw, jax.random.key(0)))


def create_state(
    model: ResNet,
    optimizer: optax.GradientTransformation,
    *,
    seed: int | jax.Array,
    ema: bool,
    variables: Any = None,
) -> TrainState:
    """A run's first state, to be traced: see `place`.

    It begins with `variables`, in the model's layout, or with random draws from the seed. `ema`
    says whether averaged weights are kept.
    """
    if variables is None:
        variables = initial_variables(model, randomness.make_key(seed))
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
