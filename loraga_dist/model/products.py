"""Products y = W x inside modules: which modules are one, and which, as routers of experts, go on from one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_CASTS = (Tensor.to, Tensor.type, Tensor.float)


class _Casts(TorchFunctionMode):
    """Knows a weight again in another dtype."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._known: list[Any] = [weight]

    def know(self, tensor: Any) -> bool:
        return any(tensor is known for known in self._known)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and self.know(args[0]):
            self._known.append(result)
        return result


@contextmanager
def products_seen(weight: Tensor, see: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let see(x, y) replace every y = F.linear(x, weight) while the context lasts, of the weight in any dtype."""
    own = functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = own(input, weight, bias)
        return see(input, y) if casts.know(weight) else y

    with _Casts(weight) as casts:
        functional.linear = linear  # DeepSpeed has put a function there that no mode sees
        try:
            yield
        finally:
            functional.linear = own


def is_product(module: nn.Module, M: int, N: int) -> bool:
    """Whether a module of a weight makes a row of M from a row of N, and nothing else."""
    output, _ = _of_a_row(module, N)
    return isinstance(output, Tensor) and output.shape == (1, M)


def multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies by its own `weight`, which is a matrix, where it can be seen."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and _of_a_row(module, weight.shape[1])[1]


def find_routers(model: nn.Module) -> list[str]:
    """The modules that multiply by their own weight and go on from there; of a model that is whole, or without
    memory."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).forward is not nn.Linear.forward
        and multiplies(module)
        and not is_product(module, *module.get_parameter("weight").shape)
    ]


def _of_a_row(module: nn.Module, N: int) -> tuple[Any, bool]:
    """What a module makes of one row, None where it takes none; and whether it was seen to multiply by its weight."""
    seen: list[Tensor] = []

    def see(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return y

    weight, output = module.get_parameter("weight"), None
    # many modules take other inputs, and a row without memory has no values to choose by
    with torch.no_grad(), suppress(Exception), products_seen(weight, see):
        output = module(weight.new_empty(1, N))
    return output, bool(seen)
