"""A real SLURM on this machine: one controller and two emulated nodes, private to the tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from launching import ROOT, Finished, free_port, run

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
NODES = {"n1": "127.0.1.1", "n2": "127.0.1.2"}


@dataclass(frozen=True)
class Cluster:
    """Where jobs are submitted."""

    conf: Path

    def run(
        self, command: Sequence[str], *, timeout_seconds: float = 120, env: Mapping[str, str] | None = None
    ) -> Finished:
        """Run one of SLURM's programs, in this environment and at the root of the repository."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return run(
            ["env", "--chdir", str(ROOT), *command],
            timeout_seconds=timeout_seconds,
            env={"SLURM_CONF": str(self.conf), "PATH": path, **(env or {})},
        )


def missing() -> str | None:
    """Why no SLURM can be started here, or None."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    if absent := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "mount namespaces are not allowed here, and the emulated nodes need their own /etc/hosts"
    return None


@contextmanager
def running(directory: Path) -> Iterator[Cluster]:
    """munge, slurmctld and a slurmd per node, all with files and ports of their own, until the block is left."""
    hostname = os.uname().nodename.partition(".")[0]
    cluster = Cluster(_write_configuration(directory, hostname))
    munged = ["munged", "--foreground", "--force"]
    for name in ("key-file", "socket", "pid-file", "log-file", "seed-file"):
        munged += [f"--{name}", str(directory / f"munge.{name}")]
    slurmctld = ["slurmctld", "-D", "-c", "-f", str(cluster.conf)]
    # node names resolve for jobs as they do on a cluster, without a change to this machine
    in_hosts = ["unshare", "--mount", "sh", "-c", f'mount --bind "{directory}/hosts" /etc/hosts && exec "$@"', "sh"]
    slurmds = [[*in_hosts, "slurmd", "-D", "-N", node, "-f", str(cluster.conf)] for node in NODES]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_start(munged, directory / "munged.out"))
        _wait_until(lambda: (directory / "munge.socket").exists(), directory)
        for number, command in enumerate([slurmctld, *slurmds]):
            daemons.append(_start(command, directory / f"slurm.{number}.out"))
        _wait_until(lambda: cluster.run(["sinfo", "--noheader", "--format=%D %T"]).stdout == "2 idle\n", directory)
        yield cluster
        cluster.run(["scancel", "--me"])
        _wait_until(lambda: not cluster.run(["squeue", "--noheader"]).stdout, directory)
    finally:
        for daemon in reversed(daemons):
            _stop(daemon)


def _write_configuration(directory: Path, hostname: str) -> Path:
    (directory / "munge.key-file").write_bytes(os.urandom(1024))
    (directory / "munge.key-file").chmod(0o400)
    names = "".join(f"{address} {node}\n" for node, address in NODES.items())
    (directory / "hosts").write_text(names + Path("/etc/hosts").read_text())
    # any device file can stand for a GPU
    (directory / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    nodes = "".join(
        f"NodeName={node} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={free_port()} CPUs=4 RealMemory=4000 "
        "Gres=gpu:2\n"
        for node in NODES
    )
    conf = directory / "slurm.conf"
    conf.write_text(
        f"""ClusterName=tests
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}PartitionName=tests Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
"""
    )
    return conf


def _start(command: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    # they end with these tests, however those end
    dying_with_us = ["setpriv", "--pdeathsig", "SIGKILL"]
    with output.open("wb") as file:
        return subprocess.Popen([*dying_with_us, *command], stdout=file, stderr=file, start_new_session=True)


def _wait_until(condition, directory: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(file.read_text() for file in sorted(directory.glob("*.out")))
            raise TimeoutError(f"SLURM is not there after {seconds} s\n{said}")
        time.sleep(0.1)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.wait()
