"""Resolution-dependent shift: group law, log SNR, training times, solver grids."""

from __future__ import annotations

import math

import pytest
import torch

from rectiflow.flows import (
    Discrete,
    TimeShift,
    Uniform,
    integrate,
    resolution_shift,
    shift_times,
    shifted_times,
)

T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def test_shift_is_the_papers_formula_in_the_noise_level():
    level, alpha = 1 - T, 3.0
    paper = alpha * level / (1 + (alpha - 1) * level)
    torch.testing.assert_close(1 - shift_times(T, alpha), paper, rtol=1e-12, atol=1e-14)


def test_shifts_multiply_and_leave_the_ends():
    torch.testing.assert_close(shift_times(shift_times(T, 2.0), 1.7), shift_times(T, 3.4))
    torch.testing.assert_close(shift_times(shift_times(T, 5.0), 0.2), T)
    assert torch.equal(shift_times(T, 1.0), T)
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(shift_times(ends, 4.0), ends)


def test_log_snr_falls_by_twice_the_log_of_alpha():
    def snr(t):
        return 2 * torch.log(t / (1 - t))

    torch.testing.assert_close(snr(shift_times(T, 3.0)), snr(T) - 2 * math.log(3.0))


def test_the_mean_of_an_image_is_as_uncertain_at_both_resolutions():
    # Equation 23 derives from sigma(level, n) = level / ((1 - level) sqrt(n)).
    def uncertainty(t, pixels):
        return (1 - t) / t / math.sqrt(pixels)

    alpha = resolution_shift(64**2, 16**2)
    assert alpha == 4
    torch.testing.assert_close(
        uncertainty(shift_times(T, alpha), 64**2), uncertainty(T, 16**2), rtol=1e-12, atol=0
    )


def test_grids_are_shifted_once():
    levels = [1 - t for t in shifted_times(4, 3.0)]
    assert levels == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-15)
    assert shifted_times(4, 3.0)[0] == 0
    assert shifted_times(4, 3.0)[-1] == 1
    assert shifted_times(5, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    found = integrate(lambda x, t: torch.ones_like(x), torch.zeros(1, 1), shifted_times(7, 3.0))
    torch.testing.assert_close(found, torch.ones(1, 1))


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_the_legacy_grid_is_that_of_diffusers(steps):
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    found = [1 - t for t in shifted_times(steps, 3.0, legacy=True)]
    # Theirs is computed in float32.
    assert found == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_training_times_are_the_shifted_times_of_the_inner_sampler():
    inner = Discrete((0.0, 0.5, 1.0))
    generator = torch.Generator().manual_seed(0)
    plain = inner.sample(50, generator=generator)
    shifted = TimeShift(3.0, inner).sample(50, generator=generator.manual_seed(0))
    assert torch.equal(shifted, shift_times(plain, 3.0))
    assert set(shifted.tolist()) == {0.0, 0.25, 1.0}
    assert TimeShift(2.0) == TimeShift(2.0, Uniform())
    # Probabilities, which no slope stretches.
    density = TimeShift(3.0, inner).density(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    torch.testing.assert_close(density, torch.tensor([1 / 3, 1 / 3, 0.0, 1 / 3]))


def test_bad_settings_are_refused():
    for call in (
        lambda: shift_times(0.5, 0.0),
        lambda: TimeShift(-1.0),
        lambda: shifted_times(4, 0),
    ):
        with pytest.raises(ValueError, match="alpha must be > 0"):
            call()
    with pytest.raises(ValueError, match="steps must be > 0"):
        shifted_times(0, 3.0)
    with pytest.raises(ValueError, match="Discrete has no cdf"):
        TimeShift(2.0, Discrete((0.5,))).cdf(torch.tensor(0.5))
