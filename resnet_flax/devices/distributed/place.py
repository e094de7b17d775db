"""Which process this is, of how many, and where the first one is."""

import dataclasses

from resnet_flax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """A process's place among all.

    Attributes:
      address: "HOST:PORT" at which the others find the first process.
      count: number of processes.
      index: of this one, from 0.
      local_devices: the machine's accelerators that are this process's; None: all.
    """

    address: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        """The first process's host name or address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The first process's port."""
        return int(self.address.rpartition(":")[2])


def find_place(coordinator: str | None, count: int | None, index: int | None) -> Place:
    """The place given; what is not given is asked of the cluster.

    Clusters that JAX knows: SLURM, Cloud TPU, Open MPI, and Kubernetes (which needs the package
    `kubernetes`, a service account that may read pods and jobs, and completion mode Indexed).

    Args:
      coordinator: "HOST:PORT" of the first process, or None.
      count: number of processes, or None.
      index: of this one, from 0, or None.

    Raises:
      UserError: something is missing, or makes no sense.
    """
    local = None
    if None in (coordinator, count, index):
        coordinator, count, index, local = _ask_cluster(coordinator, count, index)
    named = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in named.items() if value is None]
    if missing:
        raise UserError(
            "--distributed: this is no cluster that JAX knows (SLURM, Cloud TPU, Open MPI, "
            f"Kubernetes), and {', '.join(missing)} is not given; for example "
            "--coordinator=10.0.0.1:12345 --num_processes=2 --process_id=0"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, as in 10.0.0.1:12345")
    if count < 1:
        raise UserError(f"--num_processes={count} must be at least 1")
    if not 0 <= index < count:
        raise UserError(
            f"--process_id={index} must lie in 0 to {count - 1}, with --num_processes={count}"
        )
    return Place(coordinator, count, index, None if local is None else tuple(local))


def _ask_cluster(coordinator, count, index):
    # JAX offers this only inside jax.distributed.initialize, which aborts where a line would do.
    from jax._src import clusters

    try:
        return clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, count, index, None, None, 60
        )
    except Exception as error:
        # A cluster's variables, or its server, can be wrong in any way.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--distributed: the cluster does not tell its processes: {reason}"
        ) from error
