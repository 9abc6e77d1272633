from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraga_dist.errors import RunError, UserError


def _load_script():
    path = Path(__file__).parents[2] / "launch" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


quickstart = _load_script()
# A model that any two steps make good enough; 5.6 nats is just above log(258), the loss of knowing nothing.
TWO_STEPS = {
    "num_layers": 2,
    "sequence_length": 32,
    "batch_size": 2,
    "max_steps": 2,
    "check_every_steps": 1,
    "heldout_windows": 2,
    "target_loss": 5.6,
}
TINY = quickstart.Recipe(hidden_size=256, intermediate_size=512, **TWO_STEPS)
TINY_MOE = quickstart.MoeRecipe(hidden_size=32, intermediate_size=16, **TWO_STEPS)
EVERY_BYTE = "".join(map(chr, (*range(0x800), *range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000))))
"""That UTF-8 has."""
TEXT = " naïve \t日本語 🎉\n\n  def f(x): 'don't' , . !\r\n\x00"


@pytest.fixture(scope="module", autouse=True)
def fast_builds() -> Iterator[None]:
    """One thread, which waits for no other on busy cores, and one reading of the standard library for all builds."""
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 1)
        patch.setattr(quickstart, "_standard_library", functools.cache(quickstart._standard_library))
        yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart.ensure_quickstart(tmp_path_factory.mktemp("build") / "quickstart", TINY)


def test_tokenizer_ids_are_the_bytes_and_decode_exactly(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == list(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (256, 256, 257)
    assert tokenizer(EVERY_BYTE)["input_ids"] == list(EVERY_BYTE.encode())
    assert sorted(tokenizer.get_vocab().values()) == list(range(258))


def test_saved_model_is_sharded_and_has_the_recorded_loss(built: Path) -> None:
    assert len(list((built / "model").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(built / "model")
    assert model.dtype == torch.float32
    assert not model.config.tie_word_embeddings
    recorded = json.loads((built / "recipe.json").read_text())["heldout_loss"]
    heldout_ids = quickstart._standard_library()[1]
    assert quickstart._heldout_loss(model, heldout_ids, TINY) == pytest.approx(recorded, abs=1e-4)


def test_a_mixture_of_experts_is_one_of_its_own(tmp_path: Path) -> None:
    directory = quickstart.ensure_quickstart(tmp_path / "moe", TINY_MOE)
    config = AutoModelForCausalLM.from_pretrained(directory / "model").config
    assert (config.model_type, config.num_experts, config.num_experts_per_tok) == ("qwen3_moe", 8, 2)
    assert not config.output_router_logits, "the loss that balances experts is none of calibration's"
    recorded = json.loads((directory / "recipe.json").read_text())["recipe"]
    assert recorded["num_experts"] == 8 and "num_experts" not in quickstart.asdict(quickstart.Recipe())


def test_calibration_file(built: Path) -> None:
    rows = [json.loads(line) for line in (built / "calibration.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 256
    assert all(list(row) == ["text"] and 200 <= len(row["text"]) <= 400 for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)


def test_same_recipe_is_reused_and_another_is_rebuilt(tmp_path: Path) -> None:
    directory = tmp_path / "quickstart"
    recipe_file = quickstart.ensure_quickstart(directory, TINY) / "recipe.json"
    first = recipe_file.stat()
    quickstart.ensure_quickstart(directory, TINY)
    assert recipe_file.stat().st_ino == first.st_ino and recipe_file.stat().st_mtime_ns == first.st_mtime_ns
    quickstart.ensure_quickstart(directory, replace(TINY, version=TINY.version + 1))
    assert json.loads(recipe_file.read_text())["recipe"]["version"] == TINY.version + 1
    assert list(tmp_path.iterdir()) == [directory]


def test_a_model_that_did_not_learn_is_never_saved(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="needed below 0.1"):
        quickstart.ensure_quickstart(tmp_path / "quickstart", replace(TINY, target_loss=0.1))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    # Ctrl-C at the worst moment: the weights are written, the tokenizer and the recipe are not.
    monkeypatch.setattr(quickstart, "byte_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quickstart.ensure_quickstart(tmp_path / "quickstart", TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="--directory"):
        quickstart.ensure_quickstart(tmp_path, TINY)
    assert (tmp_path / "model").is_dir()


def _edit(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


@pytest.mark.parametrize(
    "change",
    [
        _edit("calibration.jsonl", '{"text": "mine"}\n'),
        _edit("model/config.json", "{}"),
        _edit("model/notes.txt", "mine"),
        _edit("notes.txt", "mine"),
        _edit("recipe.json", '{"flour": 500}'),
        _edit("recipe.json", "500 g of flour"),
    ],
)
def test_a_build_that_was_changed_is_left_alone(built: Path, change: Callable[[Path], object], tmp_path: Path) -> None:
    directory = shutil.copytree(built, tmp_path / "quickstart")
    change(directory)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--directory"):
        quickstart.ensure_quickstart(directory, replace(TINY, version=TINY.version + 1))
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("own", [[], ["notes.txt"]])
def test_a_build_of_an_earlier_version_is_known_by_its_names(built: Path, own: list[str], tmp_path: Path) -> None:
    directory = shutil.copytree(built, tmp_path / "quickstart")
    record = json.loads((directory / "recipe.json").read_text())
    assert record.pop("files")
    (directory / "recipe.json").write_text(json.dumps(record))
    for name in own:
        (directory / name).touch()
    assert quickstart._is_ours(directory) == (not own)


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_muon_steps_as_torchs_does(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    theirs, ours, wide = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [
        torch.optim.Muon([theirs], lr=0.03, weight_decay=0.0),
        quickstart.Muon([ours], 0.03, torch.bfloat16),
        quickstart.Muon([wide], 0.03, torch.float32),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((theirs, ours, wide), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(wide, theirs, rtol=0, atol=0.003)
    assert not torch.equal(wide, theirs)
