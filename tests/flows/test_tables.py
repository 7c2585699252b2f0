"""The path through a table of noise levels."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import FlowModel, RectifiedPath, TablePath
from rectiflow.flows.path_registry import build
from rectiflow.flows.tables import MOST_LOG_SNR


def scaled_linear(count: int = 1000) -> tuple[float, ...]:
    """Stable Diffusion's table, in double precision."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64) ** 2
    return tuple((1 - betas).cumprod(0).tolist())


def test_coefficients_are_those_of_the_table() -> None:
    table = scaled_linear()
    path = TablePath(table)
    steps = torch.tensor([0.0, 1, 499, 998, 999], dtype=torch.float64)
    found = path.alpha(path.time(steps)).square()
    torch.testing.assert_close(found, torch.tensor([table[int(k)] for k in steps]).double())
    # The values that the specification of the paper gives.
    assert found[2].item() == pytest.approx(0.2777, abs=1e-4)
    assert found[4].item() == pytest.approx(0.00466, abs=1e-5)
    torch.testing.assert_close(path.index(path.time(steps)), steps)
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))


def test_derivatives_are_those_of_the_coefficients() -> None:
    path = TablePath(scaled_linear(50))
    # Between timesteps, where the interpolation is smooth.
    t = (torch.arange(49, dtype=torch.float64) + 0.37) / 50
    for value, slope in ((path.alpha, path.dalpha), (path.sigma, path.dsigma)):
        numeric = (value(t + 1e-6) - value(t - 1e-6)) / 2e-6
        torch.testing.assert_close(slope(t), numeric, atol=1e-7, rtol=1e-7)


def test_index_inverts_the_log_ratio() -> None:
    path = TablePath(scaled_linear())
    steps = torch.tensor([0.0, 0.25, 1, 7.5, 500, 998.9, 999], dtype=torch.float64)
    torch.testing.assert_close(path.index_at(path.log_snr(path.time(steps))), steps)
    beyond = torch.tensor([99.0, -99.0], dtype=torch.float64)
    assert path.index_at(beyond).tolist() == [0, 999]


def test_conversions_agree_on_the_path() -> None:
    path = TablePath(scaled_linear())
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0, 1, 6, dtype=torch.float64)
    x, v = path.interpolate(source, target, t), path.velocity(source, target, t)
    for given, output in (("velocity", v), ("noise", source), ("data", target)):
        for wanted, expected in (("velocity", v), ("noise", source), ("data", target)):
            found = path.convert(output, x, t, given=given, wanted=wanted)
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def test_single_precision_keeps_its_digits_at_both_ends() -> None:
    path = TablePath(scaled_linear())
    for t in (0.0, 1e-3, 0.999, 1.0):
        # The same time in both: 1 - 0.999 has lost five digits to the rounding of 0.999 alone.
        single = torch.tensor(t)
        exact = path.sigma(single.double())
        assert float(path.sigma(single)) == pytest.approx(float(exact), rel=1e-5)


def test_pure_ends_are_held_finite() -> None:
    path = TablePath((1.0, 0.5, 0.0))
    t = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(path.alpha(t), torch.tensor([1e-5, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(path.sigma(t), torch.tensor([1.0, 1e-5]), atol=1e-6, rtol=0)
    assert path.log_snr(t).tolist() == [-MOST_LOG_SNR, MOST_LOG_SNR]
    assert path.dsigma(t).isfinite().all()


def test_tables_that_do_not_fall_are_refused() -> None:
    for table in ((), (0.5,), (0.5, 0.5), (0.1, 0.9), (1.1, 0.2), (0.9, float("nan"))):
        with pytest.raises(ValueError, match="two or more falling numbers in"):
            TablePath(table)


def test_model_folders_keep_the_table(tmp_path) -> None:
    from rectiflow.nets import MLP

    net = MLP(shape=(2,), width=4, depth=1)
    model = FlowModel(net, TablePath(scaled_linear(20)), "noise", shape=(2,))
    model.save_pretrained(tmp_path / "model")
    assert FlowModel.from_pretrained(tmp_path / "model").path == model.path
    assert build("rectified") == RectifiedPath()
