"""From a configuration to data on the devices, a net, and the compiled functions."""

import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import augment, cpu, data, evaluate, models, optim, sharding, state, steps
from resnet_flax.config import resolve_steps
from resnet_flax.data.dataset import Dataset, Split
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.models.resnet import ResNet

# Unrolled, more blocks a stage than this take minutes to compile.
_MOST_BLOCKS_UNROLLED = 40


def choose_mesh(config: ConfigDict) -> Mesh:
    """The devices to run on; a CPU is first split into several where that pays.

    Call it before anything else touches jax's devices: they are counted once per process.

    Raises:
      UserError: there are too few devices, or they do not divide the batch.
    """
    count = cpu.choose_devices(
        config.train.cpu_devices, config.data.batch_size, config.model.bn_group_size
    )
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Where jax has counted its devices already, as in a notebook, what it has must do.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if devices[0].platform == "cpu":
        if config.train.cpu_devices > len(devices):
            raise UserError(
                f"config.train.cpu_devices={config.train.cpu_devices}, but jax already runs with "
                f"{len(devices)} devices in this process"
            )
        devices = devices[:count]
    return sharding.make_mesh(devices, config.data.batch_size)


def make_model(config: ConfigDict) -> ResNet:
    """The configured net; `num_classes` must be resolved."""
    architecture = models.get_architecture(config.model.name)
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    scan = config.model.scan
    return models.create_model(
        config.model.name,
        config.model.num_classes,
        shortcut=config.model.shortcut,
        dtype=dtype,
        stride_in_3x3=config.model.stride_in_3x3,
        gate_bias=config.model.gate_bias,
        zero_init_last=config.model.zero_init_last,
        survival=config.model.survival,
        bn_momentum=config.model.bn_momentum,
        bn_group_size=config.model.bn_group_size or None,
        scan=scan == "always"
        or (scan == "auto" and max(architecture.stage_sizes) > _MOST_BLOCKS_UNROLLED),
        remat=config.model.remat,
    )


def make_optimizer(config: ConfigDict):
    """The configured optimizer; durations must be resolved."""
    o = config.optim
    schedule = optim.make_schedule(
        o.schedule,
        learning_rate=o.learning_rate,
        total_steps=config.train.total_steps,
        boundaries=o.boundaries_steps,
        decay_factor=o.decay_factor,
        decay_factors=o.decay_factors,
    )
    rate = optim.scale_by_rate(
        schedule,
        warmup_steps=o.warmup_steps,
        warmup_error=o.warmup_error,
        warmup_rate=o.warmup_rate,
        warmup_linear=o.warmup_linear,
    )
    if o.name == "adam":
        return optim.adam(
            rate,
            momentum=o.momentum,
            weight_decay=o.weight_decay,
            decay_norm_and_bias=o.decay_norm_and_bias,
        )
    return optim.sgd(
        rate,
        momentum=o.momentum,
        nesterov=o.nesterov,
        weight_decay=o.weight_decay,
        decay_norm_and_bias=o.decay_norm_and_bias,
    )


def load_data(config: ConfigDict) -> Dataset:
    """The configured data set, read (or prepared first) on this machine."""
    return data.load(
        config.data.name,
        data_dir=config.data.data_dir or None,
        split=config.data.split,
        archive=config.data.archive or None,
        mirror=config.data.mirror or None,
        seed=config.seed,
    )


def put_resident(split: Split, mean, std, seed: int, mesh: Mesh) -> dict[str, jax.Array]:
    """One split of the data on all devices, as `steps` wants it."""
    everywhere = sharding.replicated(mesh)
    arrays = {"images": split.images, "labels": split.labels, "mean": mean, "std": std}
    resident = {name: sharding.put(value, everywhere) for name, value in arrays.items()}
    key = jax.random.key(seed, impl="threefry2x32")
    return resident | {"key": jax.device_put(key, everywhere)}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What training and evaluation share.

    Attributes:
      config: validated, every duration in steps, nothing left "auto" but dtype and scan.
      dataset: on the host.
      mesh: of all devices.
      model: the net.
      mean: float32, see `augment.statistics`.
      std: likewise.
    """

    config: ConfigDict
    dataset: Dataset
    mesh: Mesh
    model: ResNet
    mean: np.ndarray
    std: np.ndarray

    @functools.cached_property
    def train_resident(self) -> dict[str, jax.Array]:
        """The training split on the devices."""
        return put_resident(self.dataset.train, self.mean, self.std, self.config.seed, self.mesh)

    @functools.cached_property
    def eval_residents(self) -> dict[str, dict[str, jax.Array]]:
        """The splits to evaluate, by name: "validation", where there is one, and "test"."""
        splits = {"validation": self.dataset.validation, "test": self.dataset.test}
        return {
            name: put_resident(split, self.mean, self.std, self.config.seed, self.mesh)
            for name, split in splits.items()
            if split is not None
        }

    @functools.cached_property
    def optimizer(self):
        """See `make_optimizer`."""
        return make_optimizer(self.config)

    def create_state(self, variables: Any = None) -> state.TrainState:
        """The first state, from canonical `variables` or from the seed."""
        if variables is not None and self.model.scan:
            variables = layout.to_scanned(variables)
        create = self._creator(self.dataset.train.images.shape[1:])
        return state.place(create, sharding.replicated(self.mesh), variables)

    def abstract_state(self, image_shape=None) -> state.TrainState:
        """Shapes and dtypes of the state; `image_shape` stands in for a data set's (H, W, C)."""
        shape = image_shape or self.dataset.train.images.shape[1:]
        return jax.eval_shape(self._creator(shape), None)

    def _creator(self, image_shape):
        def create(variables):
            return state.create_state(
                self.model,
                self.optimizer,
                seed=self.config.seed,
                image_shape=image_shape,
                ema=self.config.optim.ema_decay > 0,
                variables=variables,
            )

        return create

    def abstract_variables(self) -> dict[str, Any]:
        """Shapes and dtypes of the variables in the canonical layout."""
        abstract = layout.to_canonical(self.abstract_state())
        return {"params": abstract.params, "batch_stats": abstract.batch_stats}

    def make_train_chunk(self):
        """See `steps.make_train_chunk`."""
        c = self.config
        return steps.make_train_chunk(
            self.model,
            self.optimizer,
            sharding=sharding.split(self.mesh),
            pad=c.data.pad,
            flip=c.data.flip,
            fill=c.data.fill,
            label_smoothing=c.optim.label_smoothing,
            ema_decay=c.optim.ema_decay,
            compiler_options=cpu.compiler_options(),
        )

    def make_evaluated(self):
        """A function from a net's variables to those that are scored and saved.

        They differ where `eval.bn_examples` asks for statistics estimated again.
        """
        c, by_batch = self.config, sharding.split(self.mesh)
        if not c.eval.bn_examples:
            return lambda variables: variables
        batch_statistics = steps.make_batch_statistics(
            self.model,
            sharding=by_batch,
            pad=c.data.pad,
            flip=c.data.flip,
            fill=c.data.fill,
        )
        return lambda variables: evaluate.reestimate_statistics(
            batch_statistics,
            variables,
            self.train_resident,
            examples=c.eval.bn_examples,
            batch_size=c.data.batch_size,
            split=by_batch,
        )

    def make_scorer(self):
        """A function from `{"params": …, "batch_stats": …}` to `{split name: evaluate.Score}`."""
        eval_chunk = steps.make_eval_chunk(self.model, sharding=sharding.split(self.mesh))
        return lambda variables: {
            name: evaluate.evaluate(
                eval_chunk,
                variables,
                resident,
                batch_size=self.config.eval.batch_size,
                split=sharding.split(self.mesh, 1),
            )
            for name, resident in self.eval_residents.items()
        }


def build(config: ConfigDict, dataset: Dataset, mesh: Mesh, preprocessing=None) -> Experiment:
    """Puts an experiment together.

    Args:
      config: validated.
      dataset: on the host.
      mesh: as from `choose_mesh`.
      preprocessing: (mean, std) to use instead of the training set's own.

    Raises:
      UserError: what only shows with the data at hand: durations of less than a step, more classes
        than outputs.
    """
    config = resolve_steps(config, len(dataset.train.labels))
    classes = len(dataset.class_names)
    config.model.num_classes = config.model.num_classes or classes
    if config.model.num_classes < classes:
        raise UserError(
            f"config.model.num_classes={config.model.num_classes} is less than the {classes} "
            f"classes of {dataset.name}"
        )
    mean, std = preprocessing or augment.statistics(dataset.train.images, config.data.normalize)
    return Experiment(config, dataset, mesh, make_model(config), mean, std)
