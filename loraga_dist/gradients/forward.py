"""The model's forward for one microbatch, the finder of what in it is not finite, and how a module gets another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraga_dist.data.microbatches import Microbatch
from loraga_dist.errors import UserError, reason


def forward(model: nn.Module, microbatch: Microbatch, device: torch.device) -> torch.Tensor:
    """The model's logits."""
    return outputs(model, microbatch, device).logits


def outputs(model: nn.Module, microbatch: Microbatch, device: torch.device, *, with_loss: bool = False) -> Any:
    """What the model returns. Its own loss is a mean over this rank's tokens, which no sum over ranks can use."""
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in microbatch.inputs.items()}
    labels = inputs["labels"] if with_loss else inputs.pop("labels")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if microbatch.images is not None:
        dtype = next(base.parameters()).dtype  # processors give float32
        for name, tensor in microbatch.images().items():
            inputs[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    # a classifier has one label per sequence, which no decoder could read
    if base.config.is_encoder_decoder and labels.dim() == 2:
        # as transformers' collator; FSMT's writes into what it is given
        if hasattr(base, "prepare_decoder_input_ids_from_labels"):
            inputs["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=labels.clone())
        else:
            inputs["labels"] = labels
    parameters = inspect.signature(base.forward).parameters
    # Granite's mixtures of experts hand it down among others; a cache would be filled again when blocks are recomputed
    # a classifier of an encoder-decoder hands down its own
    hands_down = "kwargs" in parameters and not (base.config.is_encoder_decoder and labels.dim() == 1)
    if "use_cache" in parameters or (hands_down and hasattr(base.config.get_text_config(), "use_cache")):
        inputs["use_cache"] = False
    try:
        return model(**inputs)
    except ValueError as error:  # what a model raises of its inputs
        problem = f"does not take this data: {reason(error)}; write data that it takes, or another model"
        raise UserError("model", type(base).__name__, problem) from error


@contextmanager
def full_float32_matmul() -> Iterator[None]:
    """No TF32 or bf16 shortcuts in float32 products while the context lasts."""
    backends: Any = torch.backends  # without stubs
    products = backends.cuda.matmul, backends.mkldnn.matmul
    own = [product.fp32_precision for product in products]
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:  # it cannot be told where a script has set one of torch.backends
        general = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(general)
        for product, precision in zip(products, own, strict=True):
            product.fp32_precision = "none"  # what it is for all backends
            if product.fp32_precision != precision:
                product.fp32_precision = precision


def first_nonfinite_module(model: nn.Module, microbatch: Microbatch, device: torch.device) -> str | None:
    """Name of the first module in forward order whose output holds a NaN or an infinity that its input did not."""
    found: list[str] = []

    def check(module: nn.Module, args: Any, output: Any, *, name: str) -> None:
        if not found and isinstance(output, torch.Tensor) and not output.isfinite().all():
            found.append(name)

    handles = [
        module.register_forward_hook(functools.partial(check, name=name))
        for name, module in model.named_modules()
        if name and not any(module.children())
    ]
    try:
        with torch.no_grad():
            forward(model, microbatch, device)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


@contextmanager
def forward_set(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module this forward; what the user, or a library, had set is there again on any exit."""
    # an instance attribute hides the class's forward
    hidden = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if hidden is None:
            del module.forward
        else:
            module.forward = hidden
