"""From a configuration to data on the devices, a net, and the functions that train and score it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import resolve_steps
from resnet_flax.data.dataset import Dataset
from resnet_flax.data.streaming import StreamedSplit
from resnet_flax.devices import cpu, distributed, hardware, sharding
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.models.resnet import ResNet
from resnet_flax.runs import checkpoint
from resnet_flax.training import evaluate, feed, inputs, optim, state, steps


def take_model(config: ConfigDict, found: dict[str, Any]) -> None:
    """Replaces the net "auto", in place, by the one of a weights file or a run.

    `found` has the arguments of its `create_model`; a `UserError` if they lack a "name".
    """
    if config.model.name != "auto":
        return
    if "name" not in found:
        raise UserError(
            "config.model.name=auto takes the net from --weights: give a weights file, or name a "
            "net, for example --config.model.name=resnet50"
        )
    keys = "name", "shortcut", "stride_in_3x3", "survival"
    config.model.update({key: found[key] for key in keys if key in found})


def _pick(section: ConfigDict, keys: str) -> dict[str, Any]:
    return {key: section[key] for key in keys.split()}


def make_model(config: ConfigDict, platform: str) -> ResNet:
    """The configured net for a platform, see `sharding.platform`; its number of outputs is set."""
    m, on_cpu, chosen = config.model, platform == "cpu", {"always": True, "never": False}
    same = "num_classes shortcut stride_in_3x3 gate_bias zero_init_last survival bn_momentum remat"
    fast = "float32" if on_cpu else "bfloat16"
    return models.create_model(
        m.name,
        **_pick(m, same),
        dtype=fast if m.dtype == "auto" else m.dtype,
        bn_group_size=m.bn_group_size or None,
        scan=chosen.get(m.scan, models.get_architecture(m.name).scan_pays),
        cpu_convolutions=chosen.get(m.cpu_convolutions, on_cpu),
        defer=platform == "gpu" or m.kernels == "always",
        fused=m.kernels == "always",
    )


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that training and evaluating one net needs, but for its state."""

    config: ConfigDict  # Validated, every duration in steps.
    dataset: Dataset  # On the host.
    mesh: Mesh
    model: ResNet
    mean: np.ndarray  # float32, see `augment.statistics`.
    std: np.ndarray
    warn: Callable[[str], None] = print  # Called with a line about each unreadable image.
    workers: int = 0  # Processes that decode images.
    put: Callable[..., jax.Array] = sharding.put  # See `feed.put_once`.

    @functools.cached_property
    def train_feed(self) -> feed.Feed:
        """The training examples."""
        return self._feed(self.dataset.train)

    @functools.cached_property
    def eval_feeds(self) -> dict[str, feed.Feed]:
        """The examples to evaluate, by split: "test", and "validation" if there is one."""
        splits = {"validation": self.dataset.validation, "test": self.dataset.test}
        return {k: self._feed(split) for k, split in splits.items() if split is not None}

    def _feed(self, split) -> feed.Feed:
        c = self.config
        common = {"seed": c.seed, "mesh": self.mesh, "batch_size": c.data.batch_size}
        if not isinstance(split, StreamedSplit):
            return feed.ResidentFeed(split, self.mean, self.std, **common, put=self.put)
        return feed.StreamedFeed(
            split,
            self.mean,
            self.std,
            **common,
            total_steps=c.train.total_steps,
            workers=self.workers,
            limit=c.data.max_unreadable,
            warn=self.warn,
        )

    def close(self) -> None:
        """Ends what works in the background."""
        if "train_feed" in vars(self):
            self.train_feed.close()

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The configured optimizer."""
        c, o = self.config, self.config.optim
        schedule = optim.make_schedule(
            o.schedule,
            total_steps=c.train.total_steps,
            boundaries=o.boundaries_steps,
            **_pick(o, "learning_rate decay_factor decay_factors"),
        )
        warmup = _pick(o, "warmup_steps warmup_error warmup_rate warmup_linear")
        rate = optim.scale_by_rate(schedule, **warmup)
        same = _pick(o, "momentum weight_decay decay_norm_and_bias")
        if o.name == "adam":
            return optim.adam(rate, **same)
        return optim.sgd(rate, nesterov=o.nesterov, **same)

    def _first_state(self, variables: Any = None, seed: Any = None) -> state.TrainState:
        return state.create_state(
            self.model,
            self.optimizer,
            seed=self.config.seed if seed is None else seed,
            ema=self.config.optim.ema_decay > 0,
            variables=variables,
        )

    def create_state(self, variables: Any = None) -> state.TrainState:
        """The first state, from canonical `variables` or from the seed."""
        if variables is not None and self.model.scan:
            variables = layout.to_scanned(variables)
        seed = np.uint32(self.config.seed)  # An argument: one program draws for every seed.
        return state.place(self._first_state, sharding.replicated(self.mesh), variables, seed)

    def abstract_state(self) -> state.TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self._first_state)

    def restore(self, tree: dict[str, Any]) -> state.TrainState:
        """The inverse of `checkpoint.to_tree`: a state on the devices."""
        restored = checkpoint.from_tree(tree, self.abstract_state(), self.model.scan)
        return sharding.put_tree(restored, sharding.replicated(self.mesh))

    def count_parameters(self) -> int:
        """Number of trainable parameters."""
        params = state.abstract_variables(self.model)["params"]
        return sum(p.size for p in jax.tree.leaves(params))

    def describe_model(self) -> dict[str, Any]:
        """The arguments of `create_model` that a weights file keeps."""
        model = self.config.model
        return {
            "name": model.name,
            "shortcut": models.resolve_shortcut(model.name, model.shortcut),
            **_pick(model, "num_classes stride_in_3x3 survival"),
        }

    def make_train_chunk(self, several: bool = False) -> Callable:
        """See `steps.make_train_chunk`; `several`: whether the program trains several nets."""
        c, platform = self.config, sharding.platform(self.mesh)
        return steps.make_train_chunk(
            self.model,
            self.optimizer,
            sharding=sharding.split(self.mesh),
            **_pick(c.data, "pad flip fill color"),
            **_pick(c.optim, "label_smoothing ema_decay"),
            pack=platform == "gpu",
            compiler_options=hardware.compiler_options(platform, concurrent=several),
        )

    def evaluated(self, variables: Any) -> Any:
        """The variables to score and to save for `{"params": …, "batch_stats": …}` in training.

        They differ if `eval.bn_examples` asks for statistics estimated again.
        """
        c = self.config
        if not c.eval.bn_examples:
            return variables
        return evaluate.reestimate_statistics(
            steps.make_batch_statistics(
                self.model,
                sharding=sharding.split(self.mesh),
                **_pick(c.data, "pad flip fill"),
            ),
            variables,
            self.train_feed,
            examples=c.eval.bn_examples,
            batch_size=c.data.batch_size,
        )

    def score(
        self, variables: Any, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, evaluate.Score]:
        """The scores of `{"params": …, "batch_stats": …}` by split; {} if it was stopped.

        `stopped` is asked before each batch.
        """
        eval_chunk = steps.make_eval_chunk(
            self.model, sharding=sharding.split(self.mesh), ten_crops=self.ten_crops
        )
        scores = {}
        for name, examples in self.eval_feeds.items():
            batch_size = self.config.eval.batch_size
            scores[name] = evaluate.evaluate(
                eval_chunk, variables, examples, batch_size=batch_size, stopped=stopped
            )
        return {} if None in scores.values() else scores

    @property
    def ten_crops(self) -> int:
        """Side of the ten crops of a test image that are scored, in pixels; 0: the whole image."""
        return self.dataset.train.image_shape[0] if self.config.eval.crops == 10 else 0


def build(
    config: ConfigDict,
    dataset: Dataset,
    mesh: Mesh,
    preprocessing: tuple[np.ndarray, np.ndarray] | None = None,
    warn: Callable[[str], None] = print,
    put: Callable[..., jax.Array] = sharding.put,
) -> Setup:
    """Makes a setup from a validated configuration; see `Setup`.

    `preprocessing` is the (mean, std) to use instead of the training set's own.

    Raises:
      UserError: a duration is less than a step, or the data have more classes than the net
        outputs.
    """
    config = resolve_steps(config, len(dataset.train))
    if config.data.pad < 0:
        config.data.pad = 4 if inputs.is_for_cifar(config) else 0
    classes = len(dataset.class_names)
    config.model.num_classes = config.model.num_classes or classes
    if config.model.num_classes < classes:
        raise UserError(
            f"config.model.num_classes={config.model.num_classes} is less than the {classes} "
            f"classes of {dataset.name}"
        )
    mean, std = preprocessing or inputs.statistics(dataset, config.data.normalize)
    # Some of the processes may share a machine.
    cores = cpu.cores_per_process(distributed.gather(cpu.describe_cores()))
    workers = cpu.choose_workers(config.data.workers, cores)
    platform = sharding.platform(mesh)
    model = make_model(config, platform)
    if model.uses_fused and (mesh.size > 1 or platform == "tpu"):
        there = f"{mesh.size} {platform} device(s)"
        raise UserError(f"config.model.kernels=always is for one GPU, not {there}: leave it out")
    return Setup(config, dataset, mesh, model, mean, std, warn, workers, put)
