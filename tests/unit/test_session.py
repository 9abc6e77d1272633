"""How a command ends, alone and on two real ranks: its exit code, and the one line that says why."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import finish_on_ranks

from loraga_dist.errors import LoragaError, Preempted, RunError, UserError
from loraga_dist.ranks.session import prepare_libraries, run_alone, run_as_rank
from loraga_dist.ranks.stop import STOP_SIGNALS, StopRequest
from loraga_dist.ranks.world import World

ERRORS: dict[str, Callable[[], BaseException]] = {
    "user": lambda: UserError("lora.r", 0, "must be 1 or more"),
    "run": lambda: RunError("the disk is full"),
    "preempted": lambda: Preempted("stopped by SIGUSR1"),
    "unknown": lambda: ValueError("what?"),
    "runtime": lambda: RuntimeError("shapes do not fit"),
    "interrupt": KeyboardInterrupt,
}
ENDS = {
    "user": (2, "lora.r: 0: must be 1 or more"),
    "run": (3, "the disk is full"),
    "preempted": (143, "stopped by SIGUSR1"),
    "unknown": (3, "ValueError: what? (LORAGA_DEBUG=1 prints the traceback)"),
    "runtime": (3, "RuntimeError: shapes do not fit (LORAGA_DEBUG=1 prints the traceback)"),
}


def raised(kind: str) -> None:
    raise ERRORS[kind]()


@pytest.mark.parametrize("run", [run_alone, run_as_rank])
@pytest.mark.parametrize("kind", ENDS)
def test_one_process(run: Callable[..., int], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = ENDS[kind]
    assert run(lambda *ranks: raised(kind)) == code
    assert capsys.readouterr().err == f"loraga-dist: {line}\n"


@pytest.mark.parametrize("run", [run_alone, run_as_rank])
@pytest.mark.parametrize("kind", ENDS)
def test_a_traceback_where_it_is_asked_for(
    run: Callable[..., int], kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAGA_DEBUG", "1")
    code, line = ENDS[kind]
    assert run(lambda *ranks: raised(kind)) == code
    *before, last = capsys.readouterr().err.splitlines()
    assert last == f"loraga-dist: {line.partition(' (LORAGA_DEBUG')[0]}"
    ours = issubclass(type(ERRORS[kind]()), LoragaError)
    assert bool(before) != ours, "only for what nobody foresaw"


def test_words_of_others_stay_on_one_line_and_do_not_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise ValueError("\x1b[2Jfirst\nsecond " + "long " * 1000)

    assert run_alone(work) == 3
    said = capsys.readouterr().err
    assert said.startswith(r"loraga-dist: ValueError: \x1b[2Jfirst second long") and said.count("\n") == 1
    assert len(said) < 700


def test_work_that_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    places = []
    assert run_as_rank(lambda world, stop: places.append((world.rank, world.size, stop.signal_name))) == 0
    assert run_alone(lambda: places.append("alone")) == 0
    assert places == [(0, 1, None), "alone"]
    assert capsys.readouterr() == ("", "")


def test_notes_have_lines_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    error = RunError("the first")
    error.add_note("the second")

    def work() -> None:
        raise error

    assert run_alone(work) == 3
    assert capsys.readouterr().err == "loraga-dist: the first\nloraga-dist: the second\n"


def test_a_launch_that_does_not_fit_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_as_rank(lambda world, stop: pytest.fail("there is no rank 1")) == 2
    assert "MASTER_ADDR: None: is not set although RANK is 0 of 2" in capsys.readouterr().err


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_scheduler_is_heard_while_work_goes_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    heard = []

    def work(world: World, stop: StopRequest) -> None:
        os.kill(os.getpid(), number)
        heard.append(stop.signal_name)

    assert run_as_rank(work) == 0
    assert heard == [number.name] and signal.getsignal(number) == before


def run_on_two(kind: str, who: int | None) -> None:
    """Every rank: rank `who` raises and the other waits for it; None: both raise, and know it."""

    def work(world: World, stop: StopRequest) -> None:
        if who is None:
            with world.together():
                raised(kind)
        if world.rank == who:
            raised(kind)
        world.barrier()

    sys.exit(run_as_rank(work))


@pytest.mark.parametrize("kind", ["user", "preempted", "unknown"])
def test_what_all_ranks_meet_rank_0_says(kind: str) -> None:
    code, line = ENDS[kind]
    results = finish_on_ranks(run_on_two, 2, kind, None)
    assert [result.code for result in results] == [code, code], results
    line = f"rank 0: {line}" if kind == "unknown" else line
    assert [result.stderr for result in results] == [f"loraga-dist: {line}\n", ""]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("kind", ["run", "unknown", "runtime"])
def test_what_one_rank_meets_ends_both(kind: str, who: int) -> None:
    code, line = ENDS[kind]
    results = finish_on_ranks(run_on_two, 2, kind, who)
    assert [result.code for result in results] == [code, code], results
    assert results[0].stderr == f"loraga-dist: rank {who} failed: {line}\n" and results[1].stderr == ""


def test_two_ranks_that_end_well_leave_without_a_word() -> None:
    results = finish_on_ranks(run_on_two, 2, "run", 2)
    assert [(result.code, result.stdout, result.stderr) for result in results] == [(0, "", "")] * 2


def test_an_interrupt_ends_at_once() -> None:
    (result,) = finish_on_ranks(run_on_two, 1, "interrupt", 0)
    said = "loraga-dist: interrupted; the same command goes on from the last checkpoint, if there was one\n"
    assert (result.code, result.stderr) == (130, said)


def gather_and_warn() -> None:
    prepare_libraries()
    World.start()
    dist.all_gather_into_tensor(torch.empty(2), torch.ones(1))
    warnings.warn("of the user's own code", UserWarning, stacklevel=1)


def test_only_known_noise_is_silenced() -> None:
    for result in finish_on_ranks(gather_and_warn, 2):
        assert result.code == 0 and "UserWarning: of the user's own code" in result.stderr
        assert result.stderr.count("Warning:") == 1, result.stderr
