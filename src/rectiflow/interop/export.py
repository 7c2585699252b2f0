"""Samplers as programs that run without rectiflow: ONNX and `torch.export`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rectiflow.errors import require
from rectiflow.files import atomic_path
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.integration import stage_times, time_grid
from rectiflow.flows.solvers import RungeKutta, resolve

ONNX, PROGRAM = ".onnx", ".pt2"


class _Sampler(nn.Module):
    """Noise to samples (and labels, for a conditional model), with the grid of times fixed."""

    def __init__(self, model: FlowModel, grid: list[float], solver: RungeKutta) -> None:
        super().__init__()
        self.model, self.solver, self.grid = model, solver, grid

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        condition = {} if label is None else {"label": label}

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.model.velocity(x, t, **condition)

        x = self.model.path.start(noise)
        lengths = self.solver.intervals(self.grid)
        for dt, times in zip(lengths, stage_times(x, self.grid, lengths, self.solver.nodes)):
            x, _ = self.solver.step(velocity, x, times, dt)
        return x


def export_sampler(
    model: FlowModel,
    path: Path | str,
    *,
    steps: int | Sequence[float] | None = None,
    solver: str | RungeKutta | None = None,
) -> float:
    """Write a model's sampler with a fixed number of steps, and check it against the model.

    The program takes `noise` (batch of any size) and, for a conditional model, `label`
    (int64); it returns samples in [-1, 1]. The written file is read back and run.

    Args:
        model: the model.
        path: `.onnx` for ONNX Runtime and others, `.pt2` for `torch.export.load`.
        steps: solver steps or grid of times; the model's own by default.
        solver: a fixed-step Runge-Kutta solver; the model's own by default.

    Returns:
        the largest absolute difference between the program's samples and the model's.

    Raises:
        ValueError: another file ending, a solver that is not fixed-step, a model without shape.
        MissingExtraError: ONNX without the `onnx` extra.
    """
    path = Path(path)
    if path.suffix not in (ONNX, PROGRAM):
        raise ValueError(f"the file must end in {ONNX} or {PROGRAM}, got {path.name!r}")
    chosen = solver if solver is not None else model.sampling["solver"]
    method = resolve(chosen)
    if not isinstance(method, RungeKutta):
        raise ValueError(
            f"only fixed-step solvers can be exported, got {chosen!r}: choose euler, heun, "
            "midpoint or rk4"
        )
    if model.shape is None:
        raise ValueError("the model does not know its sample shape: set shape=")
    grid = time_grid(steps if steps is not None else model.sampling["steps"])
    sampler = _Sampler(model, grid, method).eval()
    generator = torch.Generator().manual_seed(0)
    # Three rows here and two in the check, so that a fixed batch size would show.
    example = _inputs(model, 3, generator)
    batch = torch.export.Dim("batch", min=1, max=65_536)
    shapes: dict[str, Any] = {name: {0: batch} for name in example}
    program = torch.export.export(sampler, (), kwargs=example, dynamic_shapes=shapes)
    with atomic_path(path) as temporary:
        if path.suffix == PROGRAM:
            torch.export.save(program, temporary)
        else:
            _write_onnx(program, list(example), temporary)
    trial = _inputs(model, 2, generator)
    with torch.no_grad():
        expected = sampler(**trial)
    return float((run_program(path, **trial) - expected).abs().max())


def run_program(path: Path | str, **inputs: Tensor) -> Tensor:
    """Run an exported sampler on noises (and labels)."""
    path = Path(path)
    if path.suffix == PROGRAM:
        with torch.no_grad():
            return torch.export.load(path).module()(**inputs)
    require("onnx", "onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (samples,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(samples)


def _inputs(model: FlowModel, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    assert model.shape is not None
    inputs = {"noise": torch.randn(count, *model.shape, generator=generator)}
    if model.classes:
        inputs["label"] = torch.arange(count) % model.classes
    return inputs


def _write_onnx(program: Any, names: list[str], path: Path) -> None:
    require("onnx", "onnx", "onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program, (), dynamo=True, input_names=names, output_names=["samples"], verbose=False
        )
    assert exported is not None
    exported.save(str(path))
