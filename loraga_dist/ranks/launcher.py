"""Who started this process, and which of how many it is: torchrun's variables, SLURM's, or an MPI's."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from loraga_dist.errors import UserError

MAX_SLURM_STEP_ID = 0xFFFFFFF0
"""Ids from here on are no steps of srun (batch script, interactive shell); SLURM_MAX_NORMAL_STEP_ID in slurm.h."""

FIRST_PORT, NUM_PORTS = 12000, 20000
"""Below the ports that Linux hands out by itself (from 32768), so that those are not in the way."""

MAX_RANKS = 2**17
MAX_NUMBER = 2**32 - 1
"""SLURM's ids and all else have 32 bits."""
MAX_PORT = 2**16 - 1

_LAUNCHERS = "start through deepspeed, torchrun, srun or mpirun"


@dataclass(frozen=True)
class LaunchedRank:
    """This process among those the launcher started, and where rank 0 waits for the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    launcher: str

    def variables(self) -> dict[str, str]:
        """The same in torchrun's names, which torch, DeepSpeed and accelerate read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class _Started:
    """What the program that starts processes says of this one."""

    by: str
    rank: int
    size: int
    size_variable: str


def find_launched_rank(environment: Mapping[str, str]) -> LaunchedRank:
    """Read the launcher's variables; without any the process is alone.

    torchrun's variables come first (deepspeed sets the same), then those of the innermost of mpirun and srun; mpirun's
    take mpi4py.
    Raises UserError when variables are missing, or when they would split one launch into several runs.
    """
    started = _started_by(environment)
    if "RANK" in environment:
        launched = _from_torch(environment)
        if started and started.size > 1:
            _require_one_run(environment, launched, started)
        return launched
    size = environment_int(environment, "WORLD_SIZE", started.size if started else 1, least=1, most=MAX_RANKS)
    if started is None:
        if size > 1:
            raise UserError("RANK", None, f"is not set although WORLD_SIZE is {size}; {_LAUNCHERS}")
    elif size != started.size:
        raise UserError(
            "WORLD_SIZE", size, f"{started.by} started {started.size} processes ({started.size_variable}); unset it"
        )
    elif size > 1:
        return (_from_slurm if started.by == "srun" else _from_mpi)(environment, started)
    return LaunchedRank(0, 1, 0, 1, "127.0.0.1", 0, "none")


def _started_by(environment: Mapping[str, str]) -> _Started | None:
    """The innermost of mpirun and srun: in a SLURM job mpirun starts its daemons through srun."""
    step_id = environment_int(environment, "SLURM_STEP_ID", MAX_SLURM_STEP_ID)
    in_step = step_id < MAX_SLURM_STEP_ID and "SLURM_STEP_NUM_TASKS" in environment
    if "OMPI_COMM_WORLD_SIZE" in environment:
        by, rank, size = "mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"
    elif "PMI_SIZE" in environment and (not in_step or "MPI_LOCALRANKID" in environment):
        by, rank, size = "mpirun", "PMI_RANK", "PMI_SIZE"  # `srun --mpi=pmi2` sets it too, but not Hydra's local rank
    elif in_step:
        by, rank, size = "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"
    else:
        return None
    num_ranks = environment_int(environment, size, least=1, most=MAX_RANKS)
    return _Started(by, environment_int(environment, rank, most=num_ranks - 1), num_ranks, size)


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether a program that waits for its processes started this one: a shell may end long before they do.

    Raises UserError as `find_launched_rank` does.
    """
    return bool({"TORCHELASTIC_RUN_ID", "CROSS_SIZE"} & environment.keys()) or _started_by(environment) is not None


def _from_torch(environment: Mapping[str, str]) -> LaunchedRank:
    size = environment_int(environment, "WORLD_SIZE", least=1, most=MAX_RANKS)
    rank = environment_int(environment, "RANK")
    if rank >= size:
        raise UserError("RANK", rank, f"is outside WORLD_SIZE {size}; {_LAUNCHERS}")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise UserError(name, None, f"is not set although RANK is {rank} of {size}; {_LAUNCHERS}")
    return LaunchedRank(
        rank,
        size,
        environment_int(environment, "LOCAL_RANK", 0, most=MAX_RANKS),
        local_size(environment),
        environment.get("MASTER_ADDR", "127.0.0.1"),
        environment_int(environment, "MASTER_PORT", 0, least=int(size > 1), most=MAX_PORT),
        "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "deepspeed" if "CROSS_SIZE" in environment else "RANK",
    )


def local_size(environment: Mapping[str, str]) -> int:
    """Ranks on this node; torchrun and deepspeed have different names for it."""
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"
    return environment_int(environment, name, 1, least=1, most=MAX_RANKS)


def _require_one_run(environment: Mapping[str, str], launched: LaunchedRank, started: _Started) -> None:
    """Raise UserError where every process that srun or mpirun started would be a run of its own."""
    agents = environment_int(environment, "GROUP_WORLD_SIZE", environment_int(environment, "CROSS_SIZE", 0))
    if agents:
        if agents < started.size:
            raise UserError(
                started.size_variable,
                started.size,
                f"{started.by} started {started.size} launchers, and this one's run has {agents}; tell "
                f"{launched.launcher} how many nodes there are and which this is, as launch/slurm/ does, or start one",
            )
    elif (launched.rank, launched.size) != (started.rank, started.size):
        raise UserError(
            "RANK",
            launched.rank,
            f"with WORLD_SIZE {launched.size} contradicts {started.by}, for which this is process {started.rank} of "
            f"{started.size}; unset RANK and WORLD_SIZE",
        )


def _from_slurm(environment: Mapping[str, str], started: _Started) -> LaunchedRank:
    address = environment.get("MASTER_ADDR")
    if not address:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
        address = "127.0.0.1" if alone else first_host(nodes)
    node = environment_int(environment, "SLURM_NODEID", 0)
    num_tasks = tasks_on_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(started.size)), node)
    job_id = environment_int(environment, "SLURM_JOB_ID", 0)
    step_id = environment_int(environment, "SLURM_STEP_ID", 0)
    return LaunchedRank(
        started.rank,
        started.size,
        environment_int(environment, "SLURM_LOCALID", most=MAX_RANKS),
        num_tasks,
        address,
        environment_int(environment, "MASTER_PORT", port_of_job(job_id, step_id), least=1, most=MAX_PORT),
        "slurm",
    )


def port_of_job(job_id: int, step_id: int = 0) -> int:
    """A port that all ranks of a job step know without talking; jobs that share a node differ."""
    return FIRST_PORT + (31 * job_id + step_id) % NUM_PORTS


def _from_mpi(environment: Mapping[str, str], started: _Started) -> LaunchedRank:
    """Rank, size and local rank as MPI has them; rank 0 tells the others where it waits."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # not installed, or no MPI library where it looks
        raise UserError(
            started.size_variable,
            started.size,
            f"mpirun's ranks need mpi4py and this MPI's library ({error}); pip install mpi4py",
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != started.size:
        library = MPI.Get_library_version().partition(",")[0].strip()
        raise UserError(
            started.size_variable,
            started.size,
            f"mpi4py sees {world.Get_size()} process: it loads {library}, which is not this mpirun's; "
            "put the mpirun of the same MPI on PATH, or install mpi4py against this one",
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    host = "127.0.0.1" if node.Get_size() == world.Get_size() else socket.gethostname()
    port = environment_int(environment, "MASTER_PORT", _free_port(), least=1, most=MAX_PORT)
    # no name of a host is as long as that
    buffer = bytearray(f"{port} {environment.get('MASTER_ADDR') or host}".encode()[:512].ljust(512))
    world.Bcast(buffer)
    port, _, address = buffer.decode(errors="replace").strip().partition(" ")
    launched = LaunchedRank(
        world.Get_rank(), world.Get_size(), node.Get_rank(), node.Get_size(), address, int(port), "mpi"
    )
    node.Free()
    MPI.Finalize()  # for mpirun a process that ends without it has crashed
    return launched


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short form: `rack[1-2]n[01-02],login` -> `rack1n01`.

    Raises UserError when it is none.
    """
    match = re.match(r"(?:[^,\[\]]|\[\d+[^\[\]]*\])+(?=,|$)", nodelist)
    if not match:
        raise UserError("SLURM_JOB_NODELIST", nodelist, "is no list of nodes; set MASTER_ADDR to the first node")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])


def tasks_on_node(text: str, node: int) -> int:
    """Tasks on one node from SLURM's short form: of `2(x3),1` nodes 0 to 2 have 2, and node 3 has 1.

    Raises UserError when it is none, or has fewer nodes.
    """
    num_nodes = 0
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,8})(?:\(x(\d{1,9})\))?", part, re.ASCII)
        if not match:
            raise UserError("SLURM_STEP_TASKS_PER_NODE", text, "is not understood; start through srun")
        num_nodes += int(match[2] or 1)
        if node < num_nodes:
            return int(match[1])
    raise UserError("SLURM_NODEID", node, f"is outside SLURM_STEP_TASKS_PER_NODE, which has {num_nodes} nodes")


def environment_int(
    environment: Mapping[str, str], name: str, default: int | None = None, *, least: int = 0, most: int = MAX_NUMBER
) -> int:
    """The number in a variable; raises UserError when it is out of bounds, or when there is none and no default."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        problem = "is not set although other variables of a launcher are" if text is None else "is not a number"
        raise UserError(name, text, f"{problem}; {_LAUNCHERS}") from None
    if not least <= number <= most:
        raise UserError(name, number, f"is not between {least} and {most}; {_LAUNCHERS}")
    return number
