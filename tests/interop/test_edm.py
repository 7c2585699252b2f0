"""Diffusion checkpoints as flows: the exact flow, safe loading, EDM's grid."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rectiflow.distill import Reflow, generate_pairs
from rectiflow.errors import ModelFolderError
from rectiflow.flows import FlowModel, RectifiedPath, StoredPairs, integrate, sample
from rectiflow.interop import edm_times, from_edm, from_ve, from_vp
from rectiflow.nets import MLP, build
from rectiflow.training import OptimizerSettings, Trainer, TrainerSettings
from rectiflow.training.denoising import Denoising


class Denoiser(nn.Module):
    """The exact denoiser of N(0, 0.6²) with a weight, so that it can be filled."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Parameter(torch.tensor(0.6))

    def forward(self, y, sigma):
        wide = sigma.reshape(-1, *(1,) * (y.ndim - 1))
        return self.spread**2 / (self.spread**2 + wide**2) * y


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(shape=(2,), width=16, depth=1, zero=False)


def test_flow_carries_noise_to_the_data():
    model = from_edm(Denoiser(), shape=(4,), output="data")
    assert isinstance(model.path, RectifiedPath)
    z = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    found = sample(model, source=z)
    # The flow of a Gaussian scales: z to 0.6 z. Heun with 18 strengths of EDM is off by 2e-3.
    torch.testing.assert_close(found, 0.6 * z, rtol=0, atol=0.02)
    assert model.lineage[0] == {
        "method": "convert",
        "from": "edm",
        "output": "data",
        "systems": ["rfpp"],
    }


def test_vp_and_ve_give_the_same_flow():
    class Noise(nn.Module):
        def forward(self, y, clock):
            u = clock[:, None]
            alpha = (-(u**2) * 19.9 / 4 - 0.05 * u).exp()
            noise = (1 - alpha**2).sqrt()
            return noise / ((0.6 * alpha) ** 2 + noise**2) * y

    t = torch.linspace(0.05, 0.95, 20)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    wanted = from_edm(Denoiser(), output="data").velocity(x, t)
    found = from_vp(Noise(), time_scale=1.0).velocity(x, t)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(from_ve(Denoiser(), output="data").velocity(x, t), wanted)


def test_grid_of_the_paper():
    times = edm_times(18)
    assert len(times) == 20
    assert times[0] == 0.0
    assert times[1] == pytest.approx(1 / 81)
    assert times[-2] == pytest.approx(1 / 1.002)
    assert times[-1] == 1.0
    assert sorted(times) == times
    with pytest.raises(ValueError, match="two strengths or more, got steps=1"):
        edm_times(1)


@pytest.mark.parametrize("wrap", [None, "ema", "prefix"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_weights_are_found(tmp_path, wrap, ending):
    source, file = small(1), tmp_path / f"weights.{ending}"
    state = source.state_dict()
    if wrap == "prefix":
        state = {f"model.{name}": value for name, value in state.items()}
    if ending == "safetensors":
        save_file(state, file)
    else:
        held = {"step": 3, "model": small(2).state_dict(), "ema": state} if wrap == "ema" else state
        torch.save(held, file)
    model = from_edm(small(0), shape=(2,), weights=file)
    x, t = torch.randn(4, 2), torch.rand(4)
    torch.testing.assert_close(model.velocity(x, t), from_edm(source).velocity(x, t))
    assert model.lineage[0]["weights"] == file.name


class Trap:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


def test_pickles_are_refused_and_never_run(tmp_path):
    file = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    file.write_bytes(pickle.dumps({"ema": Trap()}))
    with pytest.raises(ModelFolderError, match=r"is a pickle, .* convert it .*state_dict\(\)"):
        from_edm(small(), weights=file)
    hidden = tmp_path / "weights.pt"
    torch.save({"ema": Trap()}, hidden)
    with pytest.raises(ModelFolderError, match="holds more than tensors"):
        from_edm(small(), weights=hidden)


def test_bad_files_give_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        from_edm(small(), weights=tmp_path / "none.pt")
    for ending in ("pt", "safetensors"):
        broken = tmp_path / f"broken.{ending}"
        broken.write_bytes(b"\x00\x01 not a checkpoint")
        with pytest.raises(ModelFolderError, match=r"cannot be read|holds more than tensors"):
            from_edm(small(), weights=broken)
    empty = tmp_path / "empty.pt"
    torch.save({"step": 3}, empty)
    with pytest.raises(ModelFolderError, match="holds no table of weights"):
        from_edm(small(), weights=empty)
    other = tmp_path / "other.pt"
    torch.save(MLP(shape=(2,), width=8, depth=1).state_dict(), other)
    with pytest.raises(ModelFolderError, match=r"does not fit the network: .* have another shape"):
        from_edm(small(), weights=other)


def test_edm_training_then_reflow(tmp_path):
    # Correlated normal data: a denoiser that knows only the scale would draw them independent.
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1024, 2, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.44]])
    start = from_edm(small(), shape=(2,), sigma_data=1.0)
    settings = TrainerSettings(
        steps=200, batch_size=256, ema=0.98, optim=OptimizerSettings(learning_rate=3e-3)
    )
    untrained = copy.deepcopy(start)
    model = Trainer(Denoising(start, data), settings).fit()
    z = torch.randn(400, 2, generator=generator)
    found = sample(model, source=z)
    before, after = (torch.corrcoef(x.T)[0, 1] for x in (sample(untrained, source=z), found))
    assert after > max(0.6, before + 0.3)
    store = generate_pairs(model, tmp_path, 512, solver="heun", steps=edm_times(18), gate=None)
    again = Trainer(Reflow(model, StoredPairs(store)), settings).fit()
    again.save_pretrained(tmp_path / "model")
    read = FlowModel.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        one, first = (integrate(field, z, 1) for field in (read, model))
    assert (one - found).square().mean() < 0.5 * (first - found).square().mean()


def test_edm_loss_is_zero_for_the_exact_denoiser_and_weighted():
    class Origin(nn.Module):
        def forward(self, y, sigma):
            return 0 * y

    from rectiflow.flows.couplings import Draw

    data = torch.full((8, 2), 0.5)
    method = Denoising(from_edm(Origin(), shape=(2,), output="data"), data, std=1e-9)
    sigma = torch.tensor(-1.2).exp()
    wanted = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * 0.25
    torch.testing.assert_close(method.loss(Draw.of(8)), wanted)
    with pytest.raises(ValueError, match=r"made by interop\.edm\.from_edm, got a MLP"):
        Denoising(FlowModel(build("mlp", shape=(2,), width=4, depth=1)), data)
