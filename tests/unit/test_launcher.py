"""Which process am I: every launcher's variables, as they set them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from loraga_dist.errors import UserError
from loraga_dist.ranks.launcher import (
    find_launched_rank,
    first_host,
    has_launcher,
    port_of_job,
    tasks_on_node,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_STEP_NODELIST": "gpu[08-09]",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
"""One of `srun --nodes 2 --ntasks 6` in a job of three nodes."""

BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[07-09]",
}
"""A batch script, which srun did not start, in a job of six tasks."""

SRUN_OF_TWO_AGENTS = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


def test_alone_without_a_launcher() -> None:
    assert (find_launched_rank({}).rank, find_launched_rank({}).size) == (0, 1)


@pytest.mark.parametrize(("variables", "name"), [(TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed")])
def test_torch_variables(variables: dict[str, str], name: str) -> None:
    found = find_launched_rank(variables)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.master_addr, found.master_port, found.launcher) == ("node0", 29500, name)


def test_srun() -> None:
    found = find_launched_rank(SRUN)
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 6, 1, 2)
    assert (found.master_addr, found.master_port, found.launcher) == ("gpu08", port_of_job(7, 2), "slurm")


def test_srun_on_one_node_needs_no_name() -> None:
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0"}
    assert find_launched_rank(SRUN | one_node).master_addr == "127.0.0.1"


def test_address_and_port_of_the_user_win() -> None:
    found = find_launched_rank(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000", "WORLD_SIZE": "6"})
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 4000)


def test_a_launched_rank_reads_back_as_torch_variables() -> None:
    found = find_launched_rank(SRUN)
    again = find_launched_rank(SRUN | found.variables())
    assert again.variables() == found.variables()


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED])
def test_torch_variables_come_before_srun(variables: dict[str, str]) -> None:
    assert find_launched_rank(SRUN_OF_TWO_AGENTS | variables).size == 8


def test_batch_script_and_interactive_shell_are_one_process() -> None:
    assert find_launched_rank(BATCH).size == 1
    assert find_launched_rank(BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "6"}).size == 1


def test_a_single_task_is_one_process() -> None:
    assert find_launched_rank(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).size == 1
    assert find_launched_rank({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).size == 1


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node0"}, "MASTER_PORT"),
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK"),
        # six tasks, each of which would be rank 0 of 1
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "RANK"),
        (SRUN | {"WORLD_SIZE": "1"}, "WORLD_SIZE"),
        # six launchers, each of which believes to be the only one, or one of two
        (SRUN | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS"),
        (SRUN | DEEPSPEED, "SLURM_STEP_NUM_TASKS"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "RANK": "0", "WORLD_SIZE": "1"}, "RANK"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "WORLD_SIZE": "1"}, "WORLD_SIZE"),
        (SRUN | {"SLURM_NODEID": "2"}, "SLURM_NODEID"),
    ],
)
def test_what_does_not_fit_together_is_refused(variables: dict[str, str], key: str) -> None:
    with pytest.raises(UserError) as refused:
        find_launched_rank(variables)
    assert refused.value.key == key


NUMBERS = ("", " ", "one", "-1", "1.5", "1e9", "9" * 20, "9" * 5000, "0x10", "\u0661\u0662\u0663" * 4)
"""No rank, size or port is any of these."""


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        (TORCHRUN, ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]),
        (DEEPSPEED, ["LOCAL_SIZE"]),
        (SRUN, ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_JOB_ID"]),
        (SRUN, ["SLURM_STEP_ID", "MASTER_PORT", "WORLD_SIZE"]),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ["PMI_RANK", "PMI_SIZE"]),
    ],
)
def test_what_is_no_number_of_its_kind_is_refused(variables: dict[str, str], names: list[str]) -> None:
    for name in names:
        for number in NUMBERS:
            with pytest.raises(UserError) as refused:
                find_launched_rank(variables | {name: number})
            said = str(refused.value)
            assert name in said and len(said) < 500, (name, number, said)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT: 70000: is not between 1 and 65535"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT: 0: is not between 1 and 65535"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR: None: is not set although RANK is 5 of 8"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE: 0: is not between 1 and"),
        (TORCHRUN | {"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE: 0: is not between 1 and"),
        (DEEPSPEED | {"LOCAL_SIZE": "0"}, "LOCAL_SIZE: 0: is not between 1 and"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x99999999999)"}, "SLURM_STEP_TASKS_PER_NODE: "),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "99999999"}, "SLURM_STEP_NUM_TASKS: 99999999: is not between 1 and"),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK: 2: is not between 0 and 1"),
    ],
)
def test_numbers_out_of_bounds_are_named_with_their_bounds(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        find_launched_rank(variables)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, SRUN, {"PMI_RANK": "0", "PMI_SIZE": "1"}])
def test_launchers_are_told_from_shells(variables: dict[str, str]) -> None:
    assert has_launcher(variables)
    by_hand = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "1"}
    assert not any(has_launcher(shell) for shell in ({}, BATCH, by_hand))


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "8"},
        {"PMI_RANK": "1", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"},
    ],
)
def test_mpirun_inside_a_slurm_job_is_not_taken_for_its_daemons(variables: dict[str, str]) -> None:
    """mpirun starts a daemon per node through srun, and the ranks inherit its variables."""
    with pytest.raises(UserError, match="mpirun started 8"):
        find_launched_rank(SRUN_OF_TWO_AGENTS | variables | {"WORLD_SIZE": "2"})


def test_variables_of_pmi2_under_srun_are_sruns() -> None:
    assert find_launched_rank(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "6"}).launcher == "slurm"


FIRST_HOSTS = {
    "node0": "node0",
    "n[1-3]": "n1",
    "n[08-11,7],login": "n08",
    "ib-[001-002],gpu-a[9-10]": "ib-001",
    "rack[1-2]n[01-02],other": "rack1n01",
    "login,n[1-3]": "login",
    "n[0998-1002]": "n0998",
    "x[1-2]y[3,5-6]": "x1y3",
}


@pytest.mark.parametrize("nodelist", FIRST_HOSTS)
def test_first_host(nodelist: str) -> None:
    assert first_host(nodelist) == FIRST_HOSTS[nodelist]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="SLURM is not installed")
@pytest.mark.parametrize("nodelist", FIRST_HOSTS)
def test_first_host_as_slurm_reads_it(nodelist: str, tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\n")
    command = ["scontrol", "show", "hostnames", nodelist]
    env = {"SLURM_CONF": str(conf)}
    slurms = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=30)
    assert first_host(nodelist) == slurms.stdout.split()[0]


@pytest.mark.parametrize("nodelist", ["", "n[1-", "n[a-b]", "n]1[", ",n1"])
def test_no_nodelist(nodelist: str) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        first_host(nodelist)


def test_task_counts() -> None:
    assert [tasks_on_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    assert tasks_on_node("4", 0) == 4
    assert tasks_on_node("1(x999999999)", 10**8) == 1
    for text in ("2(y3)", "", "0", "1(x99999999999)", "1,,1"):
        with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE"):
            tasks_on_node(text, 1)
    with pytest.raises(UserError, match="SLURM_NODEID: 4: is outside SLURM_STEP_TASKS_PER_NODE, which has 4 nodes"):
        tasks_on_node("2(x3),1", 4)


def test_ports_of_neighbouring_jobs_and_steps_differ() -> None:
    ports = {port_of_job(job, step) for job in range(10**6, 10**6 + 50) for step in range(10)}
    assert len(ports) == 500
    assert min(ports) >= 12000 and max(ports) < 32000
