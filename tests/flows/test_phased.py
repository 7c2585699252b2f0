"""Pairs in phases: both ends kept, rows apart, nothing stored."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import FlowModel, PairedGaussian, PhasedPairs, integrate
from rectiflow.flows.couplings import Draw, Independent, TensorData
from rectiflow.flows.diffusion_paths import CosinePath, EDMPath, VariancePreservingPath
from rectiflow.flows.fields import Counted
from rectiflow.flows.paths import RectifiedPath
from rectiflow.flows.schedules import SchedulePath
from rectiflow.guidance import APG
from rectiflow.nets import build

SD = SchedulePath("scaled_linear", 0.00085, 0.012)
PATHS = [RectifiedPath(), CosinePath(), VariancePreservingPath(), EDMPath(), SD]


def data(count=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64)


def teacher(path, bend=0.3):
    return FlowModel(lambda x, t: torch.tanh(x) * (1 + bend * t[:, None]), path, "v", shape=(3,))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.name)
def test_invariant_4_lines_go_through_both_ends(path):
    model = teacher(path)
    pairs = PhasedPairs(model, data(), phases=4, steps=8)
    found = pairs.draw(Draw.of(12))
    # Slow twin: each row by itself, from the same data and noise, through its own phase.
    draw = Draw.of(12)
    rows, noise = draw.indices(64), draw.normal((3,))
    for i in range(12):
        low, high = float(found.begin[i]), float(found.end[i])
        begin = torch.full((1,), low, dtype=torch.float64)
        start = path.interpolate(noise[i : i + 1], data()[rows[i : i + 1]], begin)
        end = integrate(model, start, [low, (low + high) / 2, high], "first-order")
        source, target = found.source[i : i + 1], found.target[i : i + 1]
        for time, wanted in ((found.begin, start), (found.end, end)):
            x = path.interpolate(source, target, time[i : i + 1].double())
            torch.testing.assert_close(x, wanted, rtol=1e-8, atol=1e-8)
    assert len(set(found.begin.tolist())) == 4


@pytest.mark.parametrize("path", [RectifiedPath(), CosinePath()], ids=lambda p: p.name)
def test_invariant_4_one_phase_is_a_pair_of_the_teacher(path):
    pairs = PhasedPairs(teacher(path), data(), phases=1, steps=6).draw(Draw.of(16))
    draw = Draw.of(16)
    draw.indices(64)
    noise = draw.normal((3,)).double()
    torch.testing.assert_close(pairs.source, noise)
    wanted = integrate(teacher(path), noise, 6, "first-order")
    torch.testing.assert_close(pairs.target, wanted)


def test_source_differs_from_the_noise_where_the_teacher_bends():
    draw = Draw.of(16)
    draw.indices(64)
    noise = draw.normal((3,)).double()
    pairs = PhasedPairs(teacher(CosinePath()), data(), phases=4, steps=8).draw(Draw.of(16))
    assert (pairs.source - noise).abs().max() > 0.1


def test_a_first_order_teacher_gives_its_own_pairs():
    path = VariancePreservingPath()
    field = PairedGaussian(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0]), path)
    model = FlowModel(field.noise, path, "noise", shape=(3,))
    pairs = PhasedPairs(model, data(), phases=4, steps=8).draw(Draw.of(32))
    # The map of the whole flow holds for every phase's pair.
    torch.testing.assert_close(pairs.target, field.mean + field.std * pairs.source)


def test_parts_of_a_draw_make_the_whole():
    pairs = PhasedPairs(teacher(CosinePath()), data(), phases=2, steps=4)
    whole = pairs.draw(Draw.of(12, step=3, seed=5))
    parts = [pairs.draw(Draw.of(12, step=3, seed=5, part=slice(i, i + 6))) for i in (0, 6)]
    for name in ("source", "target", "begin", "end"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_a_phase_costs_its_own_steps_only():
    model = teacher(CosinePath())
    counted = Counted(model)
    PhasedPairs(model, data(), phases=4, steps=40, guided=counted).draw(Draw.of(8))
    assert counted.evaluations == 10


def test_labels_reach_the_teacher_and_guidance_replaces_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(3,), width=8, depth=1, classes=4, zero=False)
    model = FlowModel(net.train(), CosinePath(), shape=(3,))
    labels = torch.arange(64) % 4
    source = TensorData(data().float(), {"label": labels})
    seen = []

    def guided(x, t, *, label):
        seen.append(label)
        assert not model.net.training
        return 2 * model.velocity(x, t, label=label)

    plain = PhasedPairs(model, source, phases=2, steps=4).draw(Draw.of(8))
    other = PhasedPairs(model, source, phases=2, steps=4, guided=guided).draw(Draw.of(8))
    assert model.net.training
    assert torch.equal(plain.condition["label"], labels[Draw.of(8).indices(64)])
    assert torch.equal(seen[0], plain.condition["label"])
    assert not torch.allclose(plain.target, other.target)
    assert not plain.target.requires_grad


def test_guidance_keeps_its_momentum_along_a_phase():
    net = build("mlp", shape=(3,), width=8, depth=1, classes=4, zero=False)
    model = FlowModel(net, CosinePath(), shape=(3,))
    labels = TensorData(data().float(), {"label": torch.arange(64) % 4})
    made = {}
    for momentum in (0.0, -0.5):
        guided = APG(model, 3.0, momentum=momentum)
        pairs = PhasedPairs(model, labels, phases=1, steps=4, guided=guided).draw(Draw.of(8))
        first = Independent(labels).draw(Draw.of(8))
        start = CosinePath().interpolate(first.source, first.target, torch.zeros(8))
        end = integrate(guided, start, 4, "first-order", **first.condition)
        torch.testing.assert_close(pairs.target, end, rtol=1e-4, atol=1e-4)
        made[momentum] = pairs.target
    assert not torch.allclose(made[0.0], made[-0.5])


def test_published_grid_of_a_schedule():
    pairs = PhasedPairs(teacher(SD), data(), phases=4, steps=SD.trailing(40, clean=False))
    assert pairs.boundaries == pytest.approx([0, 0.25, 0.5, 0.75, 0.999])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"phases": 8, "steps": 4}, "8 phases need as many teacher steps at least, got 4"),
        ({"phases": 3, "steps": 40}, "40 teacher steps cannot be cut into 3 equal phases"),
        ({"phases": 0}, "phases must be > 0, got 0"),
        ({"steps": [1.0, 0.5, 0.0]}, "times must rise from 0, got 1 to 0"),
        ({"steps": [0.1, 0.5, 1.0]}, "times must rise from 0, got 0.1 to 1"),
    ],
)
def test_wrong_phases_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PhasedPairs(teacher(CosinePath()), data(), **options)
