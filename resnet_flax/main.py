"""Trains or evaluates: `python -m resnet_flax.main --config=configs/resnet20.py`."""

import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import signal
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from resnet_flax import commands, signals
from resnet_flax.config import check_key, parse, validate
from resnet_flax.devices import cache, cpu, distributed, place
from resnet_flax.errors import UserError, first_line
from resnet_flax.runs import progress

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/; change a key with --config.optim.learning_rate=0.05."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; default: runs/<config>/seed<seed>, of several <config>."
)
_MODE = flags.DEFINE_string("mode", "train", "train or evaluate.")
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "evaluate: a weights file, the name of published weights, a run's directory, or one of its "
    "checkpoints (default: the newest of --workdir). train: a weights file, such a name, or a "
    "finished run's directory, to begin a new run from.",
)
_CHECKPOINT_DIR = flags.DEFINE_string(
    "checkpoint_dir",
    None,
    "Where a new run's checkpoints lie, a directory or a URL (gs://BUCKET/RUN) of this run alone; "
    "default: <workdir>/checkpoints. A run whose workdir was lost goes on from there.",
)
_JSON = flags.DEFINE_bool("json", False, "Print the result, or the scores, as JSON.")
_VERSION = flags.DEFINE_bool("version", False, "Print the version.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, on one machine or many, that train together."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where the others find it; default: $JAX_COORDINATOR_ADDRESS. Where "
    "it, or one of the next two, is not given, the cluster is asked: SLURM, Cloud TPU, Open MPI, "
    "Kubernetes.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes; default: $JAX_NUM_PROCESSES."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0; default: $JAX_PROCESS_ID."
)
_CONNECT_TIMEOUT = flags.DEFINE_float(
    "connect_timeout", 300.0, "Seconds to wait for the other processes at the start.", 1.0
)
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout", 60.0, "Seconds without a sign of life after which a process is lost.", 1.0
)

_FLAG_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


# Configs that once had a file of their own, by the file that now takes them as its argument.
_MOVED = {
    "paper": "plain20 plain32 plain44 plain56 plain110 resnet47_bottleneck",
    "identity_mappings": "resnet110_preact resnet164_preact",
    "imagenet": "resnet18 resnet34 resnet50 resnet101 resnet152 plain18 plain34",
    "stochastic_depth": "resnet110_stochastic_depth resnet1202_stochastic_depth",
}


def _locate(place: str) -> str:
    """Where the config file of "configs/modern.py:resnet56" lies: here, or with the package.

    Raises:
      UserError: there is no such text file.
    """
    given, colon, argument = place.partition(":")
    if not given:
        raise UserError("--config needs a file, for example --config=configs/resnet20.py")
    path = pathlib.Path(given)
    own = commands.configs() / path.name
    if path.parent == pathlib.Path("configs") and not path.exists() and own.exists():
        path = own
    try:
        path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        for file, moved in _MOVED.items():
            if path.stem in moved.split():
                net = path.stem.removesuffix("_stochastic_depth")
                raise UserError(f"{path} is now --config={path.parent}/{file}.py:{net}") from error
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"cannot read the config file {given!r}: {reason}; the project's are in configs/, "
            "for example --config=configs/resnet20.py or --config=configs/paper.py:plain20"
        ) from error
    return f"{path}{colon}{argument}"


def _parse(argv: list[str]) -> dict[str, str]:
    """Parses flags; returns the values of --config.KEY=VALUE, as text, by key.

    Without --config they change the configuration that a run or a weights file comes with.
    """
    given = {flag: os.environ.get(name) for flag, name in _FLAG_VARIABLES.items()}
    rest = [argv[0], *(f"--{flag}={value}" for flag, value in given.items() if value)]
    changes, config, arguments = {}, None, iter(argv[1:])
    for argument in arguments:
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag.startswith("config."):
            key = flag.removeprefix("config.")
            check_key(key)
            if not equals:
                raise UserError(f"{argument}: write --config.{key}=VALUE")
            changes[key] = value
        elif argument.startswith("-") and flag == "config":
            config = _locate(value if equals else next(arguments, ""))
        else:
            rest.append(argument)
    if config:
        rest.append(f"--config={config}")
        rest += [f"--config.{key}={parse(key, value)}" for key, value in changes.items()]
    sys.argv[:] = rest  # Where ml_collections looks for the changes; --config comes first.
    try:
        rest = flags.FLAGS(rest)
    except UserError:
        raise
    except SystemExit:
        sys.exit(0)  # From --help; absl's own status is 1.
    except flags.Error as error:
        raise UserError(str(error).strip().replace("\n", " ")) from error
    except Exception as error:  # A config file is Python: it can fail in any way.
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the configuration is wrong: {reason}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags begin with --")
    return changes


def _path(text: str | None) -> str | None:
    if text is None:
        return None
    if "://" in text:
        # pathlib would make a local directory of that name.
        raise UserError(
            f"{text}: runs and weights are read and written in local directories only; only "
            "--checkpoint_dir may be a URL"
        )
    try:
        return str(pathlib.Path(text).expanduser())
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error


def _directory(config: ConfigDict) -> str:
    """--workdir; by default configs/modern.py:resnet56 trains in runs/modern-resnet56/seed0."""
    path, colon, argument = flags.FLAGS["config"].config_filename.partition(":")
    name = pathlib.Path(path).stem + colon.replace(":", "-") + argument
    own = f"/seed{config.seed}" if config.train.num_seeds == 1 else ""
    return _path(_WORKDIR.value) or f"runs/{name}{own}"


def _train(config: ConfigDict | None, _: dict[str, str]) -> None:
    # Imported here: jax takes a second that a mistyped flag need not wait for.
    from resnet_flax.training import loop, train

    if config is None:
        raise UserError("no configuration given; try --config=configs/quickstart.py")
    path = pathlib.Path(_directory(config))
    checkpoint_dir = _CHECKPOINT_DIR.value
    if checkpoint_dir is not None and "://" not in checkpoint_dir:
        checkpoint_dir = os.path.abspath(_path(checkpoint_dir))
    result = train.train(config, path, _path(_WEIGHTS.value), checkpoint_dir)
    if not distributed.is_first():
        return
    if _JSON.value:
        print(json.dumps(result))
    elif loop.STOPPED in result:
        print(
            f"Stopped by {result['signal']} at step {result[loop.STOPPED]}; all is saved in "
            f"{path}. The same command goes on from there."
        )
    else:
        print(progress.summary(result, path))


def _evaluate(config: ConfigDict | None, changes: dict[str, str]) -> None:
    from resnet_flax.training import scoring

    directory, source = _path(_WORKDIR.value), _path(_WEIGHTS.value)
    if config is not None and not (directory or source):
        directory = _directory(config)
    warn = functools.partial(print, file=sys.stderr)
    with progress.Progress(distributed.index()).waiting("evaluating"):
        found = scoring.score(config, directory, source, warn, overrides=changes)
    if distributed.is_first():
        print(json.dumps(found) if _JSON.value else scoring.describe(found))


def _join() -> None:
    here = place.find_place(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    distributed.initialize(
        here, connect_timeout=_CONNECT_TIMEOUT.value, peer_timeout=_PEER_TIMEOUT.value
    )
    signals.end_on_interrupt(lambda: distributed.fail("interrupted", 130))


def _main(changes: dict[str, str]) -> None:
    modes = {"train": _train, "evaluate": _evaluate}
    if _MODE.value not in modes:
        raise UserError(f"--mode={_MODE.value} must be one of {', '.join(modes)}")
    config = _CONFIG.value
    if config is not None:
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"get_config() of the config file returns a {type(config).__name__}, must be a "
                "ConfigDict: begin with resnet_flax.config.base_config()"
            )
        validate(config)
    if _VERSION.value:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"resnet_flax {importlib.metadata.version('resnet_flax')}")
            return
        raise UserError("resnet_flax is not installed, only on the path: it has no version")
    # Libraries log every step at the default level.
    logging.set_verbosity(logging.WARNING)
    # An error in orbax's threads is raised, and printed, in the thread that waits for them.
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    if _DISTRIBUTED.value:
        _join()
    if distributed.count() == 1:
        cache.keep_programs()
    modes[_MODE.value](config, changes)
    _let_interrupts_kill()
    distributed.finish()


def _let_interrupts_kill() -> None:
    """A further Ctrl-C would fill the screen with tracebacks of Python's own end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(message: str) -> None:
    _let_interrupts_kill()
    print(message, file=sys.stderr)
    distributed.fail(message.removeprefix("error: "))
    sys.exit(1)


def run() -> None:
    """Entry point of `python -m resnet_flax.main`."""
    progress.outlive_readers()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Before anything large is allocated.
    cpu.keep_freed_memory()
    try:
        app.run(_main, flags_parser=_parse)
    except UserError as error:
        _end(f"error: {error}")
    except OSError as error:
        # A disk, a permission, a vanished directory: the machine's state, not a bug.
        where = f": {error.filename}" if error.filename else ""
        _end(f"error: {error.strerror or error}{where}")
    except Exception as error:
        from resnet_flax.devices import hardware

        if reason := hardware.why_none():
            _end(f"error: {reason}")
        if distributed.count() == 1:
            raise
        # A failed exchange of data is how one process first notices that another has gone.
        distributed.await_verdict()
        traceback.print_exc()
        _end(f"{type(error).__name__}: {first_line(error)}")


if __name__ == "__main__":
    run()
