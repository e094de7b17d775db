"""launch/jobset.yaml and jobset.py: what the JobSet schema (v1alpha2) and the program need."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT

FLAGS = ["--config=configs/resnet20.py", """--config.data.archive=it's "odd" $(HOME) é: #x"""]
NEEDED = ["--image=r/i:1", "--bucket=my-runs"]


def jobset(*arguments, **env):
    command = [sys.executable, f"{ROOT}/launch/jobset.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def filled(*arguments):
    done = jobset("--dry_run", *arguments)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def parts(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


@pytest.mark.parametrize("given", [None, [*NEEDED, "--hosts=16", "--name=mine", "--", *FLAGS]])
def test_the_manifest_is_whole(given):
    text = (ROOT / "launch/jobset.yaml").read_text()
    manifest = filled(*given) if given else yaml.safe_load(text)
    hosts, name = (16, "mine") if given else (2, "resnet-flax")
    job, pod, container = parts(manifest)
    spec, rules = job["template"]["spec"], manifest["spec"]["failurePolicy"]
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == name
    assert manifest["spec"]["network"]["enableDNSHostnames"] is True
    # All pods are made again when one fails, and none on its own.
    assert rules["maxRestarts"] == 3
    assert job["replicas"] == 1
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == hosts
    assert spec["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    # A preemption restarts the set without being counted.
    assert spec["podFailurePolicy"]["rules"][0]["action"] == "FailJob"
    (rule,) = rules["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]

    (variable,) = container["env"]
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert container["command"] == [
        *"bash launch/forward.sh python -m resnet_flax.main --distributed".split(),
        f"--coordinator={name}-{job['name']}-0-0.{name}:8476",
        f"--num_processes={hosts}",
        f"--process_id=$({variable['name']})",
    ]
    assert container["args"][0] == f"--workdir=/runs/{name}"
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts["runs"] == "/runs"
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    if given:
        # Kubernetes would put a variable's value in the place of $(HOME).
        assert container["args"][1:] == [FLAGS[0], FLAGS[1].replace("$(", "$$(")]
        assert container["image"] == "r/i:1"


def test_tpus_and_other_storage():
    tpu = ["--accelerator=tpu-v5-lite-podslice", "--topology=4x4", "--chips=4", "--hosts=4"]
    job, pod, container = parts(filled("--image=i", "--claim=disk", *tpu, "--", *FLAGS))
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    runs = {"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}
    assert runs in pod["volumes"]
    assert "metadata" not in job["template"]["spec"]["template"]
    _, pod, container = parts(filled(*NEEDED, "--accelerator=nvidia-l4", "--chips=2", "--", "x"))
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 2}}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}


def test_it_is_handed_to_kubectl(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/in\n'
        "echo 'E1126 memcache.go' >&2\necho 'The connection was refused' >&2\nexit 7\n"
    )
    kubectl.chmod(0o755)
    done = jobset(*NEEDED, "--", *FLAGS, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 7
    assert done.stderr.startswith("error: kubectl did not take the manifest: The connection")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert yaml.safe_load((tmp_path / "in").read_text()) == filled(*NEEDED, "--", *FLAGS)
    done = jobset(*NEEDED, "--", *FLAGS, PATH=str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: kubectl is not on PATH")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bucket=my-runs", "--", "x"], "--image"),
        (["--image=i", "--", "x"], "--bucket --claim"),
        (["--image=i", "--bucket=gs://b/c", "--", "x"], "without gs:// or a path"),
        ([*NEEDED, "--hosts=0", "--", "x"], "--hosts=0: must be 1 or more"),
        ([*NEEDED, "--name=Mine", "--", "x"], "--name='Mine'"),
        (NEEDED, "no flags of the program"),
        ([*NEEDED, "--", "--workdir=x"], "--workdir=x is set by this script"),
    ],
)
def test_wrong_use(arguments, message):
    done = jobset(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
