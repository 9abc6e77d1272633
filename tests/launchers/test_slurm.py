"""A real SLURM of two emulated nodes runs what launch/slurm/ submits."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from cluster import Cluster
from launching import ROOT, Finished, succeed
from starts import SLOWLY, TinyRun

pytestmark = pytest.mark.timeout(240)

TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10"]
RANK_AND_SIZE = (
    "import os; from loraga_dist.ranks.launcher import find_launched_rank; "
    "launched = find_launched_rank(os.environ); print(launched.rank, launched.size)"
)


def submit(cluster: Cluster, script: Path | str, *arguments: str, log: Path) -> Finished:
    """Run a job; its exit code and its own output."""
    submitted = cluster.run(["sbatch", "--parsable", f"--output={log}", *TWO_NODES, str(script), *arguments])
    succeed(submitted)
    job = wait_for(cluster, submitted.stdout.strip())
    return Finished(int(job["ExitCode"].partition(":")[0]), log.read_text(), "")


def wait_for(cluster: Cluster, job_id: str, seconds: float = 150) -> dict[str, str]:
    """What SLURM says of a job that has ended. `sbatch --wait` looks only every half minute."""
    deadline = time.monotonic() + seconds
    while True:
        shown = cluster.run(["scontrol", "--oneliner", "show", "job", job_id])
        succeed(shown)
        job = dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)
        if job["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"):
            return job
        assert time.monotonic() < deadline, shown.stdout
        time.sleep(0.3)


@pytest.mark.parametrize("name", ["torchrun_per_node", "deepspeed_hostfile"])
def test_sbatch(cluster: Cluster, tiny: TinyRun, name: str, tmp_path: Path) -> None:
    # a path that a shell would take apart arrives as it is
    directory = tmp_path / "out $(touch shell) dir"
    succeed(submit(cluster, f"launch/slurm/{name}.sbatch", *tiny.options(directory), log=tmp_path / "log"))
    tiny.require_same_start(directory)
    assert not (ROOT / "shell").exists() and not list(ROOT.glob(".hostfile*"))


def test_a_preempted_job_goes_on_when_queued_again(cluster: Cluster, tiny: TinyRun, tmp_path: Path) -> None:
    directory, log = tmp_path / "out $(touch shell) dir", tmp_path / "log"
    shipped = "launch/slurm/srun_per_gpu.sbatch"
    submitted = cluster.run(
        ["sbatch", "--parsable", f"--output={log}", *TWO_NODES, shipped, *tiny.options(directory), *SLOWLY]
    )
    succeed(submitted)
    job_id = submitted.stdout.strip()
    tiny.wait_for_checkpoint(directory)
    succeed(cluster.run(["scancel", "--signal=USR1", job_id]))
    assert wait_for(cluster, job_id)["ExitCode"] == "143:0", log.read_text()
    assert "SIGUSR1" in log.read_text() and not directory.exists()

    succeed(cluster.run(["scontrol", "requeue", job_id]))
    assert wait_for(cluster, job_id)["ExitCode"] == "0:0", log.read_text()
    assert "going on from" in log.read_text()
    tiny.require_same_start(directory)
    assert not (ROOT / "shell").exists()


def test_a_failed_run_is_a_failed_job(cluster: Cluster, tiny: TinyRun, tmp_path: Path) -> None:
    arguments = [*tiny.options(tmp_path / "out"), "--lora.rank", "4"]
    done = submit(cluster, "launch/slurm/torchrun_per_node.sbatch", *arguments, log=tmp_path / "log")
    assert done.code != 0
    assert done.stdout.count("loraga-dist: lora.rank: 4: unknown key") == 2, "said, and repeated by torchrun"


def test_plain_srun_is_one_run(cluster: Cluster, tiny: TinyRun, tmp_path: Path) -> None:
    succeed(cluster.run(["srun", *TWO_NODES, "python", *tiny.arguments(tmp_path / "out")]))
    tiny.require_same_start(tmp_path / "out")


@pytest.mark.parametrize("variables", [["WORLD_SIZE=1"], ["RANK=0", "WORLD_SIZE=1"]])
def test_variables_that_contradict_srun_are_refused(
    cluster: Cluster, tiny: TinyRun, variables: list[str], tmp_path: Path
) -> None:
    place = ["MASTER_ADDR=127.0.0.1", "MASTER_PORT=4000"]
    done = cluster.run(["srun", *TWO_NODES, "env", *place, *variables, "python", *tiny.arguments(tmp_path / "out")])
    assert done.code == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("loraga-dist:")]) == 2
    assert "srun" in done.stderr


def test_one_torchrun_per_task_that_knows_no_other_is_refused(cluster: Cluster, tiny: TinyRun, tmp_path: Path) -> None:
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "1"]
    done = cluster.run(["srun", *TWO_NODES, *torchrun, *tiny.arguments(tmp_path / "out")])
    assert done.code != 0
    # by each of the two runs, and repeated by its torchrun
    assert done.stderr.count("srun started 2 launchers, and this one's run has 1") == 4
    assert not (tmp_path / "out").exists()


def test_who_is_alone_in_a_job(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/bash\npython -c "{RANK_AND_SIZE}"\nsrun -n 1 -N 1 python -c "{RANK_AND_SIZE}"\n')
    done = submit(cluster, script, log=tmp_path / "log")
    succeed(done)
    assert done.stdout == "0 1\n0 1\n"
    shell = cluster.run(["salloc", *TWO_NODES, "python", "-c", RANK_AND_SIZE])
    assert shell.stdout == "0 1\n"


@pytest.mark.parametrize("wrong", [[], ["--lora.rank", "4"]], ids=["verified", "failed"])
def test_training_waits_for_a_verified_start(cluster: Cluster, tiny: TinyRun, wrong: list[str], tmp_path: Path) -> None:
    init, train = tmp_path / "init.sbatch", tmp_path / "train.sbatch"
    shipped = (ROOT / "launch" / "slurm" / "srun_per_gpu.sbatch").read_text()
    sizes = f"#SBATCH {' '.join(TWO_NODES)} --output={tmp_path}/init.log"
    init.write_text(shipped.replace("set -euo pipefail", f"{sizes}\nset -euo pipefail"))  # the last word on them counts
    adapter = tmp_path / "out" / "loraga_init" / "adapter_model.safetensors"
    train.write_text(f"#!/bin/bash\n#SBATCH --output={tmp_path}/train.log\ncksum < '{adapter}'\n")

    script = ["launch/slurm/init_then_train.sh", str(init), str(train)]
    submitted = cluster.run([*script, *tiny.options(tmp_path / "out"), *wrong])
    succeed(submitted)
    init_id, train_id = re.findall(r"job (\d+)", submitted.stdout)
    training = wait_for(cluster, train_id)
    assert wait_for(cluster, init_id)["ExitCode"] == ("2:0" if wrong else "0:0")
    if wrong:
        assert training["JobState"] == "CANCELLED"
        assert not (tmp_path / "train.log").exists()
    else:
        assert training["JobState"] == "COMPLETED"
        assert (tmp_path / "train.log").read_text().split()[1] == str(adapter.stat().st_size)
        tiny.require_same_start(tmp_path / "out")
