import math

import pytest
import torch
from torch import nn

from rectiflow.flows import EDMPath, FlowModel, GaussianField, SoftmaxField, integrate
from rectiflow.flows.metrics import (
    burgers_residual,
    energy_distance,
    extrapolations,
    relative_cost,
    round_trip_error,
    straightness,
    transport_cost,
    velocity_loss,
)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def normal_points(count):
    """Equally likely points whose mean and variance are exactly those of a standard normal."""
    levels = (torch.arange(count).double() + 0.5) / count
    points = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    return (points / points.std(correction=0)).unsqueeze(1)


def gaussian(m=0.7, s=2.5):
    return GaussianField(torch.tensor([m]).double(), torch.tensor([s]).double())


def test_invariant_2_straightness_and_loss_make_up_the_fall_of_the_cost():
    m, s, z = 0.7, 2.5, normal_points(64)
    field = gaussian(m, s)
    # Every source with every target: the independent coupling without sampling error.
    source, target = z.repeat(64, 1), m + s * z.repeat_interleave(64, 0)
    end = integrate(field, z, 50, "rk4")
    # Squares of the normal are all that enters, so that 64 points are exact.
    assert transport_cost(source, target) == pytest.approx(m**2 + 1 + s**2, rel=1e-10)
    assert transport_cost(z, end) == pytest.approx(m**2 + (s - 1) ** 2, rel=1e-6)
    irreducible = velocity_loss(field, source, target, 100)
    coarse, fine = (straightness(field, z, n, solver="midpoint").total for n in (50, 100))
    # Left-hand sums err by a multiple of the step, which two of them cancel; 1/100² remains.
    assert irreducible + 2 * fine - coarse == pytest.approx(2 * s, rel=1e-3)


def test_invariant_3_a_straight_coupling_has_no_loss_and_one_exact_step():
    root, shift = random(3, 3), random(3, seed=1)
    matrix = root @ root.T + torch.eye(3).double()
    source = random(200, 3, seed=2)
    target = source @ matrix.T + shift

    def velocity(x, t):
        # x_t = ((1 - t) I + t A) z + t b is solved for z.
        u = t[:, None, None]
        mix = (1 - u) * torch.eye(3).double() + u * matrix
        z = torch.linalg.solve(mix, x - t[:, None] * shift)
        return z @ (matrix - torch.eye(3).double()).T + shift

    assert velocity_loss(velocity, source, target, 20) < 1e-20
    torch.testing.assert_close(integrate(velocity, source, 1), target)
    found = straightness(velocity, source, 20)
    assert found.total < 1e-20
    assert found.per_time.shape == (20,)
    residual = burgers_residual(velocity, source, torch.full((200,), 0.3).double())
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-9)


def test_straightness_is_the_sum_over_dimensions_of_the_mean_over_samples():
    z, steps = random(6, 2, 3), 10

    def velocity(x, t):
        return torch.sin(x) * (1 + t.reshape(-1, 1, 1))

    state, velocities = z, []
    for i in range(steps):
        velocities.append(velocity(state, torch.full((6,), i / steps).double()))
        state = state + velocities[-1] / steps
    profile = [((state - z - v) ** 2).sum((1, 2)).mean() for v in velocities]
    found = straightness(velocity, z, steps)
    torch.testing.assert_close(found.per_time, torch.stack(profile))
    assert found.total == pytest.approx(sum(profile).item() / steps)
    assert found.per_dimension == pytest.approx(found.total / 6)
    cut = straightness(velocity, z, steps, batch_size=4)
    torch.testing.assert_close(cut.per_time, found.per_time)


def test_straightness_on_a_part_of_the_time_uses_its_chord():
    found = straightness(lambda x, t: 3 + 0 * x, random(4, 2), [0.2, 0.3, 0.7])
    assert found.total < 1e-25


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, t, *, label):
        return self.drop(x * label[:, None] * t[:, None])


def test_conditions_are_cut_and_dropout_is_off():
    model, z, label = FlowModel(Labelled().train()), random(5, 2), torch.arange(5).double()
    for measure in (
        lambda size: straightness(model, z, 4, batch_size=size, label=label).per_time,
        lambda size: round_trip_error(model, z, 4, batch_size=size, label=label),
        lambda size: torch.tensor(velocity_loss(model, z, z, 4, batch_size=size, label=label)),
    ):
        torch.testing.assert_close(measure(2), measure(100))
    assert extrapolations(model, z, 3, label=label).estimates.shape == (3, 5, 2)
    assert burgers_residual(model.eval(), z, label / 5, label=label).shape == z.shape
    model.train()
    straightness(model, z, 2, label=label)
    assert model.training


def test_relative_cost_is_zero_for_the_best_assignment_only():
    source = random(20, 2)
    assert relative_cost(source, 2 * source + 1) == pytest.approx(0, abs=1e-12)
    swapped = source[torch.arange(20).roll(1)]
    wanted = transport_cost(source, swapped)
    assert relative_cost(source, swapped) == pytest.approx(wanted)
    assert wanted > 0.1


def test_relative_cost_is_refused_in_high_dimension():
    with pytest.raises(ValueError, match="at most 10 dimensions, got 11: in high dimension it is"):
        relative_cost(torch.zeros(2, 11), torch.zeros(2, 11))
    assert relative_cost(torch.zeros(2, 10), torch.zeros(2, 10)) == 0


def test_round_trip_error_falls_with_the_steps():
    field, x = gaussian(), random(5, 1)
    coarse, fine = (round_trip_error(field, x, steps) for steps in (20, 80))
    assert coarse.shape == (5,)
    assert (fine < 0.4 * coarse).all()
    assert round_trip_error(field, x, 200, "rk4").max() < 1e-7
    code = integrate(field, x, torch.linspace(1, 0, 21).double())
    wanted = (integrate(field, code, 20) - x).abs().squeeze(1)
    torch.testing.assert_close(coarse, wanted, rtol=1e-6, atol=1e-9)


def test_extrapolations_are_the_denoised_states():
    field, z = SoftmaxField(random(4, 2)), random(3, 2, seed=1)
    found, state = extrapolations(field, z, 5), z
    assert found.times == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    end = integrate(field, z, 5)
    for index, time in enumerate(found.times):
        t = torch.full((3,), time).double()
        torch.testing.assert_close(found.estimates[index], field.denoise(state, t))
        wanted = (found.estimates[index] - end).square().sum(1).mean()
        torch.testing.assert_close(found.drift[index], wanted)
        state = state + 0.2 * field.velocity(state, t)


def test_burgers_residual_is_the_acceleration_along_the_flow():
    field, x, h = gaussian(), random(4, 1), 1e-4
    t = torch.full((4,), 0.4).double()
    after, before = (field.transport(x, 0.4, 0.4 + sign * h) for sign in (1, -1))
    acceleration = (after - 2 * x + before) / h**2
    # Rounding costs eps / h² = 1e-8.
    found = burgers_residual(field, x, t)
    torch.testing.assert_close(found, acceleration, rtol=1e-5, atol=1e-6)


def test_energy_distance_is_the_formula():
    x, y = random(30, 2), random(20, 2, seed=1) + 1
    between = torch.cdist(x, y).mean()
    within = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    wanted = (2 * between - within).item()
    assert energy_distance(x, y) == pytest.approx(wanted)
    assert energy_distance(x, y, chunk=7) == pytest.approx(wanted)
    assert energy_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


def test_energy_distance_of_one_distribution_falls_as_one_over_n():
    few, many = (
        sum(energy_distance(random(n, 2, seed=s), random(n, 2, seed=99 + s)) for s in range(10))
        for n in (50, 400)
    )
    assert few / many == pytest.approx(8, rel=0.5)


def test_sources_are_scaled_by_the_path():
    model = FlowModel(lambda x, t: -x, gaussian().path)
    wide = FlowModel(lambda x, t: -x, EDMPath())
    z = random(4, 2)
    assert straightness(wide, z, 5).total == pytest.approx(6400 * straightness(model, z, 5).total)


@pytest.mark.parametrize("measure", [straightness, extrapolations])
def test_empty_sources_are_refused(measure):
    with pytest.raises(
        ValueError, match=r"source must hold samples in rows \(b, ...\), got \(0, 2"
    ):
        measure(lambda x, t: x, torch.zeros(0, 2))
