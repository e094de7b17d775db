"""Trains or evaluates: `python -m resnet_flax.main --config=configs/resnet20.py`."""

import itertools
import os
import pathlib
import signal
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from resnet_flax import signals
from resnet_flax.config import check_key, parse, validate
from resnet_flax.devices import cache, cpu, distributed
from resnet_flax.errors import UserError
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
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, on one machine or many, that train together."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    os.environ.get("JAX_COORDINATOR_ADDRESS"),
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


# Given without --config: changes of the configuration that a run or a weights file comes with.
_OVERRIDES: dict[str, str] = {}


# Configs that had a file of their own, by the one that now takes them as its argument.
_MOVED = {
    "paper": "plain20 plain32 plain44 plain56 plain110 resnet47_bottleneck",
    "identity_mappings": "resnet110_preact resnet164_preact",
    "imagenet": "resnet18 resnet34 resnet50 resnet101 resnet152 plain18 plain34",
    "stochastic_depth": "resnet110_stochastic_depth resnet1202_stochastic_depth",
}


def _check_config_file(path: str) -> None:
    try:
        pathlib.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        stem = pathlib.Path(path).stem
        for file, moved in _MOVED.items():
            if stem in moved.split():
                now = pathlib.Path(path).with_name(f"{file}.py")
                net = stem.removesuffix("_stochastic_depth")
                raise UserError(f"{path} is now --config={now}:{net}") from error
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"cannot read the config file {path!r}: {reason}; the project's are in configs/, for "
            "example --config=configs/resnet20.py"
        ) from error


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; whatever is wrong with them becomes a `UserError`."""
    named = any(arg.lstrip("-").partition("=")[0] == "config" for arg in argv[1:])
    rest = argv[:1]
    for arg, after in itertools.pairwise([*argv[1:], ""]):
        flag, equals, value = arg.lstrip("-").partition("=")
        if arg.startswith("-") and flag == "config":
            _check_config_file((value if equals else after).partition(":")[0])
        name, dot, key = flag.partition(".")
        if not arg.startswith("-") or name not in ("config", "noconfig") or not dot:
            rest.append(arg)
            continue
        check_key(key)
        if named:
            rest.append(f"--{flag}={parse(key, value)}" if equals else arg)
        elif not equals:
            raise UserError(f"--config.{key}: without --config, write --config.{key}=VALUE")
        else:
            _OVERRIDES[key] = value
    try:
        return flags.FLAGS(rest)
    except SystemExit:
        sys.exit(0)  # Of --help; absl's own status is 1.
    except flags.Error as error:
        raise UserError(str(error).strip().replace("\n", " ")) from error
    except UserError:
        raise
    except Exception as error:
        # A config file is Python: it, or an override's type, can fail in any way.
        lines = str(error).strip().splitlines() or [""]
        raise UserError(
            f"the configuration is wrong: {type(error).__name__}: {lines[0]}"
        ) from error


def _name_of(config_flag: str) -> str:
    """`configs/modern.py:resnet56` -> `modern-resnet56`."""
    path, _, argument = config_flag.partition(":")
    stem = pathlib.Path(path).stem
    return f"{stem}-{argument}" if argument else stem


def _config_file() -> str | None:
    flag = flags.FLAGS["config"]
    return getattr(flag, "config_filename", None) if flag.value is not None else None


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
    own = f"/seed{config.seed}" if config.train.num_seeds == 1 else ""
    return _path(_WORKDIR.value) or f"runs/{_name_of(_config_file())}{own}"


def _train(config: ConfigDict | None) -> None:
    # Imported here: jax takes a second that a mistyped flag need not wait for.
    from resnet_flax.training import loop, train

    if config is None:
        raise UserError("no configuration given; try --config=configs/quickstart.py")
    path = pathlib.Path(_directory(config))
    place = _CHECKPOINT_DIR.value
    if place is not None and "://" not in place:
        place = os.path.abspath(_path(place))
    result = train.train(config, path, _path(_WEIGHTS.value), place)
    if not distributed.is_first():
        return
    if loop.STOPPED in result:
        print(
            f"Stopped by {result['signal']} at step {result[loop.STOPPED]}; all is saved in "
            f"{path}. The same command goes on from there."
        )
    else:
        print(progress.summary(result, path))


def _evaluate(config: ConfigDict | None) -> None:
    from resnet_flax.training import scoring

    directory, source = _path(_WORKDIR.value), _path(_WEIGHTS.value)
    if config is not None and not (directory or source):
        directory = _directory(config)
    text = scoring.score(config, directory, source, overrides=_OVERRIDES)
    if distributed.is_first():
        print(text)


def main(argv: list[str]) -> None:
    """Runs the mode asked for."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")
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
    # Libraries tell of their every step at the default level.
    logging.set_verbosity(logging.WARNING)
    # What goes wrong in orbax's threads reaches the one that waits for them, and is said there.
    logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
    if _DISTRIBUTED.value:
        _join()
    if distributed.count() == 1:
        cache.keep_programs()
    modes[_MODE.value](config)
    _let_interrupts_kill()
    distributed.finish()


def _join() -> None:
    place = distributed.find_place(
        _COORDINATOR.value,
        _number(_NUM_PROCESSES, "JAX_NUM_PROCESSES"),
        _number(_PROCESS_ID, "JAX_PROCESS_ID"),
    )
    distributed.initialize(
        place, connect_timeout=_CONNECT_TIMEOUT.value, peer_timeout=_PEER_TIMEOUT.value
    )
    signals.end_on_interrupt(lambda: distributed.fail("interrupted", 130))


def _number(flag, variable: str) -> int | None:
    text = os.environ.get(variable)
    if flag.value is not None or not text:
        return flag.value
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{variable}={text} must be a whole number") from error


def _catch(function, *args):
    try:
        return function(*args)
    except UserError as error:
        _end(f"error: {error}", 1)
    except OSError as error:
        # A disk, a permission, a vanished directory: the machine's state, not a bug.
        where = f": {error.filename}" if error.filename else ""
        _end(f"error: {error.strerror or error}{where}", 1)
    except Exception as error:
        from resnet_flax.devices import hardware

        if reason := hardware.why_none():
            _end(f"error: {reason}", 1)
        if distributed.count() == 1:
            raise
        # A failed exchange of data is how one process first notices that another has gone.
        distributed.await_verdict()
        traceback.print_exc()
        _end(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 1)


def _let_interrupts_kill() -> None:
    """One more Ctrl-C is final: it would fill the screen with tracebacks of Python's own end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(message: str, status: int) -> None:
    _let_interrupts_kill()
    print(message, file=sys.stderr)
    distributed.fail(message.removeprefix("error: "), status)
    sys.exit(status)


def run() -> None:
    """Entry point of `python -m resnet_flax.main`."""
    progress.outlive_readers()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Before anything large is allocated.
    cpu.keep_freed_memory()
    app.run(lambda argv: _catch(main, argv), flags_parser=lambda argv: _catch(_parse, argv))


if __name__ == "__main__":
    run()
