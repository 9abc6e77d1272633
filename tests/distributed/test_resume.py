"""Runs that were asked to stop and went on, on as many ranks or others, end with what one that was not ends with."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_tree, save_data, save_model
from launching import Finished, succeed
from outputs import captured_shares, flip_bit, read_products, read_report, relative, write_config
from ranks import finish_on_ranks
from safetensors.torch import load_file, save_file
from stopping import StopAfter, init_until

from loraga_dist.artifacts import layout
from loraga_dist.artifacts.residual import plan_model_files
from loraga_dist.artifacts.verify import verify
from loraga_dist.config import load_config
from loraga_dist.files.checkpoint import Checkpoint, CheckpointStore
from loraga_dist.files.checksums import write_checksums
from loraga_dist.gradients.saved import require_state
from loraga_dist.ranks.session import run_as_rank
from loraga_dist.ranks.stop import StopRequest
from loraga_dist.ranks.words import leave_process
from loraga_dist.ranks.world import World
from loraga_dist.request.request import understand
from loraga_dist.run.pipeline import run

SKETCH = ("--gradient.engine", "sketch", "--gradient.oversampling", "24", "--gradient.refine_passes", "1")
IN_GROUPS = ("--gradient.max_targets_in_flight", "9")
UP_TO_THE_WRITING = 11 + 21 + 1
"""Looks: after every microbatch, after every target's factors, between phases, before every file."""
UP_TO_THE_THIRD_FILE = UP_TO_THE_WRITING + 3
ONE_PASS = ("--gradient.engine", "sketch", "--gradient.oversampling", "24", "--gradient.refine_passes", "0")


def leave_by_init(num_looks: int, config_path: Path, overrides: Sequence[str]) -> None:
    leave_process(init_until(num_looks, config_path, overrides))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    return write_config(config_tree(save_model(root / "base"), save_data(root / "data.jsonl", rows=21), root / "out"))


def start(config: Path, out: Path, world_size: int, *, stop: int = 0, overrides: Sequence[str] = ()) -> list[Finished]:
    overrides = ["--output.dir", str(out), *overrides]
    if world_size > 1:
        return finish_on_ranks(leave_by_init, world_size, stop, config, overrides)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = init_until(stop, config, overrides)
    return [Finished(code, "", stderr.getvalue())]


@pytest.fixture(scope="module")
def exact(config: Path) -> Path:
    """What the exact engine gives, to which batches, groups of targets and ranks make no difference."""
    out = config.parent / "exact"
    succeed(start(config, out, 1))
    return out


# looks at the request: in model order, of one process, one after each microbatch; in block order one after each block
# on the way forward, before each on the way back, and after each pass of a group; and one between phases
@pytest.mark.parametrize(
    ("overrides", "stops", "ranks"),
    [(IN_GROUPS, (3, 9, 5), (1, 1, 1, 1)), (IN_GROUPS, (5, 3), (2, 1, 2)), ((), (11,), (1, 1))],
    ids=["groups", "groups-other-ranks", "at-the-end"],
)
def test_the_end_is_the_same(
    config: Path, exact: Path, tmp_path: Path, overrides: Sequence[str], stops: Sequence[int], ranks: Sequence[int]
) -> None:
    out = start_and_stop(config, tmp_path, [*overrides, *small_batches(ranks)], stops, ranks)
    products = read_products(out)
    for name, product in read_products(exact).items():
        # float32 sums that were begun in one process and ended in another
        assert relative(products[name], product) < 1e-5, name
    require_same_data(out, exact)


def test_a_chunk_that_some_groups_have_seen_counts_once(config: Path, exact: Path, tmp_path: Path) -> None:
    """Also where the next run is asked to stop before it has done anything."""
    out, overrides = tmp_path / "out", ("--gradient.order", "block", "--gradient.chunk_microbatches", "8")
    assert [rank.code for rank in start(config, out, 1, stop=7, overrides=overrides)] == [143]
    for _ in range(2):
        *_, newest = sorted((tmp_path / ".out.checkpoint").iterdir())
        assert json.loads((newest / "state.json").read_text())["position"]["num_groups_ahead"] == 2
        assert [rank.code for rank in start(config, out, 1, stop=1, overrides=overrides)] == [143]
    succeed(start(config, out, 1, overrides=overrides))
    products = read_products(out)
    for name, product in read_products(exact).items():
        assert relative(products[name], product) < 1e-5, name


@pytest.mark.parametrize(
    ("overrides", "stops", "ranks", "least", "tolerance"),
    [
        (SKETCH, (5, 10), (2, 2, 2), 0.999, 1e-5),
        (SKETCH, (5, 7), (1, 2, 1), 0.999, 1e-3),  # other windows, hence not the same estimate
        (ONE_PASS, (2, 3), (1, 1, 1), 0.95, 1e-5),  # 32 columns instead of the default 112
    ],
    ids=["refined", "other-ranks", "one-pass"],
)
def test_the_sketch_loses_nothing(
    config: Path,
    exact: Path,
    tmp_path: Path,
    overrides: Sequence[str],
    stops: Sequence[int],
    ranks: Sequence[int],
    least: float,
    tolerance: float,
) -> None:
    overrides, uninterrupted = [*overrides, *small_batches(ranks)], tmp_path / "uninterrupted"
    succeed(start(config, uninterrupted, ranks[-1], overrides=overrides))
    out = start_and_stop(config, tmp_path, overrides, stops, ranks)
    # singular values that are close may trade places; the directions as a whole may not
    with_stops, without = (captured_shares(path, exact) for path in (out, uninterrupted))
    assert max(abs(with_stops[name] - without[name]) for name in without) < tolerance
    assert min(without.values()) > least
    require_same_data(out, uninterrupted)


def test_ranks_and_the_next_run_render_at_one_time(config: Path, tmp_path: Path) -> None:
    """A template that prints microseconds, where others print the date, which ranks meet at midnight."""
    base, data = save_model(tmp_path / "base"), tmp_path / "chats.jsonl"
    template = "{{ strftime_now('%H:%M:%S.%f') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "user", "content": "x" * length}]} for length in range(10, 31)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ["--model.name_or_path", str(base), "--calibration.data_files", str(data), *small_batches((2, 1))]
    start_and_stop(config, tmp_path, overrides, (5,), (2, 1))


def small_batches(ranks: Sequence[int]) -> list[str]:
    """As many sequences in a global microbatch, whether there are one or two ranks."""
    return ["--calibration.per_device_batch_size", "1" if 2 in ranks else "2"]


def start_and_stop(
    config: Path, directory: Path, overrides: Sequence[str], stops: Sequence[int], ranks: Sequence[int]
) -> Path:
    """The output of a run that was stopped so often, on so many ranks each time and the last."""
    out, before = directory / "out", set(directory.iterdir())
    for stop, world_size in zip(stops, ranks[:-1], strict=True):
        for rank in start(config, out, world_size, stop=stop, overrides=overrides):
            assert rank.code == 143, rank.stderr
        assert not out.exists() and (directory / ".out.checkpoint").is_dir()
    last = start(config, out, ranks[-1], overrides=overrides)
    succeed(last)
    assert "going on from" in last[0].stderr
    assert verify(out).problems == []
    assert set(directory.iterdir()) == before | {out}
    return out


def require_same_data(out: Path, reference: Path) -> None:
    report, expected = read_report(out), read_report(reference)
    for key in ("num_sequences", "num_supervised_tokens", "data_fingerprint", "refine_passes"):
        assert report[key] == expected[key]
    assert report["mean_loss"] == pytest.approx(expected["mean_loss"], rel=1e-5)


@pytest.fixture(scope="module")
def stopped(config: Path) -> Path:
    """A run of one process, stopped after its fourth microbatch."""
    out = config.parent / "stopped" / "out"
    assert [rank.code for rank in start(config, out, 1, stop=4)] == [143]
    return out.parent


def test_seconds_are_those_of_all_runs(config: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    (saved,) = (json.loads(path.read_text())["seconds"] for path in (tmp_path / "again").glob(".out.*/*/state.json"))
    started = time.monotonic()
    succeed(start(config, tmp_path / "again" / "out", 1))
    seconds_here = time.monotonic() - started
    found = read_report(tmp_path / "again" / "out")["seconds"]
    assert saved["calibrate"] > 0 and saved["total"] >= saved["load"] + saved["calibrate"]
    assert all(found[phase] > saved[phase] for phase in ("load", "calibrate", "total"))
    total = found.pop("total")
    assert sum(found.values()) <= total <= saved["total"] + seconds_here


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("--lora.r", "3"), "lora.r 4 and now it is 3"),
        (("--calibration.max_samples", "20"), "calibration.max_samples 256 and now it is 20"),
        (("--gradient.engine", "sketch"), "gradient.engine 'exact' and now it is 'sketch'"),
    ],
)
def test_other_work_is_refused_by_name(
    config: Path, stopped: Path, tmp_path: Path, overrides: Sequence[str], key: str
) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    (result,) = start(config, tmp_path / "again" / "out", 1, overrides=overrides)
    assert result.code == 2 and key in result.stderr and "resume: never" in result.stderr
    succeed(start(config, tmp_path / "again" / "out", 1, overrides=[*overrides, "--resume", "never"]))


def test_other_data_and_another_base_are_refused(config: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    out = tmp_path / "again" / "out"
    data = save_data(tmp_path / "data.jsonl", rows=21, seed=1)
    (result,) = start(config, out, 1, overrides=["--calibration.data_files", str(data)])
    assert result.code == 2 and "was saved with" in result.stderr
    base = save_model(tmp_path / "base", seed=1)
    (result,) = start(config, out, 1, overrides=["--model.name_or_path", str(base)])
    assert result.code == 2 and "was saved with" in result.stderr


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py"])
def test_a_base_with_another_file_beside_its_weights_is_refused_by_name(tmp_path: Path, name: str) -> None:
    base = save_model(tmp_path / "base")
    (base / "modeling_own.py").write_text("SCALE = 1\n")
    config = write_config(config_tree(base, save_data(tmp_path / "data.jsonl", rows=21), tmp_path / "out"))
    assert [rank.code for rank in start(config, tmp_path / "out", 1, stop=4)] == [143]
    before = (base / name).read_text()
    after = json.dumps(json.loads(before) | {"rms_norm_eps": 5.0}) if name == "config.json" else "SCALE = 2\n"
    (base / name).write_text(after)
    (result,) = start(config, tmp_path / "out", 1)
    assert result.code == 2 and f"was saved with base.{name} '" in result.stderr
    (base / name).write_text(before)
    (result,) = start(config, tmp_path / "out", 1)
    succeed([result])
    assert "going on from" in result.stderr


class ChangeAfter(StopAfter):
    """Asks for nothing; does something at one look."""

    def __init__(self, num_looks: int, change: Callable[[], object]) -> None:
        super().__init__(num_looks)
        self._change = change

    @property
    def signal_name(self) -> str | None:
        if super().signal_name is not None:
            self._change()
        return None


class ChangeBefore(StopRequest):
    """Changes something when all is understood and nothing of it loaded."""

    def __init__(self, change: Callable[[], object]) -> None:
        super().__init__()
        self._change = change

    def hold(self) -> None:
        self._change()
        super().hold()


@pytest.mark.parametrize("is_early", [False, True], ids=["writing", "loading"])
@pytest.mark.parametrize("name", ["weights", "config.json", "tokenizer_config.json"])
def test_a_base_that_changes_during_a_run_gives_no_output(tmp_path: Path, name: str, is_early: bool) -> None:
    base, other = save_model(tmp_path / "base"), save_model(tmp_path / "other", seed=1)
    config = write_config(config_tree(base, save_data(tmp_path / "data.jsonl", rows=21), tmp_path / "out"))

    def change() -> None:
        if name == "weights":
            shutil.copytree(other, base, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.json"))
        else:
            (base / name).write_text((base / name).read_text() + "\n")

    def work(world: World, _: StopRequest) -> None:
        stop = ChangeBefore(change) if is_early else ChangeAfter(UP_TO_THE_WRITING, change)
        run(load_config(config, []), world, stop)

    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert run_as_rank(work) == 3, stderr.getvalue()
    assert f"the base changed during the run ({name})" in stderr.getvalue() and "goes on" not in stderr.getvalue()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "other", "data.jsonl", "out.yaml"}


@pytest.mark.parametrize("file", ["state.json", "state-*.safetensors", "state.safetensors.index.json", "SHA256SUMS"])
def test_a_flipped_bit_leaves_the_generation_before(config: Path, stopped: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    out = tmp_path / "again" / "out"
    assert [rank.code for rank in start(config, out, 1, stop=3)] == [143]
    older, newer = sorted((tmp_path / "again" / ".out.checkpoint").iterdir())
    path = next(newer.glob(file))
    flip_bit(path, position=path.stat().st_size // 2)
    (result,) = start(config, out, 1)
    succeed(result)
    assert f"{newer} is damaged" in result.stderr and f"going on from {older}" in result.stderr
    assert verify(out).problems == []


def change_state(path: Path, change: Callable[[Any], object], tensors: str | None = None) -> None:
    """Change the JSON of a saved state, or this one of its tensors, and make the checksums fit again."""
    if tensors is None:
        content = json.loads((path / "state.json").read_text())
        change(content)
        (path / "state.json").write_text(json.dumps(content))
    else:
        index = json.loads((path / "state.safetensors.index.json").read_text())["weight_map"]
        held = load_file(path / index[tensors])
        held[tensors] = change(held[tensors])  # type: ignore[assignment]
        save_file(held, path / index[tensors])
    write_checksums(path, World.alone())


def test_a_state_of_other_types_leaves_the_generation_before(config: Path, stopped: Path, tmp_path: Path) -> None:
    """With fitting checksums: by an editor, or by a program that went wrong."""
    shutil.copytree(stopped, tmp_path / "again")
    out = tmp_path / "again" / "out"
    assert [rank.code for rank in start(config, out, 1, stop=3)] == [143]
    older, newer = sorted((tmp_path / "again" / ".out.checkpoint").iterdir())
    change_state(newer, lambda content: content["position"].update(num_samples="many"))
    (result,) = start(config, out, 1)
    succeed(result)
    assert f"{newer} is damaged (ValidationError" in result.stderr and f"going on from {older}" in result.stderr
    assert verify(out).problems == []


def test_states_that_are_all_of_other_shapes_are_said_and_left(
    config: Path, exact: Path, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    (path,) = (tmp_path / "again" / ".out.checkpoint").iterdir()
    change_state(path, lambda G_MN: G_MN[:-1], "model.layers.0.mlp.down_proj/G")
    (result,) = start(config, tmp_path / "again" / "out", 1)
    succeed(result)
    assert f"{path} is damaged (ValueError: G is" in result.stderr and "going on" not in result.stderr
    for name, product in read_products(exact).items():
        assert relative(read_products(tmp_path / "again" / "out")[name], product) < 1e-5, name


NAME = "model.layers.0.mlp.down_proj"
OF_JSON: list[Callable[[Any], object]] = [
    lambda content: content.pop("position"),
    lambda content: content.pop("data"),
    lambda content: content.update(engines=[]),
    lambda content: content.update(position=[]),
    lambda content: content["position"].update(group=1),
    lambda content: content["position"].update(num_samples=-1),
    lambda content: content["position"].update(num_samples=10**6),
    lambda content: content["position"].update(refinement=True),
    lambda content: content["position"].update(num_groups=2),
    lambda content: content["position"].update(num_groups_ahead=1),
    lambda content: content["position"].pop("refinement"),
    lambda content: content["position"].update(more=1),
    lambda content: content["position"]["totals"].update(num_tokens=1.5),
    lambda content: content["position"]["totals"].update(loss_sum=None),
    lambda content: content["data"].update(num_samples="21"),
    lambda content: content["data"].update(refine_passes=-1),
    lambda content: content["engines"][0].update(engines={}),
    lambda content: content["engines"][0]["engines"].append({}),
]
OF_SKETCH: list[Callable[[Any], object]] = [
    lambda content: content["engines"][0]["engines"][0]["counts"].pop(NAME),
    lambda content: content["engines"][0]["engines"][0]["counts"].update({NAME: [True, False, 1, 2, 0]}),
    lambda content: content["engines"][0]["engines"][0]["counts"].update({NAME: [1, False, 2, 2, 0]}),
    lambda content: content["engines"][0]["engines"][0]["counts"].update({NAME: None}),
]
OF_TENSORS: list[Callable[[Any], object]] = [
    lambda tensor: tensor[None].contiguous(),
    lambda tensor: tensor[:0],
    lambda tensor: tensor.half(),
    lambda tensor: tensor.double() if tensor.dtype != torch.float64 else tensor.float(),
]


@pytest.mark.parametrize("engine", ["exact", "sketch"])
def test_no_state_is_used_that_does_not_fit(config: Path, tmp_path: Path, engine: str) -> None:
    overrides = SKETCH if engine == "sketch" else ("--gradient.engine", "exact")
    assert [rank.code for rank in start(config, tmp_path / "out", 1, stop=4, overrides=overrides)] == [143]
    request = understand(load_config(config, overrides), World.alone(), reads_data=False)
    kept = tmp_path / "kept"
    (tmp_path / ".out.checkpoint").rename(kept)

    def problem_of(change: Callable[[Any], object] | None, tensor: str | None = None) -> str:
        directory = Path(shutil.copytree(kept, tmp_path / "changed"))
        if change is not None:
            change_state(directory / "000001", change, tensor)

        def check(saved: Checkpoint, num_finished: int | None) -> None:
            assert num_finished == 0
            require_state(saved, request.plan.groups, num_finished)

        found = CheckpointStore(directory, World.alone()).read(check)
        shutil.rmtree(directory)
        assert bool(found.newest) != bool(found.problems)
        return "".join(found.problems)

    assert problem_of(None) == ""
    for change in [*OF_JSON, *(OF_SKETCH if engine == "sketch" else [])]:
        assert "is damaged (" in problem_of(change), inspect.getsource(change)
    parts = ("E", "Y", "Z", "P", "Q", "S", "earlier_E", "captures") if engine == "sketch" else ("G", "E")
    for part in parts:
        for change in OF_TENSORS:
            may_be_any = part == "captures" and change is OF_TENSORS[1]  # as many as there were
            assert may_be_any or "is damaged (" in problem_of(change, f"{NAME}/{part}"), (
                part,
                OF_TENSORS.index(change),
            )


@pytest.mark.parametrize(
    ("damaged", "goes_on_from"), [("000001", "finished-000000"), ("finished-000000", None)], ids=["state", "group"]
)
def test_a_damaged_group_is_taken_again(config: Path, tmp_path: Path, damaged: str, goes_on_from: str | None) -> None:
    out, checkpoint = tmp_path / "out", tmp_path / ".out.checkpoint"
    assert [rank.code for rank in start(config, out, 1, stop=14, overrides=IN_GROUPS)] == [143]
    assert sorted(path.name for path in checkpoint.iterdir()) == ["000001", "finished-000000"]
    flip_bit(checkpoint / damaged / "state.json", position=10)
    (result,) = start(config, out, 1, overrides=IN_GROUPS)
    succeed(result)
    assert f"{checkpoint / damaged} is damaged" in result.stderr
    if goes_on_from is None:
        assert "going on from" not in result.stderr
    else:
        assert f"going on from {checkpoint / goes_on_from}" in result.stderr
    assert verify(out).problems == []


def test_a_damaged_checkpoint_is_said_and_left(config: Path, stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "again")
    flip_bit(next((tmp_path / "again" / ".out.checkpoint").glob("*/state.json")), position=10)
    (result,) = start(config, tmp_path / "again" / "out", 1)
    succeed(result)
    assert "is damaged (state.json: does not match SHA256SUMS)" in result.stderr and "going on" not in result.stderr


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "plan_model_files", partial(plan_model_files, max_shard_bytes=40_000))


@pytest.mark.usefixtures("small_files")
def test_finished_files_are_not_written_again(config: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / ".out.checkpoint" / "residual_base"
    (stopped,) = start(config, out, 1, stop=UP_TO_THE_THIRD_FILE)
    assert stopped.code == 143 and not (tmp_path / ".out.partial").exists()
    finished = {path.name: path.stat().st_ino for path in kept.glob("*.safetensors")}
    assert len(finished) == 2
    succeed(start(config, out, 1))
    residual = {path.name: path.stat().st_ino for path in (out / "residual_base").glob("*.safetensors")}
    assert finished.items() <= residual.items() and len(residual) > 3
    assert verify(out).problems == [] and not kept.exists()


@pytest.mark.usefixtures("small_files")
def test_a_finished_file_that_was_damaged_is_written_again(config: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / ".out.checkpoint" / "residual_base"
    start(config, out, 1, stop=UP_TO_THE_THIRD_FILE)
    flip_bit(next(kept.glob("*.safetensors")), position=-5)
    (refused,) = start(config, out, 1)
    assert refused.code == 3 and "verify: " in refused.stderr and not out.exists()
    succeed(start(config, out, 1))
    assert verify(out).problems == []


@pytest.mark.usefixtures("small_files")
def test_finished_files_of_other_factors_are_written_again(config: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "out", tmp_path / ".out.checkpoint" / "residual_base"
    start(config, out, 1, stop=UP_TO_THE_THIRD_FILE)
    (note, *_) = kept.glob("*.json")
    note.write_text(note.read_text().replace('"adapter": "', '"adapter": "0'))
    written_at = note.with_suffix("").stat().st_mtime_ns
    succeed(start(config, out, 1))
    assert (out / "residual_base" / note.stem).stat().st_mtime_ns != written_at
    assert verify(out).problems == []
