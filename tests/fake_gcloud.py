"""A recording stand-in for gcloud: `$WORLD` holds its two workers' homes, its bucket, its states.

Commands sent to a worker are run, in that worker's home, by a shell, as ssh does.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

WORLD = pathlib.Path(os.environ["WORLD"])
HOMES = [WORLD / "workers" / str(i) for i in range(2)]


def state_of(kind):
    """The next of the states to play back; the last one stays."""
    file = WORLD / kind
    if not file.exists():
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/x' was not found")
    first, *rest = file.read_text().split("\n")
    if rest:  # Else unwritten: a state that the test sets meanwhile must not be lost.
        file.write_text("\n".join(rest))
    if first == "?":
        sys.exit("ERROR: (gcloud) Reauthentication failed.")
    print(first)


def chosen(options):
    worker = options["--worker"]
    return HOMES if worker == "all" else [HOMES[int(worker)]]


def tpus(kind, verb, name, *rest, **_):
    options = dict(word.partition("=")[::2] for word in rest if word.startswith("--"))
    if verb == "describe":
        state_of(kind)
    elif verb == "create":
        refusal = WORLD / "refusal"
        if refusal.exists():
            sys.exit(refusal.read_text())
        after = WORLD / f"after_{kind}"
        made = after.read_text() if after.exists() else "READY"
        (WORLD / kind).write_text(made)
        if kind == "queued-resources":
            (WORLD / "tpu-vm").write_text("READY")
        for home in HOMES:
            home.mkdir(parents=True, exist_ok=True)
    elif verb == "delete":
        (WORLD / kind).unlink()
        (WORLD / "tpu-vm").unlink(missing_ok=True)
    elif verb == "ssh":
        for home in chosen(options):
            environment = os.environ | {"HOME": str(home)}
            command = ["bash", "-c", options["--command"]]
            done = subprocess.run(command, cwd=home, env=environment, stdin=subprocess.DEVNULL)
            if done.returncode:
                sys.exit(done.returncode)
    elif verb == "scp":
        source, target = (word for word in (name, *rest) if not word.startswith("--"))
        if ":" in target:
            for home in chosen(options):
                shutil.copy(source, home / target.partition(":")[2])
        else:
            (home,) = chosen(options)
            path = home / source.partition(":")[2]
            shutil.copytree(path, pathlib.Path(target) / path.name)


def local(path):
    return WORLD / "bucket" / path[5:] if path.startswith("gs://") else pathlib.Path(path)


def storage(verb, *rest):
    if verb == "ls":
        return sys.exit(0 if local(rest[0]).exists() else 1)
    options = dict(word.partition("=")[::2] for word in rest if word.startswith("--"))
    source, target = (local(word) for word in rest if not word.startswith("--"))
    assert verb == "rsync"
    assert source.is_dir()
    assert "--recursive" in options
    left_out = re.compile(options.get("--exclude", "(?!)"))
    names = {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    names = {name for name in names if not left_out.match(name)}
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name)
    if "--delete-unmatched-destination-objects" in options:
        for path in [p for p in target.rglob("*") if p.is_file()]:
            if str(path.relative_to(target)) not in names:
                path.unlink()


with open(WORLD / "calls.jsonl", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\n")
if sys.argv[1:3] == ["compute", "tpus"]:
    tpus(*sys.argv[3:])
elif sys.argv[1] == "storage":
    storage(*sys.argv[2:])
elif sys.argv[1:] == ["config", "get-value", "project"]:
    project = WORLD / "project"
    print(project.read_text() if project.exists() else "p")
else:
    sys.exit(f"no such command: {sys.argv}")
