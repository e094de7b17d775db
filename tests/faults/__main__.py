"""Every case of the fault tests, counted: `python -m tests.faults`.

Writes a table to `results/faults.md` and what happened in each try to `results/faults.log`.
"""

import argparse
import pathlib
import shlex
import sys

import pytest

from tests.conftest import ROOT

INTRODUCTION = """\
Real training processes (`python -m resnet_flax.main`, ResNet-8 on the digits, 40 steps, a
checkpoint every 5, on one or two CPU devices), each disturbed as the table says. Survived: the same
command went on, where it had to be given again, and ended with parameters, statistics, momentum,
training records and weights equal to the bit to those of an undisturbed run, and nothing
half-written; or, where no program could go on, it stopped with the documented error and left intact
what was there.
"""


class Recorder:
    """The pytest plugin "faults": how often to try, and what came of it."""

    __name__ = "faults"  # By which pytest's plugin manager knows it.

    def __init__(self, tries: int):
        self.tries = tries
        self.rows: dict[str, list[int]] = {}
        self.lines: list[str] = []
        self._titles: dict[str, str] = {}

    def pytest_collection_finish(self, session):
        for item in session.items:
            title = item.function.__doc__.strip().splitlines()[0]
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            self._titles[item.nodeid] = title.format(**parameters)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        properties = report.user_properties
        tries, survived = dict(properties).get("tries", (1, int(report.passed)))
        notes = "; ".join(v for k, v in properties if k == "note")
        if report.skipped:
            tries, survived, notes = 0, 0, report.longrepr[2]
        row = self.rows.setdefault(self._titles[report.nodeid], [0, 0])
        row[0] += tries
        row[1] += survived
        name = report.nodeid.removeprefix("tests/faults/")
        self.lines.append(f"{report.outcome:8}{name}" + (f": {notes}" if notes else ""))
        if report.failed:
            self.lines.append(report.longreprtext)


def _header() -> list[str]:
    import jax

    from resnet_flax.runs import environment

    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    here = environment.describe(mesh)
    versions = ", ".join(f"{k} {v}" for k, v in here["versions"].items())
    return [
        f"Command: {shlex.join(['python', '-m', 'tests.faults', *sys.argv[1:]])}",
        f"Commit: {here['commit']}",
        f"Hardware: {here['hardware'].split(' as ')[0]}",
        f"Versions: Python {here['python']}, {versions}",
    ]


def _report(rows: dict[str, list[int]]) -> str:
    tries, survived = map(sum, zip(*rows.values(), strict=True))
    head = "\n".join(f"- {line}" for line in _header())
    table = "\n".join(
        f"| {title} | {tried or 'skipped'} | {of_them if tried else ''} |"
        for title, (tried, of_them) in rows.items()
    )
    return f"""# Faults

{INTRODUCTION}
{head}
- Tries: {tries}, of which the run survived {survived}. What happened in each:
  [faults.log](faults.log).

| what happens to the run | tries | survived |
|---|---|---|
{table}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--tries", type=int, default=4, help="of each case that has random moments")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results")
    parser.add_argument("-k", default="", help="only cases that match, as pytest's -k")
    arguments = parser.parse_args()
    recorder = Recorder(arguments.tries)
    folder = str(pathlib.Path(__file__).parent)
    status = pytest.main([folder, "-v", "-n0", "-k", arguments.k], plugins=[recorder])
    if not recorder.rows:
        return status
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "faults.log").write_text("\n".join([*_header(), "", *recorder.lines]) + "\n")
    (arguments.out / "faults.md").write_text(_report(recorder.rows))
    return status


if __name__ == "__main__":
    sys.exit(main())
