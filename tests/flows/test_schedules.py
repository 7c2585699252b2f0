"""Paths from tables of betas: diffusers' numbers, our time, nothing by default."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from rectiflow.errors import ModelFolderError
from rectiflow.flows import FlowModel, SchedulePath
from rectiflow.flows.path_registry import build
from rectiflow.flows.paths import PREDICTIONS
from rectiflow.nets import build as build_net

PATHS = {
    kind + (" zero" if zero else ""): SchedulePath(kind, 0.00085, 0.012, zero_terminal_snr=zero)
    for kind in ("linear", "scaled_linear")
    for zero in (False, True)
}


def scheduler(path, **options):
    import diffusers

    return diffusers.DDIMScheduler(
        num_train_timesteps=path.count,
        beta_schedule=path.betas,
        beta_start=path.beta_start,
        beta_end=path.beta_end,
        rescale_betas_zero_snr=path.zero_terminal_snr,
        timestep_spacing="trailing",
        **options,
    )


@pytest.mark.parametrize(
    "kind, values", [("linear", (0.1618, 0.00158)), ("scaled_linear", (0.2777, 0.00466))]
)
def test_invariant_9_published_values(kind, values):
    table = PATHS[kind].alpha_bar()
    # Four digits are published.
    assert table[499].item() == pytest.approx(values[0], abs=5e-5)
    assert table[999].item() == pytest.approx(values[1], abs=5e-6)
    assert table[0].item() == pytest.approx(0.99915, abs=5e-7)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_invariant_9_tables_are_those_of_diffusers(name):
    path = PATHS[name]
    wanted = scheduler(path).alphas_cumprod
    if path.zero_terminal_snr:
        # diffusers turns the rescaled table into betas and back: a thousand float32 roundings.
        torch.testing.assert_close(path.alpha_bar(), wanted, rtol=2e-4, atol=1e-7)
    else:
        assert torch.equal(path.alpha_bar(), wanted)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_the_path_passes_through_its_table(name):
    path = PATHS[name]
    t = path.time(torch.arange(1000))
    table = path.alpha_bar().double()
    torch.testing.assert_close(path.alpha(t).square(), table, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(path.sigma(t).square(), 1 - table, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(path.index(t), torch.arange(1000).double(), rtol=0, atol=1e-9)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert path.alpha(ends)[1] == 1
    assert path.sigma(ends)[1] == 0
    assert (path.alpha(ends)[0] == 0) == path.zero_terminal_snr


@pytest.mark.parametrize("name", sorted(PATHS))
def test_derivatives_match_differences_between_indices(name):
    path, h = PATHS[name], 1e-6
    # Off the thousandths, where the slope of alpha changes.
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64) + 0.0004
    for value, slope in ((path.alpha, path.dalpha), (path.sigma, path.dsigma)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(slope(t), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_invariant_3_conversions_invert_each_other(name):
    path = PATHS[name]
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 19, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 19, dtype=torch.float64)
    x = path.interpolate(source, target, t)
    for given in PREDICTIONS:
        for wanted in PREDICTIONS:
            output = path.target_of(given, source, target, t)
            found = path.convert(output, x, t, given=given, wanted=wanted)
            expected = path.target_of(wanted, source, target, t)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_conversions_stay_finite_at_the_ends(name):
    path, x = PATHS[name], torch.ones(2, 3)
    for given in PREDICTIONS:
        for wanted in PREDICTIONS:
            t = torch.tensor([0.0, 1.0])
            assert path.convert(2 * x, x, t, given=given, wanted=wanted).isfinite().all()


def test_sampling_starts_from_noise_at_full_strength():
    source = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PATHS["linear"].start(source), source)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30, 40, 999, 1000])
def test_trailing_grid_starts_where_diffusers_does(steps):
    path = PATHS["scaled_linear"]
    found = scheduler(path)
    found.set_timesteps(steps)
    wanted = path.time(found.timesteps).tolist()
    assert path.trailing(steps) == pytest.approx([*wanted, 1.0], abs=1e-12)
    noisy = path.trailing(steps, clean=False)
    assert noisy[-1] == pytest.approx(0.999, abs=1e-12)
    assert all(a < b for a, b in pairwise(noisy))


def test_four_phases_begin_at_the_published_indices():
    path = PATHS["scaled_linear"]
    index = path.index(torch.tensor(path.trailing(4, clean=False), dtype=torch.float64))
    assert index.tolist() == pytest.approx([999, 749, 499, 249, 0], abs=1e-9)


def test_training_times_are_those_of_the_indices():
    path = SchedulePath("linear", 1e-4, 0.02, count=10)
    drawn = path.training_times().sample(500, generator=torch.Generator().manual_seed(0))
    assert sorted({round(t, 6) for t in drawn.tolist()}) == [i / 10 for i in range(10)]


@pytest.mark.parametrize("name", sorted(PATHS))
def test_config_rebuilds_the_path(name):
    path = PATHS[name]
    config = json.loads(json.dumps(path.config()))
    assert config["name"] == "schedule"
    assert build(**config) == path


def test_scheduler_configs_are_read():
    path = PATHS["scaled_linear zero"]
    assert SchedulePath.from_scheduler(scheduler(path).config) == path


def test_model_folders_keep_the_schedule_and_refuse_to_guess_it(tmp_path):
    net = build_net("mlp", shape=(2,), width=8, depth=1)
    path = PATHS["linear"]
    model = FlowModel(net, path, "v", shape=(2,))
    folder = model.save_pretrained(tmp_path / "model")
    found = FlowModel.from_pretrained(folder)
    assert (found.path, found.prediction) == (path, "v")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["path"] = {"name": "schedule"}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="path 'schedule' takes betas, beta_start"):
        FlowModel.from_pretrained(folder)


def test_nothing_is_guessed():
    with pytest.raises(ValueError, match="does not state num_train_timesteps: weights belong"):
        SchedulePath.from_scheduler(
            {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        )
    stated = dict(PATHS["linear"].config(), beta_schedule="linear", num_train_timesteps=1000)
    with pytest.raises(ValueError, match="betas one by one"):
        SchedulePath.from_scheduler({**stated, "trained_betas": [0.1, 0.2]})
    with pytest.raises(ValueError, match="unknown beta schedule 'scaled-linear': did you mean"):
        SchedulePath("scaled-linear", 0.1, 0.2)
    with pytest.raises(ValueError, match=r"0 < beta_start <= beta_end < 1, got 0\.2 and 0\.1"):
        SchedulePath("linear", 0.2, 0.1)
    with pytest.raises(ValueError, match="count must be >= 2"):
        SchedulePath("linear", 0.1, 0.2, count=1)
    with pytest.raises(ValueError, match="1000 indices has no grid of 1001 steps"):
        PATHS["linear"].trailing(1001)
