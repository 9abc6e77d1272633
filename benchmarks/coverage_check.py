"""One architecture, in a process of its own: init as a user runs it, following what it says, and two checks.

The adapter on the residual base, loaded by stock PEFT, has the original model's logits; and the factors are those of
the gradient that plain autograd has of the model's own loss, of each sample alone and without padding.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from coverage_models import KINDS, Kind, build, save
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from loraga_dist.cli import init_main
from loraga_dist.config import InitConfig, parse_config
from loraga_dist.data.losses import IGNORED
from loraga_dist.data.samples import load_samples
from loraga_dist.model.base import find_base_model

RANK = 2
MOST_LINES = 4
"""Lines of advice that are followed."""
TOLERANCE = 1e-4

WORKS, WITH_LINE, REFUSED, NOT_BUILT, WRONG, CRASHED = (
    "works",
    "works with a line",
    "refused",
    "not built",
    "wrong",
    "crashed",
)


@dataclass
class Outcome:
    """What became of an architecture."""

    kind: str
    model_type: str
    model_class: str
    outcome: str = CRASHED
    lines: list[str] = field(default_factory=list)
    """What init said, the last line last; each was followed but perhaps the last."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What was written because of them."""
    why: str = ""
    logits_error: float | None = None
    gradient_error: float | None = None
    notes: list[str] = field(default_factory=list)
    num_targets: int = 0


def examine(kind_name: str, model_type: str, directory: Path) -> dict[str, Any]:
    """Build, start and check one architecture, in a process of its own; its outcome as plain data."""
    os.environ["LORAGA_DEBUG"] = "1"  # what is unforeseen shall be found
    logging.set_verbosity(logging.CRITICAL)
    kind = KINDS[kind_name]
    outcome = Outcome(kind_name, model_type, kind.classes[model_type])
    try:
        model = build(kind, model_type)
        data = save(model, kind, directory / "model")
        _, loaded = type(model).from_pretrained(directory / "model", output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError("transformers does not find all weights again in the checkpoint that it has saved")
    except Exception as error:
        outcome.outcome, outcome.why = NOT_BUILT, _in_a_line(error)
        return asdict(outcome)
    own_forward = _own_forward(model, kind)
    try:
        tree = _run(kind, directory, data, outcome)
        if tree is not None:
            _check(parse_config(InitConfig, tree), directory, outcome)
    except Exception as error:
        outcome.outcome, outcome.why = CRASHED, f"check: {_in_a_line(error)}\n{traceback.format_exc()}"
    if outcome.outcome in (CRASHED, REFUSED) and own_forward is not None:
        outcome.outcome, outcome.why = NOT_BUILT, f"its own forward fails on text alone: {own_forward}"
    return asdict(outcome)


def _own_forward(model: PreTrainedModel, kind: Kind) -> str | None:
    """What the model says to text as a user's own script gives it; None if it takes it."""
    ids = torch.arange(100, 118)[None]
    ids[0, -1] = 2
    labels = torch.zeros(1, dtype=torch.long) if kind.task_type == "SEQ_CLS" else ids
    try:
        with torch.no_grad():
            found = _forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        return None if found.loss is not None else "it gives no loss"
    except Exception as error:
        return _in_a_line(error)


def _forward(model: Any, inputs: dict[str, Tensor]) -> Any:
    # which recomputation, and some hybrids' first call, stumble over
    more: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    if inputs["labels"].dim() == 2 and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        # as transformers' collator; FSMT's writes into what it is given
        more["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"].clone())
    return model(**inputs, **more)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _run(kind: Kind, directory: Path, data: Path, outcome: Outcome) -> dict[str, Any] | None:
    """Run init until it is done or says nothing that can be followed; the configuration that it was done with."""
    tree: dict[str, Any] = {
        "model": {"name_or_path": str(directory / "model"), "dtype": "float32"},
        "lora": {"r": RANK, "lora_alpha": 2 * RANK, "task_type": kind.task_type},
        "gradient": {"engine": "exact", "oversampling": 1024},  # all triplets
        "calibration": {"data_files": str(data), "max_length": 64, "max_samples": 4, "per_device_batch_size": 4},
        "output": {"dir": str(directory / "out")},
    }
    for _ in range(MOST_LINES + 1):
        (directory / "config.yaml").write_text(yaml.safe_dump(tree))
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = init_main(["--config", str(directory / "config.yaml"), "--overwrite", "--resume", "never"])
        if code == 0:
            outcome.outcome = WITH_LINE if outcome.settings else WORKS
            return tree
        lines = [line.removeprefix("loraga-dist: ") for line in said.getvalue().splitlines() if "loraga-dist: " in line]
        line = lines[-1].replace(str(directory), "...") if lines else ""
        outcome.lines.append(line)
        outcome.outcome = REFUSED if code == 2 else CRASHED
        if code != 2:
            outcome.why = said.getvalue()[-6000:]
            return None
        setting = _advice(line, tree)
        if setting is None:
            return None
        (section, key), value = setting
        tree[section][key] = outcome.settings[f"{section}.{key}"] = value
    return None


_OTHER_LOSS = "gives another loss than the cross-entropy"
_NOTES = {"is that of texts one by one": "texts one by one, as init says: it sees their padding"}

_NAMED = (
    # one module of many like it: the ends of their names
    re.compile(r": ([\w.]+) (?:\(\w+\) )?(?:is|has|needs)\b.*; .*add it to lora\.exclude_modules"),
    re.compile(r"^model\.name_or_path: '([\w.]+)': .*leave the module out \(lora\.exclude_modules"),
)
_LISTED = re.compile(r"^lora\.exclude_modules: (\[[^\]]*\]): .*list these here")
_KEY = re.compile(r"(?:write|set) (\w+)\.(\w+): (.+?)(?:;|$)")
_VALUE = re.compile(r"write (true|false|null|auto|[A-Z][A-Z_0-9]+|[0-9][\w.]*)(?: or |$|[;,]| there)")


def _advice(line: str, tree: dict[str, Any]) -> tuple[tuple[str, str], Any] | None:
    """The key to write, and its value, that a line names; None where it names none, or what is written already."""
    section, _, key = line.partition(":")[0].partition(".")
    excluded = tree["lora"].get("exclude_modules", [])
    if isinstance(excluded, str):  # a regular expression
        excluded = []
    named = next((match[1] for pattern in _NAMED if (match := pattern.search(line))), None)
    if match := _KEY.search(line):
        section, key, value = match[1], match[2], yaml.safe_load(match[3])
    elif match := _LISTED.search(line):
        section, key, value = "lora", "exclude_modules", sorted({*excluded, *yaml.safe_load(match[1])})
    elif named is not None:
        end = re.sub(r"^.*\.\d+\.", "", named.removesuffix(".weight"))
        section, key, value = "lora", "exclude_modules", sorted({*excluded, end})
    elif match := _VALUE.search(line):
        value = yaml.safe_load(match[1])
    else:
        return None
    return None if section not in tree or tree[section].get(key) == value else ((section, key), value)


def _check(config: InitConfig, directory: Path, outcome: Outcome) -> None:
    model_class = find_base_model(config.model, config.lora.task_type, torch.device("cpu")).model_class
    inputs = _inputs(config, directory)
    original, out = _load(model_class, directory / "model"), directory / "out"
    base = out / "residual_base"
    started = PeftModel.from_pretrained(_load(model_class, base), str(out / "loraga_init")).eval()
    with torch.no_grad():
        pairs = [(_logits(original, it), _logits(started, it)) for it in inputs]
    outcome.logits_error = max(float((one - other).norm() / one.norm()) for one, other in pairs)
    report = json.loads((out / "loraga_report.json").read_text())
    outcome.num_targets = len(report["targets"])
    errors = _gradient_errors(original, inputs, report, out, own_loss=True)
    if max(errors.values()) > TOLERANCE and any(_OTHER_LOSS in warning for warning in report["warnings"]):
        errors = _gradient_errors(original, inputs, report, out, own_loss=False)
        outcome.notes.append("its own loss is another, as init says; this is the gradient of the cross-entropy")
    outcome.notes += [note for words, note in _NOTES.items() if any(words in it for it in report["warnings"])]
    name, outcome.gradient_error = max(errors.items(), key=lambda named: named[1])
    problems = []
    if not outcome.logits_error <= TOLERANCE:
        problems.append(f"logits of the start differ by {outcome.logits_error:.1e}")
    if not outcome.gradient_error <= TOLERANCE:
        wrong = sum(not error <= TOLERANCE for error in errors.values())
        problems.append(
            f"gradients of {wrong} of {len(errors)} targets differ by up to {outcome.gradient_error:.1e} ({name})"
        )
    if problems:
        outcome.outcome, outcome.why = WRONG, "; ".join(problems)


def _load(model_class: Any, directory: Path) -> Any:
    return model_class.from_pretrained(directory, dtype=torch.float32).eval()


def _inputs(config: InitConfig, directory: Path) -> list[dict[str, Tensor]]:
    """Of every sample alone."""
    task_type = config.lora.task_type
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    samples = load_samples(config.calibration, tokenizer, task_type=task_type, max_positions=None)
    found = []
    for sample in samples:
        values = {name: torch.tensor(value) for name, value in sample.inputs.items()}
        found.append({name: value[None] for name, value in values.items()})
    return found


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return _forward(model, inputs).logits.float()


def _gradient_errors(
    model: Any, inputs: list[dict[str, Tensor]], report: dict[str, Any], out: Path, *, own_loss: bool
) -> dict[str, float]:
    """Of every target's singular triplets, against autograd's gradient of the mean loss over all terms.

    own_loss: as the model's forward returns it; else the cross-entropy of its logits.
    """
    model.zero_grad()
    shifts = report["config"]["lora"]["task_type"] == "CAUSAL_LM"
    num_terms = 0
    for each in inputs:
        found = _forward(model, each)
        predicted = each["labels"][:, 1:] if shifts else each["labels"]
        count = int((predicted != IGNORED).sum())
        logits = found.logits[:, :-1] if shifts else found.logits
        loss = found.loss if own_loss else F.cross_entropy(logits.flatten(0, -2), predicted.flatten())
        (loss * count).backward()
        num_terms += count
    factors = {key: value for path in (out / "factors").glob("*.safetensors") for key, value in load_file(path).items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    errors = {}
    for name, target in report["targets"].items():
        triplets = [factors[f"{name}.{part}"].double() for part in ("U", "S", "Vh")]
        errors[name] = _error_of(_gradient_of(parameters, name, target).double() / num_terms, *triplets)
    return errors


def _gradient_of(parameters: dict[str, Any], name: str, target: dict[str, Any]) -> Tensor:
    stack = target["stack"]
    gradient = parameters[stack["parameter"] if stack else f"{name}.weight"].grad
    assert gradient is not None, f"autograd has no gradient of {name}"
    if stack:
        gradient = gradient[stack["index"]]
    return gradient.T if target["transposed"] else gradient


def _error_of(G_MN: Tensor, U_MK: Tensor, S_K: Tensor, Vh_KN: Tensor) -> float:
    """How far triplets are from the leading ones, in parts of the largest singular value."""
    values_K = torch.linalg.svdvals(G_MN)[: len(S_K)]
    projected_KK = U_MK.T @ G_MN @ Vh_KN.T
    return float(max((values_K - S_K).abs().max(), (projected_KK - S_K.diag()).abs().max()) / values_K[0])
