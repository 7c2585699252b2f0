"""Diffusion models as flows: EDM, variance-preserving and variance-exploding networks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rectiflow.errors import ModelFolderError, positive
from rectiflow.flows.fields import FlowModel
from rectiflow.flows.paths import RectifiedPath
from rectiflow.nets.diffusion import DiffusionVelocity

# Where training scripts keep the weights to sample with, best first.
INSIDE = ("ema", "ema_state_dict", "state_dict", "model", "net")


def from_edm(
    net: nn.Module,
    *,
    shape: Sequence[int] | None = None,
    weights: str | FilePath | None = None,
    output: str = "network",
    sigma_data: float = 0.5,
    classes: int = 0,
    one_hot: str = "class_labels",
    steps: int = 18,
) -> FlowModel:
    """A flow on straight lines out of an EDM network, ready to sample, reflow and distil.

    Posterior means are shared by all Gaussian corruptions, so the flow is exact where the network
    is: `v(x, t) = (D(x / t, (1 - t) / t) - x) / (1 - t)`, computed in a form that does not cancel
    when the inner network F is given. It is asked beyond its training range near t = 0 (sigma > 80
    is t < 1/81), which reflow has to mend.

    Args:
        net: the inner network F(c_in y, log(sigma) / 4, ...), or the denoiser D(y, sigma, ...).
        shape: the shape of one sample.
        weights: a `.safetensors` file, or a `.pt` file of plain tensors, to fill `net` with first.
        output: "network" when `net` is F, "data" when it is D. F is more accurate near t = 1.
        sigma_data: the standard deviation of data it was trained with.
        classes: number of classes of a network that takes one-hot labels; 0 for others, whose
            condition is passed on unchanged.
        one_hot: the argument that takes them.
        steps: Heun steps of the sampling settings, on EDM's grid.

    Raises:
        ModelFolderError: weights that are unsafe, damaged or of another network.
        ValueError: an unknown output.

    Example:
        >>> from rectiflow.nets import MLP
        >>> model = from_edm(MLP(shape=(2,), width=8, depth=1), shape=(2,))
        >>> model.velocity(torch.ones(1, 2), torch.tensor([0.5]))  # the network outputs 0
        tensor([[-1.2000, -1.2000]], grad_fn=...)

    Source: arXiv 2405.20320, proposition 1; arXiv 2206.00364, table 1.
    """
    if weights is not None:
        load_weights(net, weights)
    positive("classes", classes, zero=True)
    labels: dict[str, Any] = {"classes": classes, "one_hot": one_hot} if classes else {}
    wrapped = DiffusionVelocity(net=net, output=output, sigma_data=sigma_data, **labels)
    sampling = {"solver": "heun", "steps": edm_times(steps)}
    return _flow(wrapped, shape, sampling, weights)


def from_vp(
    net: nn.Module,
    *,
    shape: Sequence[int] | None = None,
    weights: str | FilePath | None = None,
    output: str = "noise",
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    time_scale: float = 999.0,
    betas: Sequence[float] | None = None,
) -> FlowModel:
    """A flow on straight lines out of a variance-preserving diffusion network.

    Args:
        net: the network `net(y, clock, ...)`, clock rising with the noise.
        shape: the shape of one sample.
        weights: a `.safetensors` file, or a `.pt` file of plain tensors, to fill `net` with first.
        output: what it outputs: noise, data, score or v.
        beta_min: first noise rate of a continuous schedule.
        beta_max: its last.
        time_scale: its clock at the noisy end (999 in score-based models, 1 for times in [0, 1]).
        betas: rates of a discrete schedule such as DDPM's, in place of the three above; its clock
            is the number of the step, which becomes fractional here.

    Source: arXiv 2405.20320, proposition 1; arXiv 2011.13456, appendix C.
    """
    if weights is not None:
        load_weights(net, weights)
    wrapped = DiffusionVelocity(
        net=net,
        family="vp",
        output=output,
        beta_min=beta_min,
        beta_max=beta_max,
        time_scale=time_scale,
        betas=betas,
    )
    return _flow(wrapped, shape, {"solver": "heun", "steps": 25}, weights)


def from_ve(
    net: nn.Module,
    *,
    shape: Sequence[int] | None = None,
    weights: str | FilePath | None = None,
    output: str = "noise",
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
) -> FlowModel:
    """A flow on straight lines out of a variance-exploding diffusion network.

    Args:
        net: the network `net(data + sigma noise, sigma, ...)`.
        shape: the shape of one sample.
        weights: a `.safetensors` file, or a `.pt` file of plain tensors, to fill `net` with first.
        output: what it outputs: noise, data or score.
        sigma_min: the smallest sigma it was trained for.
        sigma_max: the largest.

    Source: arXiv 2405.20320, proposition 1; arXiv 2011.13456, appendix C.
    """
    if weights is not None:
        load_weights(net, weights)
    wrapped = DiffusionVelocity(
        net=net, family="ve", output=output, sigma_min=sigma_min, sigma_max=sigma_max
    )
    return _flow(wrapped, shape, {"solver": "heun", "steps": 25}, weights)


def edm_times(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> list[float]:
    """EDM's grid of `steps` noise strengths as times of the rectified path, 0 and 1 added.

    `t = 1 / (1 + sigma)`. From t = 0 to 1/81 a step more bridges pure noise and the largest sigma.

    Raises:
        ValueError: fewer than two steps, or strengths out of order.

    Example:
        >>> [round(t, 3) for t in edm_times(4)]
        [0.0, 0.012, 0.093, 0.68, 0.998, 1.0]

    Source: arXiv 2206.00364, equation 5.
    """
    if steps < 2:
        raise ValueError(f"EDM's grid has two strengths or more, got steps={steps}")
    positive("sigma_min", sigma_min)
    positive("sigma_max - sigma_min", sigma_max - sigma_min)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    strengths = [(high + i / (steps - 1) * (low - high)) ** rho for i in range(steps)]
    return [0.0, *(1 / (1 + sigma) for sigma in strengths), 1.0]


def load_weights(net: nn.Module, file: str | FilePath) -> None:
    """Fill a network from a checkpoint, without running anything that is in it.

    Read are `.safetensors` and files of `torch.save` that hold tensors in dictionaries; averaged
    weights are preferred, and a prefix that all names share is dropped where the network lacks it.

    Raises:
        FileNotFoundError: no such file.
        ModelFolderError: a pickle, a damaged file, or weights of another network.
    """
    file = FilePath(file)
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    if file.suffix in (".pkl", ".pickle"):
        raise ModelFolderError(
            f"{file} is a pickle, which can run code when read and is refused: where you trust it, "
            "convert it in the repository it came from by torch.save(pickle.load(open(FILE, 'rb'))"
            "['ema'].state_dict(), 'weights.pt') and give weights.pt"
        )
    try:
        if file.suffix == ".safetensors":
            found: Any = load_file(file)
        else:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelFolderError(
            f"{file} is damaged or holds more than tensors, which can run code when read and is "
            "refused: save the network's state_dict() alone"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelFolderError(f"{file} cannot be read ({reason}): copy it anew") from None
    _fill(net, _tensors(found, file), file)


def _tensors(found: Any, file: FilePath) -> dict[str, Tensor]:
    """The table of weights inside a checkpoint."""
    while isinstance(found, Mapping):
        tensors = {name: v for name, v in found.items() if isinstance(v, Tensor)}
        inner = next((k for k in INSIDE if isinstance(found.get(k), Mapping)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        found = found[inner]
    raise ModelFolderError(f"{file} holds no table of weights: save the network's state_dict()")


def _fill(net: nn.Module, state: dict[str, Tensor], file: FilePath) -> None:
    own = net.state_dict()
    prefix = next(iter(state)).partition(".")[0] + "."
    if all(name.startswith(prefix) for name in state) and not any(
        n.startswith(prefix) for n in own
    ):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        raise ModelFolderError(
            f"{file} does not fit the network: {len(missing)} tensors are missing, {len(extra)} "
            f"are unknown and {len(shapes)} have another shape, such as "
            f"{(shapes or missing or extra)[0]}"
        )
    net.load_state_dict(state)


def _flow(
    net: DiffusionVelocity,
    shape: Sequence[int] | None,
    sampling: dict[str, Any],
    weights: str | FilePath | None,
) -> FlowModel:
    """The model, with its origin in the lineage."""
    entry = {
        "method": "convert",
        "from": net.family,
        "output": net.output,
        "systems": ["rfpp"],
        **({"weights": FilePath(weights).name} if weights is not None else {}),
    }
    return FlowModel(
        net, RectifiedPath(), "velocity", shape=shape, sampling=sampling, lineage=[entry]
    )
