"""Finds out which process this is, of how many, and where process 0 listens."""

from collections.abc import Sequence
from typing import NamedTuple

from resnet_flax.errors import UserError, first_line


class Place(NamedTuple):
    """One of the processes of a run."""

    address: str  # HOST:PORT where process 0 listens.
    count: int
    index: int  # From 0.
    local_devices: Sequence[int] | None = None  # The machine's accelerators for it; None: all.


def find_place(coordinator: str | None, count: int | None, index: int | None) -> Place:
    """This process's place; JAX asks the cluster for what is None.

    It knows SLURM, Cloud TPU, Open MPI, and Kubernetes (where it needs the package `kubernetes`, a
    service account that may read pods and jobs, and completion mode Indexed).

    Raises:
      UserError: something is missing or out of range.
    """
    given, local_devices = (coordinator, count, index), None
    if None in given:
        # jax.distributed.initialize does this too, but aborts the process where it fails.
        from jax._src.clusters import ClusterEnv

        try:
            detected = ClusterEnv.auto_detect_unset_distributed_params(*given, None, None, 60)
        except Exception as error:  # Each cluster fails in its own way.
            reason = f"the cluster does not tell its processes: {first_line(error)}"
            raise UserError(f"--distributed: {reason}") from error
        coordinator, count, index, local_devices = detected
    flags = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    if missing := ", ".join(flag for flag, value in flags.items() if value is None):
        raise UserError(
            f"--distributed: {missing} is not given, and this is no cluster that JAX knows (SLURM, "
            "Cloud TPU, Open MPI, Kubernetes); for example --coordinator=10.0.0.1:12345 "
            "--num_processes=2 --process_id=0"
        )
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, as in 10.0.0.1:12345")
    if not 0 <= index < count:
        raise UserError(f"--process_id={index} must be in 0 to --num_processes={count} minus 1")
    return Place(coordinator, count, index, local_devices)
