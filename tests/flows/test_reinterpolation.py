import pytest
import torch

from rectiflow.flows import (
    Counted,
    FlowModel,
    GaussianField,
    Reinterpolation,
    integrate,
    sample,
    uniform_times,
)
from rectiflow.flows.diffusion_paths import VariancePreservingPath
from rectiflow.flows.pair_format import describe_solver, solver_of

BOTH = pytest.mark.parametrize("name", ["reinterpolate", "reinterpolate-heun"])
PEERS = {"reinterpolate": "euler", "reinterpolate-heun": "heun"}


def noises(count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def bent(x, t):
    return torch.sin(x) + t[:, None] ** 2


def official(velocity, z, steps, heun):
    """The paper's loop in the paper's time, s = 1 - t and velocity noise - data."""
    start = z

    def v(state, time):
        return -velocity(state, torch.full((len(start),), 1 - time, dtype=start.dtype))

    for i in range(steps):
        s, after = 1 - i / steps, 1 - (i + 1) / steps

        slope = v(z, s)
        predicted = (1 - after) * (z - s * slope) + after * start
        if heun and i < steps - 1:
            slope = 0.5 * (slope + v(predicted, after))
            predicted = (1 - after) * (z - s * slope) + after * start
        z = predicted
    return z


@BOTH
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_is_the_papers_rule(name, steps):
    found = integrate(bent, noises(), steps, name)
    wanted = official(bent, noises(), steps, name.endswith("heun"))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@BOTH
def test_invariant_4_one_step_is_eulers(name):
    found = integrate(bent, noises(), 1, name)
    torch.testing.assert_close(found, integrate(bent, noises(), 1, "euler"))


@BOTH
@pytest.mark.parametrize("steps", [2, 7])
def test_invariant_4_straight_flows_are_followed_exactly(name, steps):
    z = noises()
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = integrate(lambda x, t: shift.expand_as(x), z, steps, name)
    torch.testing.assert_close(found, z + shift)
    # Straight and not constant: every point keeps the velocity of its own line, z to 3 z.
    straight = integrate(lambda x, t: 2 * x / (1 + 2 * t[:, None]), z, steps, name)
    torch.testing.assert_close(straight, 3 * z)


def test_three_steps_differ_from_eulers_on_a_bent_flow_and_two_do_not():
    # The first step begins with the noise itself, the last one ends at the estimate.
    two, three = (integrate(bent, noises(), n, "reinterpolate") for n in (2, 3))
    torch.testing.assert_close(two, integrate(bent, noises(), 2, "euler"))
    assert (three - integrate(bent, noises(), 3, "euler")).abs().max() > 0.01


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_invariant_4_evaluations(steps):
    for name, wanted in (("reinterpolate", steps), ("reinterpolate-heun", 2 * steps - 1)):
        field = Counted(bent)
        integrate(field, noises(), steps, name)
        assert field.evaluations == wanted


def test_invariant_4_last_step_of_heun_is_plain():
    # On a grid of one long and one last step the last uses its first velocity alone.
    grid = [0.0, 0.5, 1.0]
    seen = []

    def watched(x, t):
        seen.append(t[0].item())
        return bent(x, t)

    integrate(watched, noises(), grid, "reinterpolate-heun")
    assert seen == [0.0, 0.5, 0.5]


@BOTH
def test_a_later_start_takes_the_implied_noise(name):
    z = noises()
    start = z * 1.5  # at t = 0.25 on the straight flow z to 3 z
    found = integrate(lambda x, t: 2 * x / (1 + 2 * t[:, None]), start, [0.25, 0.6, 1.0], name)
    torch.testing.assert_close(found, 3 * z)


@BOTH
def test_own_grids_and_ends_before_one(name):
    z = noises()
    shift = torch.ones(2, dtype=torch.float64)
    found = integrate(lambda x, t: shift.expand_as(x), z, [0.0, 0.1, 0.7], name)
    torch.testing.assert_close(found, z + 0.7)


@BOTH
def test_integrations_do_not_share_their_noise(name):
    solver = Reinterpolation(corrected=name.endswith("heun"))
    first = integrate(bent, noises(), 3, solver)
    integrate(bent, noises() + 5, 3, solver)
    assert torch.equal(integrate(bent, noises(), 3, solver), first)
    model = FlowModel(bent, shape=(2,))
    whole = sample(model, source=noises(), steps=3, solver=name)
    parts = sample(model, source=noises(), steps=3, solver=name, batch_size=5)
    torch.testing.assert_close(whole, parts)


@BOTH
def test_gradients_flow_through_every_step(name):
    x = noises(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: integrate(bent, z, 3, name), x)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="forward in time only: times must ascend"):
        integrate(bent, noises(), uniform_times(3, start=1, stop=0), "reinterpolate")
    curved = GaussianField(torch.zeros(2), torch.ones(2), VariancePreservingPath())
    with pytest.raises(ValueError, match="goes along straight lines, got a field on the 'vp'"):
        integrate(curved, noises(), 3, "reinterpolate")


@BOTH
def test_stores_remember_it_by_name(name):
    solver = Reinterpolation(corrected=name.endswith("heun"))
    assert describe_solver(solver) == {"name": name}
    assert solver_of({"name": name}) == solver
