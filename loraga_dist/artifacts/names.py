"""Every file and directory name of the output directory, once."""

from __future__ import annotations

LORAGA_INIT = "loraga_init"
RESIDUAL_BASE = "residual_base"
LORAGA_OFFSET = "loraga_offset"
FACTORS = "factors"

REPORT = "loraga_report.json"
REPORT_PAGE = "report.html"
PLOTS = "plots"
TENSORBOARD = "tensorboard"
RESOLVED_CONFIG = "resolved_config.yaml"
README = "README.md"
CONVERSION = "loraga_conversion.json"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_STEM = "model"
FACTORS_STEM = "factors"
FACTORS_INDEX = f"{FACTORS_STEM}.safetensors.index.json"
