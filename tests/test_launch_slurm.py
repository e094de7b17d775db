"""launch/slurm.sbatch on a SLURM of the tests' own: `apt-get install slurm-wlm munge`, as root."""

import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import processes
from tests.conftest import ROOT

SCRIPT = f"{ROOT}/launch/slurm.sbatch"
MISSING = [t for t in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(t)]
needs_slurm = pytest.mark.skipif(
    bool(MISSING) or os.geteuid() != 0,
    reason=f"needs SLURM (apt-get install slurm-wlm munge; absent: {MISSING}) and root",
)

# A program that saves on SIGTERM and is done when started again; "fail" in its flags: task 1 fails.
PROGRAM = r"""#!/usr/bin/env bash
say() { echo "task $SLURM_PROCID $*"; }
say begins "${@@Q}"
[ "${SLURM_RESTART_COUNT-0}" = 0 ] || { say finished; exit 0; }
if [[ "$*" == *fail* && $SLURM_PROCID = 1 ]]; then exit 3; fi
trap 'say saved; exit 0' TERM
while :; do sleep 0.05; done
"""
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={path}/munge/socket
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/spool
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=20
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Three daemons in the foreground, in a directory that they may all enter."""

    def __init__(self, path):
        self.path, self.daemons = path, []
        self.env = os.environ | {"SLURM_CONF": f"{path}/slurm.conf"}
        for name in ("munge", "state", "spool", "jobs"):
            (path / name).mkdir()
        (path / "munge/key").write_bytes(os.urandom(128))
        (path / "munge/key").chmod(0o600)
        (path / "munge").chmod(0o711)
        host = socket.gethostname().partition(".")[0]
        text = CONFIGURATION.format(
            host=host, path=path, ports=[processes.free_port() for _ in range(2)]
        )
        (path / "slurm.conf").write_text(text)

    def start(self):
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        munge = [f"--{option}={self.path}/munge/{name}" for option, name in files.items()]
        self.daemon("munged", "--foreground", "--force", f"--log-file={self.path}/m.log", *munge)
        self.until(lambda: (self.path / "munge/socket").exists(), "munged")
        self.daemon("slurmctld", "-D")
        self.daemon("slurmd", "-D")
        self.until(lambda: "idle" in self.run("sinfo", check=False), "slurmctld and slurmd")

    def daemon(self, *command):
        with open(self.path / f"{command[0]}.out", "w") as out:
            self.daemons.append(
                subprocess.Popen(command, env=self.env, stdout=out, stderr=out, cwd=self.path)
            )

    def stop(self):
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(processes.HANG)

    def run(self, *command, check=True, **env):
        done = subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, cwd=self.path / "jobs"
        )
        assert not check or not done.returncode, done.stderr
        return done.stdout

    def until(self, condition, what):
        def explain():
            logs = "".join(p.read_text()[-1500:] for p in self.path.glob("*.out"))
            return f"waited in vain for {what}\n{logs}"

        processes.until(condition, explain)

    def submit(self, *flags, **env):
        return self.run(
            "sbatch", "--parsable", "--ntasks=2", "--job-name=t", SCRIPT, *flags, **env
        ).strip()

    def log(self, job):
        file = self.path / f"jobs/t-{job}.log"
        return file.read_text() if file.exists() else ""

    def describe(self, job):
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job)))

    def end(self, job):
        """Waits for the end; spares it the two minutes that SLURM lets a requeued job wait."""
        sooner = set()

        def ended():
            now = self.describe(job)
            if (now["JobState"], now["Reason"]) == ("PENDING", "BeginTime") and not sooner:
                # Not at once: SLURM has just revoked the job's credential, to the second.
                self.run("scontrol", "update", f"job={job}", "StartTime=now+3", check=False)
                sooner.add(job)
            return now["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

        self.until(ended, f"the end of job {job}:\n{self.log(job)}")
        return self.describe(job)


@pytest.fixture(scope="module")
def slurm():
    # Not below pytest's own directory, which only its owner may enter.
    path = pathlib.Path(tempfile.mkdtemp(prefix="slurm_"))
    path.chmod(0o755)
    slurm = Slurm(path)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program"
    file.write_text(PROGRAM)
    file.chmod(0o755)
    return {"PYTHON": str(file)}


def both(word, log):
    return all(f"task {i} {word}" in log for i in (0, 1))


@needs_slurm
def test_near_the_time_limit_it_saves_and_is_queued_again(slurm, program):
    flags = ["--config=a b", '--config.x=it\'s "$HOME"']
    job = slurm.submit(*flags, **program)
    slurm.until(lambda: both("begins", slurm.log(job)), "both tasks")
    # What SLURM itself sends because of --signal=B:TERM@120: to the batch script alone.
    slurm.run("scancel", "--batch", "--signal=TERM", job)
    end = slurm.end(job)
    log = slurm.log(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log
    assert both("saved", log)
    assert both("finished", log)
    assert "start number 2: 2 tasks" in log
    begun = [line.split(" ", 3)[3] for line in log.splitlines() if " begins " in line]
    assert len(begun) == 4
    for words in begun:
        assert shlex.split(words) == ["-m", "resnet_flax.main", "--distributed", *flags]


@needs_slurm
def test_a_cancelled_job_does_not_come_back(slurm, program):
    job = slurm.submit(**program)
    slurm.until(lambda: both("begins", slurm.log(job)), "both tasks")
    slurm.run("scancel", job)
    end = slurm.end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), slurm.log(job)
    slurm.until(lambda: both("saved", slurm.log(job)), "both tasks' saves")


@needs_slurm
def test_a_task_that_fails_ends_the_job(slurm, program):
    end = slurm.end(job := slurm.submit("--fail", **program))
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("FAILED", "0", "3:0")
    assert "finished" not in slurm.log(job)


def test_dry_run():
    command = ["bash", SCRIPT, "--dry_run", "--config=a b"]
    env = {"PATH": os.environ["PATH"], "PYTHON": "py", "SRUN_OPTIONS": "--cpu-bind=none -v"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert shlex.split(done.stdout) == [
        *"srun --kill-on-bad-exit=1 --cpu-bind=none -v py -m resnet_flax.main".split(),
        *["--distributed", "--config=a b"],
    ]
    del command[2]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "submit this script with sbatch" in done.stderr
    text = (ROOT / "launch/slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH (\S+)$", text, re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(options)


@pytest.mark.slow
@needs_slurm
def test_a_requeued_run_of_two_processes_ends_as_an_undisturbed_one(slurm, tmp_path):
    env = {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    settings = {"model.bn_group_size": 16, "train.cpu_devices": 1}
    flags = processes.flags(f"{ROOT}/configs/quickstart.py", **settings)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    job = slurm.submit(*flags, f"--workdir={whole}", **env)
    assert slurm.end(job)["JobState"] == "COMPLETED", slurm.log(job)

    job = slurm.submit(*flags, f"--workdir={parted}", **env)
    slurm.until(lambda: any(parted.glob("checkpoints/*/files.json")), "a checkpoint")
    slurm.run("scontrol", "requeue", job)
    end = slurm.end(job)
    log = slurm.log(job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), log
    (resumed,) = re.findall(r"resumed from step (\d+) of 24", log)
    assert 4 <= int(resumed) < 24
    assert json.loads((parted / "run.json").read_text())["devices"] == 2

    ours, theirs = (load_file(path / "weights.safetensors") for path in (parted, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
