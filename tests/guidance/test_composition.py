"""Model, guidance, view, solver, corrector: everything together, what commutes, what is refused.

The tables below are the matrix. A solver of `flows.solvers` joins by itself; a family, a path, a
guidance, a view or a corrector by one line.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.interop.pipelines import PROMPTS, shared, tokens
from torch import Tensor

from rectiflow.flows import (
    ClassifierFreeGuidance,
    EDMPath,
    FlowModel,
    RectifiedPath,
    SkipLayers,
    Trajectory,
    VariancePreservingPath,
    integrate,
)
from rectiflow.flows.adaptive import DormandPrince
from rectiflow.flows.solvers import names
from rectiflow.guidance import APG, FlowChef, Masked, MultiViewField
from rectiflow.guidance.views import Flip, Identity, Jigsaw, Negate, Rotate, Skew
from rectiflow.nets import build

SHAPE = (4, 8, 8)
TIMES = [0.2, 0.5, 0.8]
PATHS = {"rectified": RectifiedPath(), "vp": VariancePreservingPath(), "edm": EDMPath()}
# Loose, so that the adaptive solver takes a step an interval as the others do.
SOLVERS: dict[str, Any] = {**{n: n for n in names()}, "dopri5": DormandPrince(1e6, 1e6)}
STRAIGHT_ONLY = ("reinterpolate", "reinterpolate-heun")


@dataclass(frozen=True)
class Family:
    """A network, a condition for it and a negative one."""

    model: FlowModel
    condition: dict[str, Tensor]
    negative: dict[str, Any]
    skips: bool = False

    def on(self, path: str) -> FlowModel:
        """The network read as a field of a path."""
        return FlowModel(self.model.net, PATHS[path], self.model.prediction, shape=SHAPE)


def ours(name: str, skips: bool = False, **options: Any) -> Family:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build(name, shape=SHAPE, classes=3, depth=2, **options)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    label = torch.tensor([0, 2])
    return Family(FlowModel(net, shape=SHAPE), {"label": label}, {"label": 1}, skips)


def pipeline(name: str) -> Family:
    from rectiflow.interop.diffusers import encode_prompts, from_pipeline

    made = functools.partial(encode_prompts, shared(name), tokens=tokens(name), cache=None)
    given, unwanted = made(PROMPTS).everything(), made(["a blue dog"]).everything()
    model = from_pipeline(shared(name), size=(16, 16), tokens=tokens(name))
    return Family(model, given, {k: unwanted[k] for k in ("context", "pooled") if k in unwanted})


FAMILIES: dict[str, Callable[[], Family]] = {
    "mlp": lambda: ours("mlp", width=32, time_features=8),
    "mmdit": lambda: ours("mmdit", True, heads=2, head_dim=8, patch=4),
    "sd3": lambda: pipeline("sd3"),
    "flux": lambda: pipeline("flux"),
    "sd15": lambda: pipeline("sd"),
}
GUIDANCES: dict[str, Callable[[Any, Family], Any]] = {
    "none": lambda field, family: field,
    "cfg": lambda field, family: ClassifierFreeGuidance(field, 3.0),
    "interval": lambda field, family: ClassifierFreeGuidance(field, 3.0, start=0.1, stop=0.4),
    "negative": lambda field, family: ClassifierFreeGuidance(field, 3.0, negative=family.negative),
    "apg": lambda field, family: APG(field, 3.0, norm=1.0),
    "apg without momentum": lambda field, family: APG(field, 3.0, norm=1.0, momentum=0.0),
    "skip": lambda field, family: SkipLayers(field, (1,), 2.0, guidance=3.0, stop=0.6),
}
VIEWS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda field: field,
    "flip": lambda field: MultiViewField(field, [(Flip(), {})]),
    "negation": lambda field: MultiViewField(field, [(Negate(), {})]),
    "rotation": lambda field: MultiViewField(field, [(Rotate(90), {})]),
}
# Several views; whatever the guidance is, it is that of each.
COMBINED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda field: MultiViewField(field, TWO),
    "rectified": lambda field: MultiViewField(field, TWO, rectify="official"),
    "min-norm": lambda field: MultiViewField(field, TWO, combine="min-norm", rectify="matched"),
    "alternating": lambda field: MultiViewField(field, TWO, combine="alternate", steps=TIMES),
    "jigsaw": lambda field: MultiViewField(field, [(Jigsaw(), {}), (Skew(), {})], batched=False),
}
TWO = [(Identity(), {}), (Rotate(90), {})]
CORRECTORS: dict[str, Callable[[], Any]] = {
    "trajectory": Trajectory,
    "clamp": lambda: lambda step: step.after.clamp(-3, 3),
    "flowchef": lambda: FlowChef(Masked(torch.zeros(1, *SHAPE), torch.ones(SHAPE)), step_size=0.05),
}


@functools.cache
def family(name: str) -> Family:
    return FAMILIES[name]()


def start(path: str) -> Tensor:
    """Noises as the path has them at the first time."""
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    return noise * PATHS[path].sigma(torch.tensor(TIMES[0]))


def follow(field: Any, path: str, solver: str, condition: dict[str, Tensor], **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        return integrate(
            field, start(path), TIMES, SOLVERS[solver], generator=generator, **condition, **more
        )


def refused(guidance: str, solver: str, path: str) -> str:
    """Why a combination is refused, or nothing."""
    if solver in STRAIGHT_ONLY and path != "rectified":
        return "straight lines"
    return "takes evaluations back" if guidance == "apg" and solver == "dopri5" else ""


def two_views(field: Any, family: Family) -> Any:
    """Guidance, views, their combination and its rectification, in their order."""
    return MultiViewField(ClassifierFreeGuidance(field, 3.0), TWO, rectify="matched")


# The matrix


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_guidance_with_every_solver_on_every_path(name: str, path: str) -> None:
    one = family(name)
    for solver in SOLVERS:
        plain: Tensor | None = None
        for guidance, make in {**GUIDANCES, "cfg of two views": two_views}.items():
            if guidance == "skip" and not one.skips:
                continue
            field = make(one.on(path), one)
            because = refused(guidance, solver, path)
            if because:
                with pytest.raises(ValueError, match=because):
                    follow(field, path, solver, one.condition)
                continue
            found, case = follow(field, path, solver, one.condition), f"{guidance}, {solver}"
            assert found.shape == (2, *SHAPE), case
            assert found.isfinite().all(), case
            plain = found if plain is None else plain
            if guidance != "none":
                assert not torch.allclose(found, plain, atol=1e-6), case


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("view", [*VIEWS, *COMBINED])
def test_every_guidance_with_every_view_and_corrector(view: str, corrector: str) -> None:
    for name in ("mlp", "mmdit"):
        one = family(name)
        for guidance, make in GUIDANCES.items():
            guided = make(one.on("rectified"), one)
            if guidance == "skip" and not one.skips:
                continue
            if view == "alternating" and guidance == "apg":
                with pytest.raises(ValueError, match="not asked about at every step"):
                    COMBINED[view](guided)
                continue
            field = {**VIEWS, **COMBINED}[view](guided)
            made = (CORRECTORS[corrector](),)
            solver = "midpoint" if view == "alternating" else "heun"
            found = follow(field, "rectified", solver, one.condition, correctors=made)
            assert found.isfinite().all(), f"{guidance}, {view}, {corrector}"


# Pairs that commute


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("guidance", [g for g in GUIDANCES if g != "skip"])
def test_guidance_commutes_with_orthogonal_views(guidance: str, view: str) -> None:
    """Lengths and angles are the same in every view, and each has its own momentum."""
    one = family("mlp")
    model, guide, turn = one.on("rectified"), GUIDANCES[guidance], VIEWS[view]
    inside = follow(turn(guide(model, one)), "rectified", "heun", one.condition)
    outside = follow(guide(turn(model), one), "rectified", "heun", one.condition)
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-4)


def test_classifier_free_guidance_of_itself_multiplies_scales() -> None:
    one = family("mlp")
    model = one.on("rectified")
    twice = ClassifierFreeGuidance(ClassifierFreeGuidance(model, 2.0), 1.5)
    turned = ClassifierFreeGuidance(ClassifierFreeGuidance(model, 1.5), 2.0)
    wanted = follow(ClassifierFreeGuidance(model, 3.0), "rectified", "euler", one.condition)
    for field in (twice, turned):
        found = follow(field, "rectified", "euler", one.condition)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_guidance_in_intervals_that_do_not_meet_commutes() -> None:
    one = family("mlp")
    early, late = {"stop": 0.3}, {"start": 0.4}
    guide = ClassifierFreeGuidance
    fields = (
        guide(guide(one.on("rectified"), 2.0, **early), 4.0, **late),
        guide(guide(one.on("rectified"), 4.0, **late), 2.0, **early),
    )
    found = [follow(field, "rectified", "euler", one.condition) for field in fields]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_classifier_free_guidance_commutes_with_means_over_views_and_apg_does_not() -> None:
    """So guidance stands before the combination: each view is rectified for itself."""
    one = family("mlp")
    model, x, t = one.on("rectified"), start("rectified"), torch.full((2,), 0.5)

    def gap(guide: Callable[[Any], Any]) -> float:
        before, after = MultiViewField(guide(model), TWO), guide(MultiViewField(model, TWO))
        said = [field.velocity(x, t, **one.condition) for field in (before, after)]
        return float((said[0] - said[1]).abs().max())

    with torch.no_grad():
        assert gap(lambda field: ClassifierFreeGuidance(field, 3.0)) < 1e-4
        assert gap(lambda field: APG(field, 3.0, momentum=0.0)) > 1e-2


def test_apg_around_guidance_is_not_guidance_around_apg() -> None:
    one = family("mlp")
    model = one.on("rectified")
    a = APG(ClassifierFreeGuidance(model, 2.0), 2.0, momentum=0.0)
    b = ClassifierFreeGuidance(APG(model, 2.0, momentum=0.0), 2.0)
    found = [follow(field, "rectified", "euler", one.condition) for field in (a, b)]
    assert not torch.allclose(*found, atol=1e-3)


# Pairs that cannot go together


@pytest.mark.parametrize("guide", [ClassifierFreeGuidance, APG])
def test_guidance_needs_something_to_guide_toward(guide: Any) -> None:
    plain = FlowModel(build("mlp", shape=(2,), width=8, depth=1), shape=(2,))
    with pytest.raises(ValueError, match="needs a condition to guide toward, got none"):
        integrate(guide(plain, 2.0), torch.zeros(2, 2), 2)
    nameless = FlowModel(lambda x, t, label: x)
    with pytest.raises(ValueError, match="no null condition for label"):
        integrate(guide(nameless, 2.0), torch.zeros(2, 2), 2, label=torch.zeros(2))


def test_networks_without_layers_to_skip_say_so() -> None:
    one = family("sd15")
    with pytest.raises(ValueError, match="takes the conditions"):
        follow(GUIDANCES["skip"](one.on("rectified"), one), "rectified", "euler", one.condition)
