import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectiflow.flows import FlowModel, Trajectory, integrate, uniform_times

SOLVERS = ["euler", "midpoint", "heun", "rk4", "dopri5", "sde"]


def model():
    return FlowModel(lambda x, t: torch.cos(x) - t.reshape(-1, *[1] * (x.ndim - 1)), shape=(2,))


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_are_not_written_to(solver):
    x, kept = torch.ones(3, 2), torch.ones(3, 2)
    found = integrate(model(), x, 4, solver, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, kept)
    assert found.shape == x.shape
    assert not torch.equal(found, x)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dtype_of_the_state_is_kept(solver, dtype):
    found = (
        integrate(lambda x, t: -x, torch.ones(2, 1, dtype=dtype), 2, solver)
        if (solver != "sde")
        else integrate(FlowModel(lambda x, t: -x), torch.ones(2, 1, dtype=dtype), 2, solver)
    )
    assert found.dtype == dtype


@pytest.mark.parametrize("solver", SOLVERS)
def test_times_reach_the_field_one_a_sample_and_in_order(solver):
    seen = []

    def net(x, t):
        assert t.shape == (3,)
        assert bool((t == t[0]).all())
        seen.append(t[0].item())
        return x * 0

    integrate(FlowModel(net), torch.ones(3, 2), [0.25, 0.5, 1.0], solver)
    assert min(seen) == 0.25
    assert max(seen) <= 1.0


@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_correctors_see_every_step_and_may_change_the_state(solver):
    records, generator = [], torch.Generator()

    def corrector(step):
        records.append(step)
        return step.after + 1

    field, label = FlowModel(lambda x, t, label: 2 * x), torch.zeros(1)
    x, grid = torch.ones(1, 1, dtype=torch.float64), [0.0, 0.5, 0.75]
    end = integrate(
        field, x, grid, solver, correctors=(corrector,), generator=generator, label=label
    )
    assert [(s.index, s.time, s.next_time) for s in records] == [(0, 0.0, 0.5), (1, 0.5, 0.75)]
    assert torch.equal(records[0].before, x)
    assert torch.equal(records[1].before, records[0].after + 1)
    assert torch.equal(end, records[1].after + 1)
    for step in records:
        assert step.field is field
        assert step.condition["label"] is label
        assert step.generator is generator
        torch.testing.assert_close(step.velocity, 2 * step.before)
    growth = (records[1].after / records[1].before).item()
    # exp(2 x 0.25); one Euler step of 0.25 has 1.5, one of RK4 misses by (0.5)^5/120.
    assert growth == pytest.approx(1.5 if solver == "euler" else 1.6487, abs=1e-3)


def test_correctors_run_one_after_another():
    def add(step):
        return step.after + 1

    class Double:
        def __call__(self, step):
            return step.after * 2

    x = torch.zeros(1, 1)
    assert integrate(lambda x, t: x * 0, x, 1, correctors=(add, Double())).item() == 2


def test_trajectory_keeps_states():
    seen = Trajectory()
    end = integrate(lambda x, t: x, torch.ones(2, 1), 3, correctors=(seen,))
    assert seen.times == uniform_times(3)
    assert len(seen.states) == 4
    assert torch.equal(seen.states[-1], end)


@pytest.mark.parametrize("solver", ["euler", "dopri5"])
def test_descending_times_run_backward(solver):
    grid = [1.0, 0.6, 0.0]
    found = integrate(lambda x, t: x * 0 + 1, torch.zeros(1, 1), grid, solver)
    torch.testing.assert_close(found, -torch.ones(1, 1))
    from_tensor = integrate(lambda x, t: x * 0 + 1, torch.zeros(1, 1), torch.tensor(grid), solver)
    torch.testing.assert_close(found, from_tensor)


@pytest.mark.parametrize(
    "times",
    [[0.0], [], [0.0, 0.5, 0.5], [0.0, 1.0, 0.5], [-0.1, 1.0], [0.0, 1.1], [0.0, float("nan")]],
    ids=str,
)
def test_wrong_times_are_refused(times):
    with pytest.raises(ValueError, match=r"times must be two or more strictly rising"):
        integrate(lambda x, t: x, torch.zeros(1, 1), times)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be >= 1, got {steps}"):
        integrate(lambda x, t: x, torch.zeros(1, 1), steps)


def test_conditions_must_have_a_row_a_sample():
    x = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"condition 'label' must have one row for each of the 3"):
        integrate(lambda x, t, label: x, x, 1, label=torch.zeros(2))
    # Scalars and plain values pass.
    integrate(lambda x, t, label, scale: x, x, 1, label=torch.tensor(2), scale=1.5)


def test_states_are_checked_by_the_field():
    with pytest.raises(ValueError, match=r"states must have shape \(batch, 2\), got \(3, 1\)"):
        integrate(model(), torch.zeros(3, 1), 1)
    with pytest.raises(ValueError, match=r"states must be floating point, got torch\.int64"):
        integrate(model(), torch.zeros(3, 2, dtype=torch.int64), 1)


def test_no_graph_is_built_when_gradients_are_off():
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert not integrate(lambda x, t: weight * x, torch.ones(1, 1), 2).requires_grad
    assert integrate(lambda x, t: weight * x, torch.ones(1, 1), 2).requires_grad


@settings(max_examples=25, deadline=None)
@given(
    solver=st.sampled_from(["euler", "midpoint", "heun", "rk4"]),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    steps=st.integers(1, 4),
    count=st.integers(2, 4),
)
def test_samples_do_not_depend_on_their_neighbours(solver, shape, steps, count):
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)).double()
    field = FlowModel(model().net)
    together = integrate(field, x, steps, solver)
    apart = torch.cat([integrate(field, row[None], steps, solver) for row in x])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    flipped = integrate(field, x.flip(0), steps, solver).flip(0)
    torch.testing.assert_close(together, flipped, rtol=1e-12, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(steps=st.integers(1, 500), start=st.floats(0, 1), stop=st.floats(0, 1))
def test_uniform_times_end_exactly(steps, start, stop):
    times = uniform_times(steps, start=start, stop=stop)
    assert len(times) == steps + 1
    assert times[0] == start
    assert times[-1] == stop
