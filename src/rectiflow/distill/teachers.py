"""Teachers of any kind: guided fields and what is inside them, weights held still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from rectiflow.flows.fields import FlowModel

if TYPE_CHECKING:
    from rectiflow.flows.fields import Field


def model_inside(field: Field | None) -> FlowModel | None:
    """The model within guided fields, or None for a field in closed form.

    Example:
        >>> model = FlowModel(lambda x, t: x)
        >>> model_inside(model) is model
        True
    """
    found: Any = field
    while found is not None and not isinstance(found, FlowModel):
        found = getattr(found, "field", None)
    return found


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Keep the parameters of modules out of what the block records for gradients.

    Gradients to the modules' inputs are recorded as ever.
    """
    held = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)
