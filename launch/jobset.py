"""Fills in launch/jobset.yaml and hands it to kubectl.

    python launch/jobset.py --image=IMAGE --bucket=BUCKET --hosts=2 -- --config=configs/resnet110.py
    python launch/jobset.py --dry_run ... > my-jobset.yaml

On TPUs: --accelerator=tpu-v5-lite-podslice --topology=4x4 --chips=4, and as many hosts as the slice
has. With --claim in place of --bucket the run lies on a PersistentVolumeClaim (ReadWriteMany).
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import yaml

TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
PORT = 8476


def fill(manifest: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The manifest with the command line's values in it."""
    manifest["metadata"]["name"] = args.name
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    spec["completions"] = spec["parallelism"] = args.hosts
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    container["image"] = args.image
    values = {
        "--coordinator": f"{args.name}-{job['name']}-0-0.{args.name}:{PORT}",
        "--num_processes": args.hosts,
    }
    container["command"] = [
        f"{flag}={values[flag]}" if (flag := word.partition("=")[0]) in values else word
        for word in container["command"]
    ]
    # Kubernetes replaces $(X) in arguments; $$ stands for $.
    flags = [flag.replace("$(", "$$(") for flag in args.flags]
    container["args"] = [f"--workdir=/runs/{args.name}", *flags]
    if args.topology:
        resource = "google.com/tpu"
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": args.accelerator,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }
    else:
        resource = "nvidia.com/gpu"
        pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": args.accelerator}
    container["resources"] = {"limits": {resource: args.chips}}
    (runs,) = (volume for volume in pod["volumes"] if volume["name"] == "runs")
    if args.bucket:
        runs["csi"]["volumeAttributes"]["bucketName"] = args.bucket
        pod["serviceAccountName"] = args.service_account
    else:
        del runs["csi"], pod["serviceAccountName"], spec["template"]["metadata"]
        runs["persistentVolumeClaim"] = {"claimName": args.claim}
    return manifest


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, checked; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", default="resnet-flax", help="of the JobSet and of the run")
    add("--image", required=True, help="with this project, its dependencies and its folder")
    add("--hosts", type=int, default=2, help="pods, one process each")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--bucket", help="Cloud Storage bucket for /runs (GKE)")
    where.add_argument("--claim", help="PersistentVolumeClaim for /runs")
    add("--service_account", default="resnet-flax", help="may read and write the bucket")
    add("--accelerator", default="nvidia-h100-80gb", help="GKE's name of it")
    add("--topology", default="", help="of a TPU slice, such as 4x4")
    add("--chips", type=int, default=8, help="GPUs or TPU chips a host")
    add("--dry_run", action="store_true", help="print the manifest, submit nothing")
    add("flags", nargs="*", help="after --: of resnet_flax.main")
    args = parser.parse_args(argv)
    # Pods are named <name>-worker-0-<number>-<5 letters>, in at most 63 letters.
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", args.name):
        parser.error(f"--name={args.name!r}: up to 40 of a-z, 0-9 and -, a letter first")
    if args.bucket and not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", args.bucket):
        parser.error(f"--bucket={args.bucket!r}: the bucket's name alone, without gs:// or a path")
    for option in ("hosts", "chips"):
        if getattr(args, option) < 1:
            parser.error(f"--{option}={getattr(args, option)}: must be 1 or more")
    if not args.flags:
        parser.error("no flags of the program; for example -- --config=configs/resnet110.py")
    for flag in args.flags:
        if flag.startswith(("--workdir", "--distributed", "--coordinator", "--num_proc")):
            parser.error(f"{flag} is set by this script; name the run with --name")
    return args


def main(argv: list[str]) -> int:
    """Prints the manifest, or applies it; the exit status."""
    args = parse(argv)
    text = yaml.safe_dump(fill(yaml.safe_load(TEMPLATE.read_text()), args), sort_keys=False)
    if args.dry_run:
        print(text, end="")
        return 0
    if not shutil.which("kubectl"):
        print("error: kubectl is not on PATH; --dry_run prints the manifest", file=sys.stderr)
        return 1
    command = ["kubectl", "apply", "-f", "-"]
    done = subprocess.run(command, input=text, text=True, stderr=subprocess.PIPE)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        print(
            f"error: kubectl did not take the manifest: {reason} (its cluster: kubectl config "
            "current-context)",
            file=sys.stderr,
        )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
