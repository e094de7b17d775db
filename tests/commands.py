"""Commands of the package, as separate processes that need not each import jax first.

A server imports it once, and forks for each command: `python -m` in all but that. Tests that are
about a process's own start, about signals or about several processes start real ones.
"""

import atexit
import contextlib
import functools
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 240  # seconds; a command that takes longer hangs


def run(module: str, *arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE ARGUMENTS`; returns its exit status and what it printed, as text."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        streams = [os.path.join(folder, name) for name in ("out", "err")]
        task = {"module": module, "arguments": arguments, "cwd": str(cwd), "streams": streams}
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        out, err = (pathlib.Path(path).read_text(errors="replace") for path in streams)
    return subprocess.CompletedProcess([module, *arguments], status, out, err)


@functools.cache
def _server() -> subprocess.Popen:
    # One thread: a process that forks must have no others.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.commands"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_close, server)
    return server


def _close(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()
    server.stdout.close()


def _serve() -> None:
    import resnet_flax.training.scoring
    import resnet_flax.training.train  # noqa: F401

    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        del os.environ[name]
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if not child:
            _become(**task)
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _become(module: str, arguments: list[str], cwd: str, streams: list[str]) -> None:
    """Runs a module as the main program, and ends."""
    os.chdir(cwd)
    with contextlib.ExitStack() as files:
        for number, path in enumerate(streams, 1):
            os.dup2(files.enter_context(open(path, "w")).fileno(), number)
        os.dup2(files.enter_context(open(os.devnull)).fileno(), 0)
    signal.alarm(TIMEOUT)  # By which the kernel ends it.
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    _serve()
