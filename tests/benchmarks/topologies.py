"""One run on several topologies, losses compared: `python -m tests.benchmarks.topologies`."""

import pathlib
import tempfile

import numpy as np

from tests import processes

# (processes, devices of each)
TOPOLOGIES = (1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (4, 1)


def main():
    """Prints a table of the largest relative differences from the first topology."""
    print("| batch-norm groups | processes | devices each | 10 steps | 60 steps | wrong of 359 |")
    print("|---|---|---|---|---|---|")
    for group in (0, 16):
        reference = None
        for count, devices in TOPOLOGIES:
            with tempfile.TemporaryDirectory() as folder:
                directory = pathlib.Path(folder) / "run"
                settings = {"train.cpu_devices": devices, "model.bn_group_size": group}
                processes.run(directory, count, settings=settings)
                losses = np.array(processes.losses(directory))
                wrong = processes.records(directory, "test")[-1]["wrong"]
            reference = losses if reference is None else reference
            away = np.abs(losses / reference - 1)
            cells = group or "whole batch", count, devices
            cells += f"{away[:10].max():.2g}", f"{away.max():.2g}", wrong
            print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
