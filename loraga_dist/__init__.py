"""LoRA-GA initialization for models that do not fit on one device."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraga_dist.commands.save_start import save_start
    from loraga_dist.config import InitConfig, MethodConfig
    from loraga_dist.errors import LoragaError, RunError, UserError
    from loraga_dist.run.pipeline import initialize

_MODULE_OF = {
    "InitConfig": "config",
    "LoragaError": "errors",
    "MethodConfig": "config",
    "RunError": "errors",
    "UserError": "errors",
    "initialize": "run.pipeline",
    "save_start": "commands.save_start",
}

__all__ = ["InitConfig", "LoragaError", "MethodConfig", "RunError", "UserError", "initialize", "save_start"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # libraries must be told how to behave before torch is imported, and imports take seconds
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
