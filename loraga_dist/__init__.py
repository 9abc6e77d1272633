"""LoRA-GA initialization for models that do not fit on one device."""

from typing import TYPE_CHECKING

from loraga_dist.config import InitConfig, MethodConfig
from loraga_dist.errors import LoragaError, RunError, UserError

if TYPE_CHECKING:
    from loraga_dist.commands.save_start import save_start
    from loraga_dist.run.pipeline import initialize

__all__ = ["InitConfig", "LoragaError", "MethodConfig", "RunError", "UserError", "initialize", "save_start"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # importing torch and transformers for a config check would take seconds
    if name == "initialize":
        from loraga_dist.run.pipeline import initialize

        return initialize
    if name == "save_start":
        from loraga_dist.commands.save_start import save_start

        return save_start
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
