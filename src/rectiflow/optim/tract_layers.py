"""Layers whose weight gradient TrAct rectifies, and their place in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from rectiflow.optim.layer_search import Example, first_layer
from rectiflow.optim.tract import TrActSettings
from rectiflow.optim.tract_backward import rectified
from rectiflow.optim.tract_windows import Windows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class _TrActLayer(nn.Module):
    """What the layers share: the settings, and a forward pass that goes around the weight."""

    tract: TrActSettings | None

    def _around(self, x: Tensor, weight: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """The plain layer; where it is trained, with the rectified gradient for its weight."""
        settings = self.tract
        if settings is None or not (torch.is_grad_enabled() and weight.requires_grad):
            return plain(weight)
        return rectified(plain(weight.detach()), weight, x, self._windows(), settings)

    def _windows(self) -> Windows:
        return Windows()

    def extra_repr(self) -> str:
        plain = super().extra_repr()
        return plain if self.tract is None else f"{plain}, lam={self.tract.lam:g}"


class TrActLinear(_TrActLayer, nn.Linear):
    """A linear layer whose weight moves as if its outputs were trained.

    For the first layer of a model, on standardised inputs and a loss that is a mean; leave the
    learning rate as it is. Outputs and the gradients of bias and inputs are those of `nn.Linear`.
    All leading dimensions count as rows. Each micro-batch has a second moment of its own, so
    accumulated gradients differ from those of one large batch; a bound on the gradient's norm
    bites harder, as the gradient may grow up to `1 / lam` times.

    Args:
        in_features: inputs.
        out_features: outputs.
        bias: whether there is a bias.
        lam: damping, see `TrActSettings`.
        relative: see `TrActSettings`.
        gram: see `TrActSettings`.
        form: see `TrActSettings`.
        device: where the weights are.
        dtype: of the weights. The gradient is computed in float32 at least, under autocast too.

    Raises:
        ValueError: lam that is not positive, an unknown gram or form.

    Example:
        >>> layer = TrActLinear(3, 2, lam=0.1)
        >>> layer(torch.randn(5, 3)).square().mean().backward()
        >>> layer.weight.grad.shape
        torch.Size([2, 3])

    Source: arXiv 2410.23970.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        lam: float = 0.1,
        relative: bool = False,
        gram: str = "local",
        form: str = "backward",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.tract = TrActSettings(lam, relative, gram, form)

    def forward(self, input: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        return self._around(input, self.weight, lambda w: functional.linear(input, w, self.bias))


class _TrActConv(_TrActLayer, nn.modules.conv._ConvNd):
    """A convolution: its rows are the windows of all places of all images."""

    def __init__(
        self,
        *args: Any,
        lam: float = 0.1,
        relative: bool = False,
        gram: str = "local",
        form: str = "backward",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.tract = TrActSettings(lam, relative, gram, form)

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return self._around(input, self.weight, lambda w: self._conv_forward(input, w, self.bias))

    def _windows(self) -> Windows:
        return Windows(
            self.kernel_size,
            self.stride,
            self.dilation,
            tuple(self._reversed_padding_repeated_twice),
            "constant" if self.padding_mode == "zeros" else self.padding_mode,
            self.groups,
        )


class TrActConv1d(_TrActConv, nn.Conv1d):
    """`TrActConv2d` for sequences."""


class TrActConv2d(_TrActConv, nn.Conv2d):
    """A convolution whose weight moves as if its outputs were trained; see `TrActLinear`.

    The rows of the regression are the windows at all places of all images, padding included, one
    regression a group. Every stride, padding (strings and modes too), dilation and number of
    groups is right.

    Args:
        *args: those of `nn.Conv2d`.
        lam: damping, see `TrActSettings`.
        relative: see `TrActSettings`.
        gram: see `TrActSettings`.
        form: see `TrActSettings`.
        **options: those of `nn.Conv2d`.

    Raises:
        ValueError: lam that is not positive, an unknown gram or form.

    Example:
        >>> layer = TrActConv2d(3, 4, 3, padding="same", lam=0.1)
        >>> layer(torch.randn(2, 3, 5, 5)).square().mean().backward()
        >>> layer.weight.grad.shape
        torch.Size([4, 3, 3, 3])

    Source: arXiv 2410.23970. The released layer ignores dilation, groups, padding modes and dtype
        of the layer it stands for.
    """


class TrActConv3d(_TrActConv, nn.Conv3d):
    """`TrActConv2d` for volumes."""


RECTIFIED: dict[type, type] = {
    nn.Linear: TrActLinear,
    nn.Conv1d: TrActConv1d,
    nn.Conv2d: TrActConv2d,
    nn.Conv3d: TrActConv3d,
}
PLAIN = {rectified: plain for plain, rectified in RECTIFIED.items()}


def apply_tract(
    model: nn.Module,
    lam: float = 0.1,
    *,
    layer: str | None = None,
    example: Example | None = None,
    relative: bool = False,
    gram: str = "local",
    form: str = "backward",
) -> str:
    """Let the first layer of a model be trained by TrAct, in place.

    The layer stays the same object with the same weights: optimizers made before or after, state
    dicts, hooks and other references to it stay valid. Apply it before `torch.compile`.

    Args:
        model: the model, or the layer itself.
        lam: damping, see `TrActSettings`; where the layer has it already, the new value counts.
        layer: path of the layer, as in `model.named_modules()`; the first one by default.
        example: shows which layer is first, see `first_layer`.
        relative: see `TrActSettings`; for inputs that are not standardised.
        gram: see `TrActSettings`.
        form: see `TrActSettings`.

    Returns:
        the path of the layer.

    Raises:
        ValueError: no such layer, one that is not a stock Linear, Conv1d, Conv2d or Conv3d, or
            settings out of range.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> apply_tract(model)
        '1'
        >>> model[1]
        TrActLinear(in_features=4, out_features=3, bias=True, lam=0.1)
    """
    settings = TrActSettings(lam, relative, gram, form)
    if layer is None:
        layer = first_layer(model, example)
    try:
        found = model.get_submodule(layer)
    except AttributeError:
        raise ValueError(
            f"the model has no layer {layer!r}: give a name of model.named_modules()"
        ) from None
    kind = type(found)
    if kind not in RECTIFIED and kind not in PLAIN:
        raise ValueError(
            f"TrAct takes a plain Linear, Conv1d, Conv2d or Conv3d, but {layer or 'the model'!r} "
            f"is {kind.__name__}: give the path of another one as layer="
        )
    weight: Any = found.weight
    if not weight.is_floating_point():
        raise ValueError(f"TrAct takes real floating-point weights, got {weight.dtype}")
    found.__class__ = RECTIFIED.get(kind, kind)
    found.tract = settings
    return layer


def remove_tract(model: nn.Module) -> nn.Module:
    """Make all TrAct layers of a model plain again, in place, for instance to save it whole.

    Args:
        model: the model, or the layer itself.

    Returns:
        the model.

    Raises:
        ValueError: a layer was parametrised since.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _TrActLayer):
            continue
        if type(module) not in PLAIN:
            raise ValueError(
                f"{name or 'the model'!r} is {type(module).__name__}: remove its parametrisations "
                "first"
            )
        del module.tract
        module.__class__ = PLAIN[type(module)]
    return model


@contextmanager
def plain_gradients(model: nn.Module) -> Iterator[None]:
    """Let all TrAct layers of a model have the gradient of plain ones inside a block.

    For second derivatives, which the rectified gradient does not have. Parametrised layers too.

    Args:
        model: the model, or the layer itself.

    Example:
        >>> layer, x = TrActLinear(2, 1, bias=False), torch.eye(2)
        >>> with plain_gradients(layer):
        ...     layer(x).sum().backward()
        >>> layer.weight.grad
        tensor([[1., 1.]])
    """
    layers = [module for module in model.modules() if isinstance(module, _TrActLayer)]
    kept = [layer.tract for layer in layers]
    for layer in layers:
        layer.tract = None
    try:
        yield
    finally:
        for layer, settings in zip(layers, kept):
            layer.tract = settings
