"""Rectified diffusion: equal to reflow where both apply, exact where the theory is, in phases."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import PhasedRectifiedDiffusion, RectifiedDiffusion, Reflow
from rectiflow.flows import (
    L2,
    CosinePath,
    DataPseudoHuber,
    EDMPath,
    FlowModel,
    GaussianField,
    Independent,
    NoiseL2,
    PairedGaussian,
    PhasedPairs,
    RectifiedPath,
    VariancePreservingPath,
    sample,
)
from rectiflow.flows.couplings import Draw, LivePairs, Pairs, TensorData
from rectiflow.flows.metrics import first_order_gap
from rectiflow.flows.path_registry import PATHS
from rectiflow.flows.schedules import SchedulePath
from rectiflow.nets import build
from rectiflow.training import FlowMatching, OptimizerSettings, Trainer, TrainerSettings

SD = SchedulePath("scaled_linear", 0.00085, 0.012)
MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 2.0], dtype=torch.float64)


class Fixed:
    """A coupling of given pairs, in order."""

    def __init__(self, source, target):
        self.source, self.target = source, target

    def draw(self, draw):
        return Pairs(self.source[draw.part], self.target[draw.part])


class Rows(Fixed):
    """The same, in shuffled epochs."""

    def draw(self, draw):
        rows = draw.indices(len(self.source))
        return Pairs(self.source[rows], self.target[rows])


def points(count, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=generator, dtype=dtype)


def model_of(path=None, prediction="velocity", classes=0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(2,), width=32, depth=1, zero=False, classes=classes)
    return FlowModel(net, path, prediction, shape=(2,))


def exact(path, prediction):
    """A model that is the exact first-order field of the pairs (z, m + s z)."""
    field = PairedGaussian(MEAN, STD, path)
    outputs = {"noise": field.noise, "data": field.denoise, "velocity": field.velocity}
    return FlowModel(outputs[prediction], path, prediction, shape=(2,))


def test_invariant_8_is_reflow_bit_for_bit_on_straight_lines():
    teacher, pairs = model_of(), Fixed(points(64, 1), points(64, 2))
    reflow = Reflow(teacher, pairs, premetric=L2())
    rectified = RectifiedDiffusion(teacher, pairs, premetric=L2())
    gradients = []
    for method in (reflow, rectified):
        loss = method.loss(Draw.of(64, step=3))
        gradients.append((loss, *torch.autograd.grad(loss, list(method.model.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert rectified.model.sampling == teacher.sampling


def test_invariant_8_labels_and_dropout_too():
    teacher = model_of(classes=3)
    data = TensorData(points(64, 2), {"label": torch.arange(64) % 3})
    options = {"premetric": L2(), "condition_dropout": 0.4}
    reflow, rectified = (
        kind(teacher, Independent(data), **options) for kind in (Reflow, RectifiedDiffusion)
    )
    assert torch.equal(reflow.loss(Draw.of(64)), rectified.loss(Draw.of(64)))


@pytest.mark.parametrize("prediction", ["velocity", "data", "v", "noise", "score"])
@pytest.mark.parametrize("name", sorted(PATHS))
def test_losses_are_those_of_the_definition(name, prediction):
    path = PATHS[name]()
    teacher = model_of(path, prediction)
    source, target = points(32, 1), points(32, 2)
    if prediction in ("noise", "score") and path.alpha(torch.zeros(())) == 0:
        with pytest.raises(ValueError, match=f"a {prediction} prediction says nothing of the data"):
            RectifiedDiffusion(teacher, Fixed(source, target))
        return
    for premetric in (None, NoiseL2()):
        method = RectifiedDiffusion(teacher, Fixed(source, target), premetric=premetric)
        t = method.times.sample(32, generator=Draw.of(32).generator)
        x = path.interpolate(source, target, t)
        if premetric is None:
            error = method.model.denoise(x, t) - target
            wanted = ((error.square() + 1e-6).sqrt() - 1e-3).mean()
        else:
            wanted = (method.model.noise(x, t) - source).square().mean()
        # The definition subtracts large terms in float32 where alpha or sigma is small.
        torch.testing.assert_close(method.loss(Draw.of(32)), wanted, rtol=2e-3, atol=1e-5)


def test_students_of_curved_paths_are_sampled_by_first_order_steps():
    pairs = Fixed(points(4, 1), points(4, 2))
    method = RectifiedDiffusion(model_of(CosinePath()), pairs)
    assert method.premetric == DataPseudoHuber(1e-3)
    assert method.model.sampling == {"solver": "first-order", "steps": 50}
    assert method.condition_dropout == 0.1


def test_schedules_are_trained_at_their_indices():
    method = RectifiedDiffusion(model_of(SD, "noise"), Fixed(points(4, 1), points(4, 2)))
    drawn = method.times.sample(200, generator=torch.Generator().manual_seed(0)).double()
    index = SD.index(drawn)
    assert (index - index.round()).abs().max() < 1e-3
    assert index.max() > 900
    assert index.min() >= -1e-3


@pytest.mark.parametrize("path", [CosinePath(), EDMPath(), SD], ids=lambda p: p.name)
def test_exact_pairs_are_a_fixed_point(path):
    source = points(64, 1, torch.float64)
    teacher = exact(path, "velocity")
    for premetric in (DataPseudoHuber(), NoiseL2()):
        method = RectifiedDiffusion(
            teacher, Fixed(source, MEAN + STD * source), premetric=premetric
        )
        assert float(method.loss(Draw.of(64))) < 1e-12


@pytest.mark.parametrize(
    "path, prediction",
    [(CosinePath(), "velocity"), (VariancePreservingPath(), "noise"), (RectifiedPath(), "data")],
    ids=lambda p: getattr(p, "name", p),
)
def test_invariant_5_phases_cost_an_exact_student_nothing(path, prediction):
    teacher, data = exact(path, prediction), points(64, 1, torch.float64)
    for phases in (1, 2, 4):
        pairs = PhasedPairs(teacher, data, phases=phases, steps=8)
        assert float(PhasedRectifiedDiffusion(teacher, pairs).loss(Draw.of(32))) < 1e-12
    # ... and another student something.
    other = FlowModel(GaussianField(MEAN, STD, path).velocity, path, shape=(2,))
    assert float(PhasedRectifiedDiffusion(other, pairs).loss(Draw.of(32))) > 1e-2


@pytest.mark.parametrize("path", [RectifiedPath(), CosinePath()], ids=lambda p: p.name)
def test_invariant_4_one_phase_is_stage_one(path):
    teacher, data = model_of(path), points(64, 2)
    pairs = PhasedPairs(teacher, data, phases=1, steps=4)
    phased = PhasedRectifiedDiffusion(teacher, pairs)
    whole = RectifiedDiffusion(teacher, Fixed(*_ends(pairs)))
    # Times are drawn after the pairs: take those of the phased draw for both.
    generator = Draw.of(32).generator
    t = torch.rand(32, generator=generator)
    found = phased.losses(pairs.draw(Draw.of(32)), t, {})
    torch.testing.assert_close(
        found, whole.losses(whole.coupling.draw(Draw.of(32)), t, {}), rtol=1e-4, atol=1e-6
    )


def _ends(pairs):
    drawn = pairs.draw(Draw.of(32))
    return drawn.source, drawn.target


@pytest.mark.parametrize("path", [CosinePath(), SD], ids=lambda p: p.name)
def test_phased_loss_is_the_jump_to_the_end_of_the_phase(path):
    teacher = model_of(path, "v")
    pairs = PhasedPairs(teacher, points(64, 2), phases=4, steps=8)
    method = PhasedRectifiedDiffusion(teacher, pairs, premetric=DataPseudoHuber(0.1))
    drawn, u = pairs.draw(Draw.of(6)), torch.linspace(0.05, 0.95, 6)
    with torch.no_grad():
        found = method.losses(drawn, u, {})
    for i in range(6):
        # The formulas of the paper in z = x / alpha and NSR, row by row, in float64.
        t = drawn.begin[i] + u[i] * (drawn.end[i] - drawn.begin[i])
        at = {"begin": drawn.begin[i : i + 1], "t": t[None], "end": drawn.end[i : i + 1]}
        row = [drawn.source[i : i + 1], drawn.target[i : i + 1]]
        alpha = {k: path.alpha(v.double()) for k, v in at.items()}
        nsr = {k: path.sigma(v.double()) / alpha[k] for k, v in at.items()}
        x = path.interpolate(*row, at["t"])
        noise = method.model.noise(x, at["t"]).detach()
        jump = alpha["end"] * (x / alpha["t"] + (nsr["end"] - nsr["t"]) * noise)
        error = jump - path.interpolate(*row, at["end"])
        wanted = ((error.square() + 0.01).sqrt() - 0.1).mean()
        # alpha is about 0.1 in the noisiest row: float32 rounding grows tenfold.
        assert float(found[i]) == pytest.approx(float(wanted), rel=1e-3, abs=1e-6)


def test_students_know_their_phases(tmp_path):
    teacher = model_of(SD, "v")
    even = PhasedPairs(teacher, points(8, 1), phases=4, steps=8)
    published = PhasedPairs(teacher, points(8, 1), phases=4, steps=SD.trailing(40, clean=False))
    first, second = (PhasedRectifiedDiffusion(teacher, pairs).model for pairs in (even, published))
    assert first.sampling == {"solver": "first-order", "steps": 4}
    assert second.sampling["steps"] == pytest.approx([0, 0.25, 0.5, 0.75, 0.999])
    found = FlowModel.from_pretrained(second.eval().save_pretrained(tmp_path / "student"))
    assert (found.sampling, found.path) == (second.sampling, SD)
    source = points(3, 5)
    assert torch.equal(sample(found, source=source), sample(second, source=source))


def two_clusters():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1000, 2, generator=generator) * 0.3
    return data + 2 * (torch.randint(2, (1000, 2), generator=generator) * 2 - 1)


def settings(steps):
    optim = OptimizerSettings(learning_rate=5e-3)
    return TrainerSettings(steps=steps, batch_size=128, ema=0.95, optim=optim)


@pytest.fixture(scope="module")
def diffusion():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = build("mlp", shape=(2,), width=64, depth=2)
    model = FlowModel(net, CosinePath(), shape=(2,))
    return Trainer(FlowMatching(model, Independent(two_clusters())), settings(150)).fit()


def steps_of(model, source, steps):
    return sample(model, source=source, steps=steps, solver="first-order")


def test_training_brings_one_step_nearer_and_closes_the_gap(diffusion):
    source = points(1000, 5)
    pairs = Rows(source, steps_of(diffusion, source, 30))
    trained = Trainer(RectifiedDiffusion(diffusion, pairs), settings(100)).fit()
    fresh = points(500, 9)
    wanted = steps_of(diffusion, fresh, 30)
    errors = [float((steps_of(m, fresh, 1) - wanted).square().mean()) for m in (diffusion, trained)]
    assert errors[1] < 0.6 * errors[0]
    gaps = [first_order_gap(model, fresh, 20).total for model in (diffusion, trained)]
    assert gaps[1] < 0.8 * gaps[0]


def test_training_in_phases_needs_no_stored_pairs(diffusion):
    pairs = PhasedPairs(diffusion, two_clusters(), phases=2, steps=8)
    trained = Trainer(PhasedRectifiedDiffusion(diffusion, pairs), settings(80)).fit()
    source = points(500, 9)
    wanted = steps_of(diffusion, source, 40)
    assert trained.sampling == {"solver": "first-order", "steps": 2}
    before = steps_of(diffusion, source, 2)
    errors = [float((x - wanted).square().mean()) for x in (before, sample(trained, source=source))]
    assert errors[1] < 0.7 * errors[0]


def test_wrong_couplings_are_refused():
    teacher = model_of(CosinePath())
    with pytest.raises(ValueError, match="needs PhasedPairs, got LivePairs"):
        PhasedRectifiedDiffusion(teacher, LivePairs(teacher))
    other = PhasedPairs(model_of(), points(8, 1))
    with pytest.raises(ValueError, match="lie on the path 'rectified', the model on 'cosine'"):
        PhasedRectifiedDiffusion(teacher, other)
    zero = SchedulePath("linear", 1e-4, 0.02, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="a noise prediction says nothing of the data at t = 0"):
        RectifiedDiffusion(model_of(zero, "noise"), Fixed(points(4, 1), points(4, 2)))
    RectifiedDiffusion(model_of(zero, "v"), Fixed(points(4, 1), points(4, 2)))
