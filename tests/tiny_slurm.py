"""A whole Slurm on this machine: one node with two devices that stand for GPUs, and no accounting."""

import os
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")


def hindrance():
    """Why there can be none here; "" if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"{', '.join(missing)} are not installed"
    return "" if os.geteuid() == 0 else "it needs root"


def _daemon(*command, **options):
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )


def _lives(file):
    """Whether the process lives whose number is in a file."""
    with suppress(OSError, ValueError):
        os.kill(int(file.read_text()), 0)
        return True
    return False


@contextmanager
def slurm(folder):
    """Start one below a folder; yields the environment that its commands need."""
    folder = Path(folder)
    host = socket.gethostname()
    for number in range(2):
        subprocess.run(["mknod", str(folder / f"gpu{number}"), "c", "1", "3"], check=True)
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (folder / "slurm.conf").write_text(
        f"""ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
MpiDefault=none
KillWait=2
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    for name in ("state", "spool"):
        (folder / name).mkdir()
    run = Path("/run/munge")
    run.mkdir(exist_ok=True)
    shutil.chown(run, "munge", "munge")
    own = not _lives(run / "munged.pid")
    if own:
        _daemon("runuser", "-u", "munge", "--", "munged", "--force", env=environment)
    try:
        _daemon("slurmctld", env=environment)
        time.sleep(1)
        _daemon("slurmd", env=environment)
        for _ in range(100):
            said = subprocess.run(
                ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False
            )
            if said.stdout.strip() == "idle":
                break
            time.sleep(0.2)
        else:
            raise RuntimeError((folder / "slurmctld.log").read_text() + (folder / "slurmd.log").read_text())
        yield environment
    finally:
        pids = [folder / "slurmd.pid", folder / "slurmctld.pid", *([run / "munged.pid"] if own else [])]
        for file in pids:
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), 15)
