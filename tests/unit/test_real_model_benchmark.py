"""The real-model benchmark, on a tiny random one: every row comes out, measures are what they claim, it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import byte_tokenizer, llama_config
from launching import ROOT, succeed
from ranks import run_script
from rate_report import Results
from real_model import Bench, Place, Settings, final_number
from real_model_inputs import gsm8k
from real_model_methods import ROWS, missing
from real_model_report import MARKERS, tables
from transformers import LlamaForCausalLM

from loraga_dist.errors import UserError

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `data` with GSM8K's two files."""
    root = tmp_path_factory.mktemp("inputs")
    LlamaForCausalLM(llama_config(num_hidden_layers=1)).bfloat16().save_pretrained(root / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "model")
    (root / "data").mkdir()
    for split, count in (("train", 40), ("test", 12)):
        rows = [
            {"question": "a" * (index % 7) + f"{index}+1?", "answer": f"{index}+1\n#### {index + 1}"}
            for index in range(count)
        ]
        too_long = {"question": "b" * 300, "answer": "#### 0"}
        lines = [json.dumps(row) for row in [*rows, too_long]]
        (root / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def _bench(inputs: Path, directory: Path, **changes: Any) -> Bench:
    files = gsm8k(inputs / "data", directory)
    settings = Settings(model="", data=(), device="cpu", **{"heldout_answers": 12, "batch_size": 2} | changes)
    return Bench(Place(checkpoint=inputs / "model", **files), settings)


def test_rows_and_batches(inputs: Path, tmp_path: Path) -> None:
    bench = _bench(inputs, tmp_path)
    assert (len(bench.training), len(bench.test)) == (40, 12)  # those that are too long are left out
    texts = [bench.tokenizer.decode(sample.inputs["input_ids"]) for sample in bench.test]
    assert sorted(texts) == sorted(
        f"<user>{'a' * (i % 7)}{i}+1?</s><assistant>{i}+1\n#### {i + 1}</s>" for i in range(12)
    )
    batches = list(bench.training_batches(20, seed=1))
    seen = [bench.tokenizer.decode(ids) for batch in batches for ids in batch["input_ids"]]
    assert len({text.replace("<pad>", "") for text in seen}) == 40  # one epoch
    assert not all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(batches, bench.training_batches(20, seed=2), strict=True)
        if a["input_ids"].shape == b["input_ids"].shape
    )


def test_losses_are_the_models_own(inputs: Path, tmp_path: Path) -> None:
    bench = _bench(inputs, tmp_path)
    bench.model.float()
    (batch,) = bench.training_batches(1, seed=0)
    torch.testing.assert_close(bench.loss(bench.model, batch), bench.model(**batch).loss)

    total, num_tokens = 0.0, 0
    for sample in bench.test:
        ids, labels = (torch.tensor([sample.inputs[name]]) for name in ("input_ids", "labels"))
        total += bench.model(input_ids=ids, labels=labels).loss.item() * sample.num_supervised_tokens
        num_tokens += sample.num_supervised_tokens
    assert bench.heldout_loss(bench.model) == pytest.approx(total / num_tokens, rel=1e-5)


def test_exact_matches_of_a_model_that_knows_one_answer(inputs: Path, tmp_path: Path) -> None:
    bench = _bench(inputs, tmp_path, generated_answers=2)
    known, other = bench.test[:2]
    model = bench.model.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    (microbatch,) = bench.microbatches([known], 1)
    assert bench.exact_matches(model) == 0
    for _ in range(60):
        bench.loss(model, microbatch.inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = [final_number(bench.tokenizer.decode(sample.inputs["input_ids"])) for sample in (known, other)]
    assert expected[0] != expected[1]
    assert bench.exact_matches(model) == 0.5  # it gives that answer to both questions


def test_final_number() -> None:
    assert final_number("2 + 2 = <<2+2=4>>4\n#### 1,234</s>") == "1234"
    assert final_number("#### -5") == "-5"
    assert final_number("it is 5") is None


def test_full_fine_tuning_keeps_what_bfloat16_rounds_away() -> None:
    def trained(dtype: torch.dtype) -> torch.Tensor:
        layer = torch.nn.Linear(4, 4, bias=False, dtype=dtype)
        torch.nn.init.ones_(layer.weight)
        optimizer = ROWS["full"].optimizer(layer, 1e-4)  # an update of a fortieth of what bfloat16 resolves near 1
        for _ in range(400):
            layer(torch.ones(1, 4, dtype=dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert layer.weight.grad is None
        return layer.weight.detach().float()

    torch.testing.assert_close(trained(torch.bfloat16), trained(torch.float32), rtol=0, atol=2**-8)
    assert trained(torch.float32).max() < 0.97


def test_data_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no train\.jsonl"):
        gsm8k(tmp_path, tmp_path)
    (tmp_path / "train.jsonl").write_text('{"question": "1+1?"}\n')
    with pytest.raises(UserError, match="no strings question and answer in line 1"):
        gsm8k(tmp_path, tmp_path)
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(UserError, match="is not lines of JSON"):
        gsm8k(tmp_path, tmp_path)


def test_quick_run_and_going_on(inputs: Path, tmp_path: Path) -> None:
    path, document = tmp_path / "runs.jsonl", tmp_path / "page.md"
    document.write_text(f"before\n{MARKERS.begin}\nold\n{MARKERS.end}\nafter\n")
    arguments = [str(ROOT / "benchmarks" / "real_model.py"), "--quick", "--data", str(inputs / "data")]
    arguments += ["--model", str(inputs / "model"), "--directory", str(tmp_path / "kept"), "--json", str(path)]
    finished = run_script([*arguments, "--markdown", str(document)], 1, timeout_seconds=250)
    succeed(finished)
    left_out = missing()
    for name in left_out:
        assert f"{ROWS[name].label}: left out" in finished[0].stdout

    lines = path.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    results = Results(entries, ROWS)
    assert results.methods == [name for name in ROWS if name not in left_out]
    for name in results.methods:
        for task in ("r = 4",) if name == "full" else ("r = 4", "r = 8"):
            best = results.best_lr(task, name)
            assert {best / 2, best * 2} <= results.rates(task, name).keys()
            losses = results.final_losses(task, name, best)
            assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses), name
            (curve, _) = results.curves(task, name, best)
            assert curve[-1][0] == (6 if ROWS[name].longer else 4)
            assert curve[-1][1] < curve[0][1], name
    assert [entry["r"] for entry in entries if entry["kind"] == "accuracy"] == [4, 8]
    page = document.read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert page.count("| rsLoRA, more steps |") == 4  # of two ranks: results and search

    # a kill in the middle of a line: the same command runs what is missing, with the same results
    runs = [number for number, entry in enumerate(entries) if entry["kind"] == "run"]
    path.write_text("\n".join(lines[: runs[-2]]) + "\n" + lines[runs[-2]][:30])
    assert "rsLoRA, more steps" in tables([json.loads(line) for line in lines[: runs[-2]]])
    succeed(run_script([*arguments, "--methods", "lora"], 1, timeout_seconds=250))
    assert path.read_text().splitlines() == lines[: runs[-2]]  # what is missing is not LoRA's
    succeed(run_script(arguments, 1, timeout_seconds=250))
    again = Results([json.loads(line) for line in path.read_text().splitlines()], ROWS)
    assert {key: run["curve"] for key, run in again.runs.items()} == {
        key: run["curve"] for key, run in results.runs.items()
    }


def test_document_has_the_tables_of_the_committed_results() -> None:
    lines = (ROOT / "benchmarks" / "real_model.jsonl").read_text().splitlines()
    written = (ROOT / "docs" / "BENCHMARKS.md").read_text().partition(MARKERS.begin)[2].partition(MARKERS.end)[0]
    assert written.strip() == tables([json.loads(line) for line in lines]).strip(), "run it with --markdown"
