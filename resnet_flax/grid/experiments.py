"""The papers' experiments on CIFAR-10, as lists of runs."""

import dataclasses

from resnet_flax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """A line of a table, before it has a seed.

    Attributes:
      name: of the run's directory; the same in every experiment that it is part of.
      config: a file of `configs/`, with its argument.
      overrides: further settings, "key=value".
      on_request: whether it takes part only where it is asked for.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    on_request: bool = False


def _own(*names: str) -> tuple[Run, ...]:
    """Runs that have a config file of their own."""
    return tuple(Run(name, f"{name}.py") for name in names)


def _identity_mappings(net: str, name: str | None = None, *overrides: str) -> Run:
    return Run(name or net, f"identity_mappings.py:{net}", overrides)


def _with_option(net: str, option: str) -> Run:
    return Run(f"{net}-{option}", f"{net}.py", (f"model.shortcut={option}",))


_DEPTHS = 20, 32, 44, 56, 110
_RESIDUAL = _own(*(f"resnet{depth}" for depth in _DEPTHS))

EXPERIMENTS: dict[str, tuple[Run, ...]] = {
    # [R, Table 6 and Fig. 6 middle]
    "table6": (*_RESIDUAL, Run("resnet1202", "resnet1202.py", on_request=True)),
    # [R, Fig. 6 left]
    "plain": _own(*(f"plain{depth}" for depth in _DEPTHS)),
    # [R, Table 3] compares them on ImageNet. A is the nets' own.
    "options": (
        *_own("resnet20"),
        *(_with_option("resnet20", option) for option in "BC"),
        *_own("resnet56"),
        *(_with_option("resnet56", option) for option in "BC"),
    ),
    # [R, Fig. 5 right] on CIFAR-10: ResNet-164 as [I, Table 3] trains it.
    "bottleneck": (*_own("resnet47_bottleneck"), _identity_mappings("resnet164_bottleneck")),
    # [I, Table 3]
    "preact": (
        *_own("resnet110", "resnet110_preact"),
        _identity_mappings("resnet164_bottleneck"),
        *_own("resnet164_preact"),
    ),
    # [I, Table 1]
    "shortcuts": (
        *_own("resnet110"),
        _identity_mappings("resnet110_constant_scaling"),
        _identity_mappings("resnet110_exclusive_gating"),
        _identity_mappings(
            "resnet110_shortcut_gating", "resnet110_shortcut_gating-bias0", "model.gate_bias=0"
        ),
        _identity_mappings("resnet110_shortcut_gating"),
        _identity_mappings("resnet110_conv_shortcut"),
        _identity_mappings("resnet110_dropout_shortcut"),
    ),
    # [I, Table 2], ResNet-110
    "activations": (
        *_own("resnet110"),
        _identity_mappings("resnet110_bn_after_addition"),
        _identity_mappings("resnet110_relu_before_addition"),
        _identity_mappings("resnet110_relu_only_preact"),
        *_own("resnet110_preact"),
    ),
    # The nets of Table 6 with later training habits.
    "modern": tuple(Run(f"modern-resnet{d}", f"modern.py:resnet{d}") for d in _DEPTHS),
}
ALL = "all"


def runs_of(experiment: str, *, on_request: bool = False) -> tuple[Run, ...]:
    """The runs of an experiment, or of "all", each once.

    Args:
      experiment: a key of `EXPERIMENTS`, or "all".
      on_request: with those that take part only on request.

    Raises:
      UserError: there is no such experiment.
    """
    if experiment not in (*EXPERIMENTS, ALL):
        known = ", ".join([*EXPERIMENTS, ALL])
        raise UserError(f"unknown experiment {experiment!r}; known: {known}")
    chosen = EXPERIMENTS.values() if experiment == ALL else [EXPERIMENTS[experiment]]
    unique = dict.fromkeys(run for runs in chosen for run in runs)
    return tuple(run for run in unique if on_request or not run.on_request)
