"""Two processes of one run on this machine, told of each other as Slurm does."""

import os
import socket


def two_tasks() -> list[dict[str, str]]:
    """The variables that Slurm would set for each of two tasks on this machine."""
    both = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(_free_port()),
        "TPU_SKIP_MDS_QUERY": "1",  # a machine with the TPU library may have no TPU
    }
    return [both | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]


def _free_port() -> int:
    """One that stays free until the first task binds it: the system gives none below 32768 to
    whoever asks for any."""
    start = 16384 + os.getpid() % 8192
    for port in range(start, start + 8192):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")
