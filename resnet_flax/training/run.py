"""One run: what it starts from, what it writes while its net is trained, and its result."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import flatten, resolve_steps
from resnet_flax.devices import distributed
from resnet_flax.models import layout
from resnet_flax.runs import checkpoint, result, weights
from resnet_flax.runs.directory import Directory
from resnet_flax.runs.metrics import Log, RunLog
from resnet_flax.runs.progress import Progress
from resnet_flax.training import setup
from resnet_flax.training.evaluate import Score
from resnet_flax.training.state import TrainState, abstract_variables
from resnet_flax.training.trained import Source


@dataclasses.dataclass
class History:
    """What a checkpoint remembers beside the state.

    Attributes:
      seconds: wall-clock time that led to this state, with evaluations and compilation, without
        start-up and work that a crash undid.
      train_seconds: the part spent on training steps, without compilation.
      train_examples: examples trained on in `train_seconds`.
      window: sums since the last training record: steps, loss, error, seconds.
    """

    seconds: float = 0.0
    train_seconds: float = 0.0
    train_examples: int = 0
    window: tuple[int, float, float, float] = (0, 0.0, 0.0, 0.0)


class Run:
    """A run; its life is `find_start`, `begin`, training by the loop, `write_result`.

    Attributes:
      config: as given, of one seed.
      path: of its directory.
      directory: what is in there; the caller sets it, on the first process only.
      dataset: the caller sets it.
      result: content of `result.json`; None before the run is finished.
      setup: the net and its compiled functions.
      state: on the devices.
      step: steps dispatched.
      log: its records.
      rate: learning rate of the last step.
      history: see `History`.
      saved: path of the newest checkpoint, None before the first.
      scores: of the last evaluation in this process, by split.
    """

    def __init__(self, config: ConfigDict, path: pathlib.Path, initial: Source | None):
        """`initial` are the weights that a new run begins with, on the first process only."""
        self.config, self.path, self._initial = config, path, initial
        self.directory: Directory | None = None
        self.rate = math.nan
        self.scores: dict[str, Score] = {}
        self._writer: checkpoint.Writer | None = None

    def find_start(self, checkpoint_dir: str | None, warn: Callable[[str], None]) -> None:
        """Reads the newest checkpoint and, of a finished run, the result.

        `checkpoint_dir` as in `train`; `warn` is called with a line about each damaged checkpoint.

        Raises:
          UserError: the directory or the checkpoints are damaged, or of another run.
        """
        start = distributed.share(lambda: self._read_start(checkpoint_dir, warn))
        self.result, self._place = start["result"], start["place"]
        self._preprocessing = start["preprocessing"]
        self._tree, self._record = start["tree"], start["record"]

    def _read_start(
        self, checkpoint_dir: str | None, warn: Callable[[str], None]
    ) -> dict[str, Any]:
        directory, dataset, initial = self.directory, self.dataset, self._initial
        directory.check_data(dataset.name, dataset.fingerprint)
        place = directory.checkpoints(checkpoint_dir)
        found = checkpoint.read_newest(checkpoint.locate(place), warn, set_aside=True)
        directory.check_initial_weights(initial and initial.sha256, resuming=found is not None)
        preprocessing = directory.preprocessing()
        if preprocessing is None and initial:
            # The weights were trained on images prepared like this.
            preprocessing = initial.weights.mean, initial.weights.std
            shape = dataset.train.image_shape
            weights.check_preprocessing(*preprocessing, shape, str(initial.path))
        step, tree, record = found or (0, None, None)
        finished = None
        if found is not None:
            directory.check_checkpoint(record.get("run", self._identity), self._identity, place)
            total = resolve_steps(self.config, len(dataset.train)).train.total_steps
            finished = directory.finished(total) if step == total else None
        return {
            "place": place,
            "preprocessing": preprocessing and list(preprocessing),
            "tree": tree,
            "record": record,
            "result": finished,
        }

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the run, in case its directory is lost."""
        return {"config": flatten(self.config), "fingerprint": self.dataset.fingerprint}

    def begin(
        self,
        mesh: Mesh,
        put: Callable[..., jax.Array],
        environment: dict[str, Any],
        progress: Progress,
    ) -> None:
        """Puts data and state on the devices, and opens the log and the checkpoints.

        The state is the newest checkpoint's, or made from the initial weights or the seed. `put` is
        for `setup.build`; `environment` becomes part of `run.json` and of the result.
        """
        preprocessing, self._environment = self._preprocessing, environment
        self.setup = setup.build(self.config, self.dataset, mesh, preprocessing, progress.warn, put)
        self.state = self._first_state()
        self.step = int(jax.device_get(self.state.step))
        self._checkpoints, record = epath.Path(self._place), self._record or {}
        self.saved = self._checkpoints / str(self.step) if record else None
        # What an older version did not keep starts anew.
        kept = [field.name for field in dataclasses.fields(History) if field.name in record]
        self.history = History(**{name: record[name] for name in kept})
        log = None
        if self.directory is not None:
            self._write_start(progress.say)
            log = RunLog(self.path, self.step, self.config.log.tensorboard)
            self._writer = checkpoint.Writer(self._checkpoints, self.config.checkpoint.keep)
        records = distributed.share(lambda: log.records)
        self.log = log or Log(records)

    def _first_state(self) -> TrainState:
        tree, self._tree = self._tree, None
        if tree is not None:
            return self.setup.restore(tree)
        drawn = self.setup.create_state()
        if not distributed.share(lambda: self._initial is not None):
            return drawn
        head = layout.to_canonical(jax.device_get(drawn.params))["head"]
        return self.setup.create_state(distributed.share(lambda: self._fit_initial(head)))

    def _fit_initial(self, head: dict[str, np.ndarray]) -> dict[str, Any]:
        """The initial weights, with `head` as the last layer if the classes are others."""
        built, loaded, name = self.setup, self._initial.weights, str(self._initial.path)
        model, variables = built.describe_model(), loaded.variables
        renamed = loaded.class_names and loaded.class_names != self.dataset.class_names
        if renamed or loaded.model.get("num_classes") != model["num_classes"]:
            del model["num_classes"]
            variables = {**variables, "params": {**variables["params"], "head": head}}
        weights.check_model(loaded, model, name)
        return weights.fit(variables, abstract_variables(built.model), name)

    def _write_start(self, say: Callable[[str], None]) -> None:
        built, dataset, draw = self.setup, self.dataset, self.dataset.validation_draw
        usual = str(self.path / "checkpoints")
        if self.directory.grows(flatten(self.config)):
            steps = built.config.train.total_steps
            say(f"the run grows to {steps} steps; a result it has is kept beside the new one")
        began_on = self.directory.record.get("devices", built.mesh.size)
        if began_on != built.mesh.size:
            say(
                f"note: the run began on {began_on} device(s) and goes on with {built.mesh.size}: "
                "the results agree up to rounding, not to the bit"
            )
        record = {
            "model": built.config.model.name,
            "shortcut": built.describe_model()["shortcut"],
            "devices": built.mesh.size,
            "init_weights": self._initial and self._initial.sha256,
            # Not if it is the usual place: directories are moved.
            "checkpoint_dir": None if self._place == usual else self._place,
            "dtype": str(np.dtype(built.model.dtype)),
            "parameters": built.count_parameters(),
            "weighted_layers": models.get_architecture(built.config.model.name).weighted_layers,
            "total_steps": built.config.train.total_steps,
            "data": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "train_examples": len(dataset.train),
                "validation_examples": len(dataset.validation or ()),
                "test_examples": len(dataset.test),
                "class_names": dataset.class_names,
                "validation_draw": list(map(int, draw)) if draw is not None else None,
            },
        }
        start = {"step": self.step, **self._environment}
        preprocessing = built.mean, built.std
        self.directory.write_start(flatten(self.config), record, preprocessing, start)

    def read(self, first: int, sums: dict[str, np.ndarray], seconds: float) -> str | None:
        """Logs a chunk after `first` steps; returns what is wrong if a loss is not finite.

        `sums` holds "loss", "error" and "rate" of each step; the chunk took `seconds`.
        """
        config, history, length = self.setup.config, self.history, len(sums["loss"])
        history.train_seconds += seconds
        history.train_examples += length * config.data.batch_size
        each = zip(*(sums[name].tolist() for name in ("loss", "error", "rate")), strict=True)
        for step, (loss, error, self.rate) in enumerate(each, first + 1):
            if not math.isfinite(loss):
                return f"the loss is {loss} at step {step}"
            values = 1, loss, error, seconds / length
            history.window = tuple(a + b for a, b in zip(history.window, values, strict=True))
            if step % config.log.every_steps == 0 or step == config.train.total_steps:
                self._log_window(step)
        return None

    def _log_window(self, step: int) -> None:
        steps, loss, error, seconds = self.history.window
        self.history.window = 0, 0.0, 0.0, 0.0
        examples = steps * self.setup.config.data.batch_size
        values = {
            "loss": loss / steps,
            "error": error / steps,
            "rate": self.rate,
            "examples": examples,
            "images_per_second": round(examples / max(seconds, 1e-9), 1),
        }
        self.log.write("train", step, values)

    def images_per_second(self) -> float:
        """Training examples by the time spent on training steps."""
        return self.history.train_examples / max(self.history.train_seconds, 1e-9)

    def best_step(self) -> int | None:
        """Step of the best evaluation so far; on the test split only without a validation split."""
        split = "validation" if self.dataset.validation is not None else "test"
        best = result.best(self.log.records, split)
        return best and best["step"]

    def score(self, stopped: Callable[[], bool]) -> dict[str, Score]:
        """Evaluates the net and logs its scores; {} if it was stopped."""
        self._evaluated = self.setup.evaluated(self.state.evaluated())
        self.scores = self.setup.score(self._evaluated, stopped)
        for split, score in self.scores.items():
            self.log.write(split, self.step, score.as_record())
        return self.scores

    def save(self) -> None:
        """Begins to save a checkpoint of this step, unless there is one: see `Writer.save`."""
        self.log.sync()
        path = self._checkpoints / str(self.step)
        if self._writer:
            self._writer.best_step = self.best_step()
            record = {**dataclasses.asdict(self.history), "run": self._identity}
            if self.saved != path:
                self._writer.save(self.step, checkpoint.to_tree(self.state), record)
        self.saved = path

    def wait(self) -> None:
        """Blocks until the checkpoint under way is on disk."""
        if self._writer:
            self._writer.wait()

    def close(self) -> None:
        """Closes the log and the checkpoints, and ends what works in the background."""
        with contextlib.ExitStack() as stack:
            for part in filter(None, (self.log, self._writer, self.setup)):
                stack.callback(part.close)

    def write_result(self) -> None:
        """Writes what a finished run leaves, see `result.write`; the last step must be scored."""
        built, test = self.setup, self.scores["test"]
        trained = weights.Weights(
            model=built.describe_model(),
            variables=self._evaluated,
            mean=built.mean,
            std=built.std,
            class_names=self.dataset.class_names,
            training={"config": flatten(built.config)},
        )
        self.result = result.write(
            self.path,
            trained,
            test.as_record(),
            self.log.records,
            confusion=test.confusion.tolist(),
            facts={
                "data": self.dataset.name,
                "seed": self.config.seed,
                "steps": built.config.train.total_steps,
            },
            epoch=len(self.dataset.train),
            costs={
                # Time that a crash undid does not count.
                "seconds": round(self.history.seconds, 2),
                "images_per_second": round(self.images_per_second(), 1),
                **self._environment,
            },
        )
