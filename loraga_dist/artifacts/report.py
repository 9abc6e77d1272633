"""What a run says of itself: loraga_report.json, the output directory's README.md, and the closing table."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from loraga_dist.artifacts.names import LORAGA_INIT, LORAGA_OFFSET, README, RESIDUAL_BASE

SCHEMA_VERSION = 1
LOW_SPLIT_HALF_COSINE = 0.5
"""Below it two halves of the data disagree on the gradient more than they agree."""

LOW_WINDOW_CAPTURE = 0.7
"""Below it a window of the data held much energy outside the sketch's bases."""

_PACKAGES = ("loraga_dist", "torch", "transformers", "peft", "deepspeed", "safetensors")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def find_warnings(targets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a user should look at before training: one line each, with what to do."""
    lines = []
    large = [name for name, target in targets.items() if target["offset_ratio"] > 1]
    if large:
        lines.append(
            f"offset_ratio above 1 (s*B0*A0 outweighs W) in {_some(large)}: use a smaller lora.lora_alpha or a larger "
            "init.stable_gamma, or output.residual_dtype float32"
        )
    if noisy := _below(targets, "split_half_cosine", LOW_SPLIT_HALF_COSINE):
        lines.append(
            f"split_half_cosine below {LOW_SPLIT_HALF_COSINE} in {_some(noisy)}: two halves of the data disagree on "
            "the gradient; raise calibration.max_samples"
        )
    if drifted := _below(targets, "window_capture", LOW_WINDOW_CAPTURE):
        lines.append(
            f"window_capture below {LOW_WINDOW_CAPTURE} in {_some(drifted)}: the gradient changed while the data went "
            "by; set gradient.refine_passes 1"
        )
    deficient = [name for name, target in targets.items() if target["numerical_rank"] < len(target["singular_values"])]
    if deficient:
        lines.append(
            f"the gradient has fewer directions than 2r in {_some(deficient)}: the missing columns of B start at zero, "
            "as in plain LoRA; raise calibration.max_samples or lower lora.r"
        )
    return lines


def print_summary(report: Mapping[str, Any], directory: str, verified: str) -> None:
    """The closing table: per kind of module, seconds per phase, memory per rank, files, what to do next."""
    console = Console(highlight=False, markup=False, width=None if Console().is_terminal else 110)
    table = Table(title=f"LoRA-GA start of {report['config']['model']['name_or_path']}")
    for column in ("module", "targets", "M x N", "r", "captured energy", "split-half cosine", "offset ratio"):
        table.add_column(column, justify="left" if column == "module" else "right")
    kinds: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for name, target in report["targets"].items():
        kinds.setdefault((name.rpartition(".")[2], *target["shape"], target["r"]), []).append(target)
    for (kind, M, N, r), members in kinds.items():
        table.add_row(
            kind,
            str(len(members)),
            f"{M} x {N}",
            str(r),
            _spread([member["captured_energy"] for member in members]),
            _spread([member["split_half_cosine"] for member in members]),
            _spread([member["offset_ratio"] for member in members]),
        )
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    seconds, check = report["seconds"], report["identity_check"]
    peaks = [f"{peak / 2**20:.0f}" for peak in report["peak_bytes_per_rank"]]
    planned = [f"{plan / 2**20:.0f}" for plan in report["planned_peak_bytes_per_rank"]]
    for label, value in (
        (
            "data",
            f"{report['num_sequences']} sequences, {report['num_supervised_tokens']} supervised tokens, "
            f"mean loss {report['mean_loss']:.4f}",
        ),
        ("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())),
        ("peak MiB per rank", f"{' '.join(peaks)}  (planned: {' '.join(planned)})"),
        (
            "identity",
            f"logits differ by {check['max_abs_logit_diff']:.2e} at most, largest {check['max_abs_logit']:.2e} "
            f"({check['dtype']})",
        ),
        ("verified", verified),
        ("files", directory),
        ("train from here", f"{directory}/{README}"),
        ("check again", f"loraga-dist verify {directory}"),
    ):
        console.print(f"{label + ':':<18} {value}", soft_wrap=True)


def readme(report: Mapping[str, Any]) -> str:
    """README.md of the output directory: what is here and how to train, merge and serve from it."""
    config = report["config"]
    directory, base = config["output"]["dir"], config["model"]["name_or_path"]
    task = config["lora"]["task_type"]
    auto = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
    }[task]
    ratios = [target["offset_ratio"] for target in report["targets"].values()]
    if config["output"]["residual_base"] == "none":
        residual_note = (
            f"`output.residual_base` was `none`: make `{RESIDUAL_BASE}/` by merging `{LORAGA_OFFSET}/` into the "
            "original:\n\n"
            "```python\n"
            "from peft import PeftModel\n"
            f"from transformers import {auto}\n"
            f'model = {auto}.from_pretrained("{base}", dtype="auto")\n'
            f'PeftModel.from_pretrained(model, "{directory}/{LORAGA_OFFSET}").merge_and_unload()'
            f'.save_pretrained("{directory}/{RESIDUAL_BASE}")\n'
            "```\n\n"
        )
    else:
        residual_note = ""
    return f"""# LoRA-GA start of {base}

{len(report["targets"])} weight matrices; offset ratio ||s B0 A0|| / ||W|| {min(ratios):.3g} to {max(ratios):.3g}.

| | |
|---|---|
| `{LORAGA_INIT}/` | A0, B0: a plain PEFT LoRA adapter, **for `{RESIDUAL_BASE}/` only** |
| `{RESIDUAL_BASE}/` | the base with W - s B0 A0, an ordinary model directory |
| `{LORAGA_OFFSET}/` | A0, -B0: merged into the original base it gives `{RESIDUAL_BASE}/` |
| `factors/` | leading singular triplets of every gradient |

On the original base the adapter is wrong from the first step: it would add s B0 A0 twice over nothing.

{residual_note}## Train

```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{directory}/{RESIDUAL_BASE}", dtype="auto")
model = PeftModel.from_pretrained(base, "{directory}/{LORAGA_INIT}", is_trainable=True)
```

TRL: `SFTTrainer(model=model, peft_config=None, ...)`.

Axolotl:

```yaml
base_model: {directory}/{RESIDUAL_BASE}
adapter: lora
lora_model_dir: {directory}/{LORAGA_INIT}
```

LLaMA-Factory:

```yaml
model_name_or_path: {directory}/{RESIDUAL_BASE}
adapter_name_or_path: {directory}/{LORAGA_INIT}
finetuning_type: lora
```

LoRA-GA wants learning rates near those of full fine-tuning.

## Merge and serve

The trained adapter belongs on `{RESIDUAL_BASE}/`: `PeftModel.from_pretrained(base, trained).merge_and_unload()` gives
the fine-tuned model, which any server takes. Serving base and adapter apart works with `{RESIDUAL_BASE}/` as the base.

## Check

```
loraga-dist verify {directory}
```
"""


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _below(targets: Mapping[str, Mapping[str, Any]], field: str, bound: float) -> list[str]:
    """Names of the targets whose value is known and below the bound."""
    return [name for name, target in targets.items() if target[field] is not None and target[field] < bound]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} targets ({names[0]}, ...)"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} .. {high:.3f}"
