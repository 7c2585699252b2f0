import pytest
import torch

from rectiflow.flows import FlowModel, GaussianField, InvertedPairs, integrate, uniform_times
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.flows.inverted_pairs import falling_times, invert
from rectiflow.flows.schedules import SchedulePath


def gaussian(path=None):
    """A model of the exact field to N(2, 0.5²)."""
    exact = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]))
    if path is not None:
        exact = GaussianField(torch.tensor([2.0]), torch.tensor([0.5]), path)
    return FlowModel(exact.velocity, path, shape=(3,))


def data(count=64):
    values = 2 + 0.5 * torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return TensorData(values)


def test_the_noise_is_that_of_the_exact_map():
    # The flow maps z to 2 + 0.5 z. Heun's error is below 1e-3 at 64 steps.
    pairs = InvertedPairs(gaussian(), data(), noise=0.0).draw(Draw.of(32))
    torch.testing.assert_close(pairs.source, (pairs.target - 2) / 0.5, rtol=0, atol=2e-3)


def test_invariant_9_images_come_back_better_with_more_steps():
    errors = []
    for steps in (4, 12, 36):
        pairs = InvertedPairs(gaussian(), data(), steps, "euler", noise=0.0).draw(Draw.of(32))
        back = integrate(gaussian(), pairs.source, steps, "euler")
        errors.append((back - pairs.target).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    fine = InvertedPairs(gaussian(), data(), 64, noise=0.0).draw(Draw.of(32))
    back = integrate(gaussian(), fine.source, 64, "heun")
    torch.testing.assert_close(back, fine.target, rtol=0, atol=1e-3)


def test_drawing_is_a_pure_function_of_the_draw():
    coupling = InvertedPairs(gaussian(), data(), steps=3)
    whole = coupling.draw(Draw.of(8, step=5, seed=1))
    again = coupling.draw(Draw.of(8, step=5, seed=1))
    part = coupling.draw(Draw.of(8, step=5, seed=1, part=slice(2, 6)))
    assert torch.equal(whole.source, again.source)
    assert torch.equal(whole.target[2:6], part.target)
    torch.testing.assert_close(whole.source[2:6], part.source)
    assert not whole.source.requires_grad


def test_fresh_noise_enters_at_the_given_level():
    target, fresh = torch.zeros(4, 3), torch.ones(4, 3)
    still = FlowModel(lambda x, t: torch.zeros_like(x), shape=(3,))
    found = invert(still, target, fresh, noise=0.25, steps=2)
    torch.testing.assert_close(found, torch.full((4, 3), 0.25))


def test_conditions_reach_the_teacher_and_the_pairs():
    def push(x, t, label):
        return label[:, None].to(x).expand_as(x)

    values = TensorData(torch.zeros(6, 2), {"label": torch.arange(6)})
    pairs = InvertedPairs(FlowModel(push, shape=(2,)), values, 2, noise=0.0).draw(Draw.of(6))
    torch.testing.assert_close(pairs.source[:, 0], -pairs.condition["label"].float())


def test_sources_of_other_paths_have_unit_scale():
    path = VariancePreservingPath()
    pairs = InvertedPairs(gaussian(path), data(400), 40, noise=1e-3).draw(Draw.of(400))
    # 1200 values: three standard errors of mean and spread, and the path's remnant of data.
    assert abs(pairs.source.mean().item()) < 0.1
    assert pairs.source.std().item() == pytest.approx(1, abs=0.07)


def test_inverted_sources_start_where_the_inversion_ended():
    path = SchedulePath("scaled_linear", 0.00085, 0.012)
    still = FlowModel(lambda x, t: torch.zeros_like(x), path, shape=(2,))
    target = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    found = invert(still, target, torch.zeros_like(target), steps=4, noise=1e-3)
    first = torch.full((4,), 1 - 1e-3, dtype=target.dtype)
    start = path.interpolate(torch.zeros_like(target), target, first)
    torch.testing.assert_close(path.start(found), start)


def test_times():
    assert falling_times(2, 0.2) == pytest.approx([0.8, 0.4, 0.0])
    assert falling_times([0.9, 0.3, 0.0], 1e-3) == [0.9, 0.3, 0.0]
    with pytest.raises(ValueError, match=r"goes back to t = 0: its times end at 0.1"):
        InvertedPairs(gaussian(), data(), steps=[1.0, 0.1])
    with pytest.raises(ValueError, match="its times end at 1"):
        InvertedPairs(gaussian(), data(), steps=uniform_times(3))
    with pytest.raises(ValueError, match=r"noise must be in \[0, 1\), got 1"):
        InvertedPairs(gaussian(), data(), noise=1.0)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        InvertedPairs(gaussian(), data(), steps=0)
