"""How the base of a start is loaded elsewhere: as Python, in trainers' configuration files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraga_dist.artifacts.names import RESIDUAL_BASE
from loraga_dist.artifacts.report import Report
from loraga_dist.model.classes import loader_of
from loraga_dist.publish.rendering import python_literal

_DEQUANTIZERS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
}
"""Of transformers, by `quant_method`: where PEFT puts no adapter on some layers or experts, or one without effect."""


@dataclass(frozen=True, kw_only=True)
class BaseCall:
    """What loads a base, and what it has to be told beside the name."""

    loader: str
    name: str
    revision: str | None
    trust_remote_code: bool
    dequantizer: str | None
    """A class of transformers."""
    dtype: str = "auto"
    subfolder: str | None = None

    @classmethod
    def of_original(cls, report: Report) -> BaseCall:
        """The model that the start was made of."""
        config = report.config
        return cls(
            loader=loader_of(config.model, config.lora.task_type),
            name=config.model.name_or_path,
            revision=config.model.revision,
            trust_remote_code=config.model.trust_remote_code,
            dequantizer=_DEQUANTIZERS.get(report.base_quantization or ""),
        )

    @classmethod
    def of_residual(cls, report: Report) -> BaseCall:
        """The `residual_base/` in the output directory."""
        return replace(cls.of_original(report), name=f"{report.config.output.dir}/{RESIDUAL_BASE}", revision=None)

    @property
    def is_local(self) -> bool:
        return Path(self.name).is_absolute()  # a run writes local paths absolutely

    @property
    def imports(self) -> str:
        """What its Python takes from transformers."""
        return self.loader if self.dequantizer is None else f"{self.loader}, {self.dequantizer}"

    @property
    def python(self) -> str:
        words = [python_literal(self.name)]
        if self.subfolder is not None:
            words.append(f"subfolder={python_literal(self.subfolder)}")
        if self.revision is not None:
            words.append(f"revision={python_literal(self.revision)}")
        if self.trust_remote_code:
            words.append("trust_remote_code=True")
        if self.dequantizer is not None:
            words.append(f"quantization_config={self.dequantizer}(dequantize=True)")
        return f"{self.loader}.from_pretrained({', '.join(words)}, dtype={python_literal(self.dtype)})"

    def trainer_configs(self, adapter: str) -> dict[str, dict[str, Any]]:
        """What to write into the configuration files of trainers, by their names; of those that can load it."""
        axolotl: dict[str, Any] = {"base_model": self.name, "adapter": "lora", "lora_model_dir": adapter}
        factory: dict[str, Any] = {
            "model_name_or_path": self.name,
            "adapter_name_or_path": adapter,
            "finetuning_type": "lora",
        }
        swift: dict[str, Any] = {"model": self.name, "adapters": [adapter], "tuner_type": "lora"}
        if self.revision is not None:
            axolotl["revision_of_model"] = factory["model_revision"] = swift["model_revision"] = self.revision
        if self.trust_remote_code:  # ms-swift always does
            axolotl["trust_remote_code"] = factory["trust_remote_code"] = True
        if self.dequantizer is not None:
            axolotl["model_quantization_config"] = self.dequantizer
            axolotl["model_quantization_config_kwargs"] = {"dequantize": True}
            return {"Axolotl": axolotl}
        return {"Axolotl": axolotl, "LLaMA-Factory": factory, "ms-swift": swift}
