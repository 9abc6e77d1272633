"""The model card of a start on the hub: which base it needs, how to load it, what goes wrong on another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraga_dist.artifacts.names import LORAGA_INIT, LORAGA_OFFSET, REPORT, RESIDUAL_BASE
from loraga_dist.schemes import SCHEMES

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
"""What transformers loads a model for a task with."""

_RESIDUAL = f"""`{LORAGA_INIT}/` belongs on the residual base, which is `{{shown}}` with s B0 A0 subtracted from each of
those weights. `{LORAGA_OFFSET}/`, merged into `{{shown}}`, makes it. The weights of `{{shown}}` have the fingerprint

    {{fingerprint}}

**On the original base the adapter loads without an error and the model is wrong**: every one of those weights is off by
s B0 A0, and training starts from a damaged model. A trained adapter belongs on the residual base as well.
"""
_ORIGINAL = f"""`{LORAGA_INIT}/` belongs on `{{shown}}` as it is, whose weights have the fingerprint

    {{fingerprint}}

On another model of the same shapes the adapter loads without an error and the model is wrong.
"""


def model_card(report: Mapping[str, Any], repo_id: str) -> str:
    """README.md of the repository, with the metadata that the hub reads."""
    from huggingface_hub import ModelCardData

    config = report["config"]
    base, revision = config["model"]["name_or_path"], config["model"]["revision"]
    on_hub = not Path(base).is_absolute()  # a run writes local paths absolutely
    auto = AUTO_CLASSES[config["lora"]["task_type"]]
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft",
        tags=["lora", config["init"]["scheme"].replace("_", "-")],
    )
    shown = base if on_hub else Path(base).name
    pinned = f', revision="{revision}"' if revision else ""
    scheme = SCHEMES[config["init"]["scheme"]]
    loading = f'base = {auto}.from_pretrained("{shown}"{pinned}, dtype="auto")'
    if config["output"]["push_residual_base"]:
        loading = f'base = {auto}.from_pretrained("{repo_id}", subfolder="{RESIDUAL_BASE}", dtype="auto")'
    elif scheme.changes_base:
        loading += f"""
base = PeftModel.from_pretrained(base, "{repo_id}", subfolder="{LORAGA_OFFSET}").merge_and_unload()"""
    tokens, is_dora = report["num_supervised_tokens"], config["lora"]["use_dora"]
    return f"""---
{metadata.to_yaml()}
---

# {scheme.title} start of {shown}

A LoRA adapter to **start** training from, not a trained one. It covers {len(report["targets"])} weight matrices\
{f" and was made from the gradient of {tokens} tokens" if tokens else ""}.

## Which base it needs

{(_RESIDUAL if scheme.changes_base else _ORIGINAL).format(shown=shown, fingerprint=report["base_fingerprint"])}
## Train

```python
from peft import PeftModel
from transformers import {auto}

{loading}
model = PeftModel.from_pretrained(base, "{repo_id}", subfolder="{LORAGA_INIT}", is_trainable=True)
```

## After training

{"As a merged model" if is_dora else "For the original base as servers want it"}, from a copy of this repository
(with `{REPORT}`):

```
loraga-dist convert --init {LORAGA_INIT} --trained TRAINED {"--merge MERGED" if is_dora else "--to CONVERTED"}
```
"""
