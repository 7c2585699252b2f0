"""Which layer of a model sees its data first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Example = Sequence[Any] | Callable[[], object]


def first_layer(model: nn.Module, example: Example | None = None) -> str:
    """The path of the first layer with weights of its own and none inside it.

    Args:
        model: the model.
        example: the arguments of one call, the data first, or a function that calls the model.
            The call is made in evaluation mode, and only layers that see the data count: a flow's
            time embedding, called before, does not. Without it the first layer is taken in the
            order in which the model names them.

    Raises:
        ValueError: there is none, or data of an example that are no floating-point tensor.

    Example:
        >>> first_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        '1'
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if _weighs(module) and not any(_weighs(m) for m in module.modules() if m is not module)
    ]
    if example is None:
        found = [name for name, _ in layers]
    else:
        found = _fed(model, layers, example if callable(example) else lambda: model(*example))
    if not found:
        raise ValueError(
            "no layer with weights was found"
            + (" that sees the data of the example" if example is not None else "")
            + ": give its path as layer="
        )
    return found[0]


def _weighs(module: nn.Module) -> bool:
    """Whether a module has weights of its own."""
    return any(True for _ in module.parameters(recurse=False))


def _fed(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], call: Callable[[], object]
) -> list[str]:
    """The layers whose inputs depend on the model's first argument, in the order of their calls."""
    found: list[str] = []

    def mark(_: Any, args: Any) -> Any:
        if not (args and torch.is_tensor(args[0]) and args[0].is_floating_point()):
            raise ValueError(
                "the example begins with the data, a floating-point tensor; for others give layer="
            )
        return (args[0].detach().clone().requires_grad_(), *args[1:])

    handles = [model.register_forward_pre_hook(mark)]
    for name, module in layers:

        def look(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            given = (*args, *kwargs.values())
            if any(torch.is_tensor(value) and value.requires_grad for value in given):
                found.append(name)

        handles.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        # With all weights frozen, only what depends on the data needs a gradient.
        with _frozen(model), torch.enable_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode whose weights need no gradients."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_()
        for module, mode in modes:
            module.training = mode
