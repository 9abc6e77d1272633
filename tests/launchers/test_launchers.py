"""One run, whichever launcher starts its ranks, and a network between them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
from launching import INIT, ROOT, Finished, collect, free_port, run, run_together, start_together, succeed
from starts import SLOWLY, TinyRun

BIN = Path(sys.executable).parent
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
MPIRUN = "launch/mpi.sh -n 2 --"
TORCHRUN = "torchrun --standalone --nproc_per_node 2 launch/init.py"
DEEPSPEED = "deepspeed --num_gpus 2 --master_port {port} launch/init.py"
HOSTFILE = "deepspeed --hostfile {hostfile} --force_multi --no_ssh_check --launcher openmpi --master_addr 127.0.0.1 "
HOSTFILE += "launch/init.py"


def start(command: str, *arguments: str, env: Mapping[str, str] | None = None) -> Finished:
    """Run a launcher at the root of the repository, with the environment's programs."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    words = ["env", "--chdir", str(ROOT), *command.split(), *arguments]
    return run(words, env={"PATH": path, **OPEN_MPI, **(env or {})})


@pytest.mark.parametrize("command", [MPIRUN, DEEPSPEED, HOSTFILE], ids=["mpirun", "gpus", "hosts"])
def test_same_start(tiny: TinyRun, command: str, tmp_path: Path) -> None:
    """torchrun's is below, after a stop."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    command = command.format(port=free_port(), hostfile=hostfile)
    succeed(start(command, *tiny.options(tmp_path / "out")))
    tiny.require_same_start(tmp_path / "out")


LINE = "loraga-dist: lora.r: 0: input should be greater than or equal to 1"


def test_under_torchrun_an_error_is_said_once_and_its_summary_ends_with_it(tiny: TinyRun, tmp_path: Path) -> None:
    done = start(TORCHRUN, *tiny.options(tmp_path / "out"), "--lora.r", "0")
    lines = done.stderr.splitlines()
    assert done.code == 1 and lines.count(LINE) == 1
    assert lines[-2] == f"  traceback : {LINE}" and set(lines[-1]) == {"="}


def test_under_deepspeed_an_error_is_said_once_before_the_launchers_last_words(tiny: TinyRun, tmp_path: Path) -> None:
    done = start(DEEPSPEED.format(port=free_port()), *tiny.options(tmp_path / "out"), "--lora.r", "0")
    lines = (done.stdout + done.stderr).splitlines()
    assert done.code == 2 and lines.count(LINE) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def launchers_and_ranks(out: Path) -> dict[str, list[int]]:
    """Processes of the run that writes this directory, by what they are."""
    found: dict[str, list[int]] = {"launch.py": [], "rank": []}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has just ended
            continue
        if str(out) in words:
            if "deepspeed.launcher.launch" in words:
                found["launch.py"].append(int(path.name))
            elif words[1:3] == ["-u", "launch/init.py"]:
                found["rank"].append(int(path.name))
    return found


def state_of(pid: int) -> str | None:
    """As /proc has it: Z is a process that has ended and that nobody has asked for; None: there is none."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


@pytest.mark.parametrize(
    ("command", "who", "number"),
    [
        (TORCHRUN, "torchrun", signal.SIGKILL),
        (DEEPSPEED, "launch.py", signal.SIGKILL),
        (DEEPSPEED, "deepspeed", signal.SIGTERM),
    ],
    ids=["torchrun-killed", "launch.py-killed", "deepspeed-stopped"],
)
def test_no_rank_outlives_its_launcher_and_all_save(
    tiny: TinyRun, command: str, who: str, number: signal.Signals, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["env", "--chdir", str(ROOT), *command.format(port=free_port()).split(), *tiny.options(out), *SLOWLY]
    (process,) = start_together([words], [{"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}])
    try:
        tiny.wait_for_checkpoint(out)
        processes = launchers_and_ranks(out)
        assert len(processes["rank"]) == 2, processes
        # stopped, so that they cannot end before they look for their launcher
        for rank in processes["rank"]:
            os.kill(rank, signal.SIGSTOP)
        launcher = processes["launch.py"][0] if who == "launch.py" else process.pid
        os.kill(launcher, number)
        deadline = time.monotonic() + 20
        while state_of(launcher) not in ("Z", None):
            assert time.monotonic() < deadline, "the launcher goes on"
            time.sleep(0.02)
        for rank in processes["rank"]:
            os.kill(rank, signal.SIGCONT)
        while launchers_and_ranks(out)["rank"]:
            assert time.monotonic() < deadline, "ranks go on alone"
            time.sleep(0.1)
    finally:
        (done,) = collect([process], timeout_seconds=10)
    # rank 0 may hear of it from the other
    by, end = "(the end of its launcher|a request to another rank)", re.escape(f"{out.parent}/.out.checkpoint")
    said = re.findall(
        rf"^loraga-dist: stopped by {by}; the same command goes on from {end}$", done.stderr, re.MULTILINE
    )
    assert len(said) == 1, done.stderr
    if who == "torchrun":
        done = run(words, env={"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"})
        succeed(done)
        assert "going on from" in done.stderr
        tiny.require_same_start(out)


def test_mpirun_without_mpi4py_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('No module named mpi4py')\n")
    done = start(MPIRUN, *tiny.options(tmp_path / "out"), env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.code == 2
    assert "OMPI_COMM_WORLD_SIZE: 2: mpirun's ranks need mpi4py" in done.stderr and "Traceback" not in done.stderr


def test_mpi4py_of_another_mpi_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    """The variables of an mpirun that the loaded library does not understand: each rank would be alone."""
    done = start("python launch/init.py", *tiny.options(tmp_path / "out"), env={"PMI_RANK": "0", "PMI_SIZE": "2"})
    assert done.code == 2
    assert "PMI_SIZE: 2: mpi4py sees 1 process: it loads Open MPI" in done.stderr


ON_RANK_1 = 'if [ "$OMPI_COMM_WORLD_RANK" = 1 ]; then {}; fi; exec python launch/init.py "$@"'


def test_other_versions_on_a_rank_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    metadata = tmp_path / "peft-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
    script = ON_RANK_1.format(f'export PYTHONPATH="{tmp_path}:$PYTHONPATH"')
    done = start("mpirun -n 2 sh -c", script, "sh", *tiny.options(tmp_path / "out"))
    assert done.code == 2
    assert f"loraga-dist: peft: '{version('peft')}': is '9.9' on ranks [1]; install the same" in done.stderr


def test_another_configuration_on_a_rank_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    script = ON_RANK_1.format('set -- "$@" --calibration.seed 7')
    done = start("mpirun -n 2 sh -c", script, "sh", *tiny.options(tmp_path / "out"))
    assert done.code == 2
    assert "loraga-dist: calibration.seed: 42: is 7 on ranks [1]; start all ranks" in done.stderr


def test_world_size_alone_is_one_line(tiny: TinyRun, tmp_path: Path) -> None:
    done = start("python launch/init.py", *tiny.options(tmp_path / "out"), env={"RANK": "0", "WORLD_SIZE": "2"})
    assert done.code == 2
    assert done.stderr.startswith("loraga-dist: MASTER_ADDR: None: is not set") and done.stderr.count("\n") == 1


def test_a_rank_that_does_not_come_is_named(tiny: TinyRun, tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables = {**place, "LORAGA_RENDEZVOUS_SECONDS": "2"}
    done = start("python launch/init.py", *tiny.options(tmp_path / "out"), env=variables)
    assert done.code == 3
    assert f"rendezvous at 127.0.0.1:{place['MASTER_PORT']}: 1 of 2 ranks arrived within 2 s, not [1]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces joined by a cable: 10.213.0.1 and 10.213.0.2 on `net0`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"loraga-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("network namespaces are not allowed here")
        cable = ["ip", "-n", names[0], "link", "add", "net0", "type", "veth", "peer", "net0", "netns", names[1]]
        subprocess.run(cable, check=True)
        for number, name in enumerate(names, start=1):
            for command in ("link set lo up", f"addr add 10.213.0.{number}/24 dev net0", "link set net0 up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def on_hosts(hosts: list[str], arguments: Sequence[str]) -> tuple[list[list[str]], list[dict[str, str]]]:
    """Commands and variables of one rank per host."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.213.0.1", "MASTER_PORT": "4000", "GLOO_SOCKET_IFNAME": "net0"}
    commands = [["ip", "netns", "exec", host, sys.executable, INIT, *arguments] for host in hosts]
    return commands, [{"RANK": str(rank), **place} for rank in range(2)]


def test_same_start_over_a_network(tiny: TinyRun, two_hosts: list[str], tmp_path: Path) -> None:
    succeed(run_together(*on_hosts(two_hosts, tiny.options(tmp_path / "out"))))
    tiny.require_same_start(tmp_path / "out")


def test_a_cut_cable_ends_both_ranks_and_a_rerun_completes(tiny: TinyRun, two_hosts: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    commands, variables = on_hosts(two_hosts, [*tiny.options(out), *SLOWLY])
    processes = start_together(commands, variables)
    try:
        tiny.wait_for_checkpoint(out)
        subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "net0", "down"], check=True)
        cut_at = time.monotonic()
    finally:
        ranks = collect(processes, timeout_seconds=80)
    assert time.monotonic() - cut_at < 60
    assert [rank.code for rank in ranks] == [3, 3], ranks
    assert "loraga-dist: rank 1 " in ranks[0].stderr and "loraga-dist: rank 0 is gone" in ranks[1].stderr
    assert not out.exists()

    subprocess.run(["ip", "-n", two_hosts[0], "link", "set", "net0", "up"], check=True)
    again = run_together(commands, variables)
    succeed(again)
    assert "going on from" in again[0].stderr
    tiny.require_same_start(out)
