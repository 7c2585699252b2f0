"""Inversion and RF-Edit: limits, the pairing of steps, guidance, round trips, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.images.test_feature_bank import case, ours

from rectiflow.flows import ClassifierFreeGuidance, FlowModel, GaussianField, integrate
from rectiflow.images import Edit, FeatureBank, RFEdit, invert, round_trip

IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
SOURCE, TARGET = {"label": torch.tensor([0, 1])}, {"label": torch.tensor([2, 3])}


class TwoCalls(ClassifierFreeGuidance):
    """Guidance by one call for each half, the null one first."""

    def _guide(self, view: str, x: Any, t: Any, condition: dict[str, Any]) -> Any:
        null = self.field.null_condition(**condition)
        without = getattr(self.field, view)(x, t, **{**condition, **null})
        given = getattr(self.field, view)(x, t, **condition)
        return torch.lerp(without, given, self.scale)


def test_inversion_standardises_gaussian_data() -> None:
    mean, std = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    images = mean + std * torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    noise = invert(GaussianField(mean, std), images, steps=200, batch_size=3)
    # Second order: (1/200)² times derivatives of about 10.
    torch.testing.assert_close(noise, (images - mean) / std, rtol=0, atol=1e-3)


def test_round_trip_errors_fall_with_the_cube() -> None:
    field = GaussianField(torch.tensor([0.7]).double(), torch.tensor([2.5]).double())
    x = torch.linspace(-4, 4, 9, dtype=torch.float64).unsqueeze(1)

    def slope(solver: str) -> float:
        errors = [
            float(round_trip(field, x, steps=n, solver=solver).error.max()) for n in (50, 100)
        ]
        return math.log2(errors[0] / errors[1])

    # Heun's: the midpoint rule happens to gain one more order on this field.
    assert slope("heun") == pytest.approx(3, abs=0.3)
    assert slope("euler") == pytest.approx(1, abs=0.2)
    assert slope("rf-solver") > 2.7


def test_round_trip_says_how_far_each_image_lands() -> None:
    model = ours()
    found = round_trip(model, IMAGES, steps=3, **SOURCE)
    assert torch.equal(found.noise, invert(model, IMAGES, steps=3, **SOURCE))
    wanted = (found.images - IMAGES).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(found.error, wanted)


@torch.no_grad()
@pytest.mark.parametrize("solver", ["rf-solver", "rf-solver:0.667", "implicit-midpoint:2"])
def test_invariant_8_no_injection_is_no_editing(solver: str) -> None:
    model = ours()
    edit = RFEdit(model, steps=4, inject=0, guidance=3.0, solver=solver)
    found = edit(IMAGES, source=SOURCE, target=TARGET)
    noise = invert(model, IMAGES, steps=4, solver=solver, **SOURCE)
    assert torch.equal(found.noise, noise)
    assert torch.equal(
        found.images, integrate(ClassifierFreeGuidance(model, 3.0), noise, 4, solver, **TARGET)
    )
    assert found.bytes == 0


@torch.no_grad()
def by_hand(model: FlowModel, inject: int) -> tuple[torch.Tensor, FeatureBank]:
    """RF-Edit without guidance, written as the two loops of midpoint steps that it is."""
    bank, h = FeatureBank(model), 0.25

    def said(x: torch.Tensor, t: float, stage: int, condition: dict[str, Any]) -> torch.Tensor:
        bank.stage = stage
        return model.velocity(x, torch.full((2,), t), **condition)

    x = IMAGES
    with bank.attached():
        for k in range(4):
            bank.step, t = 3 - k, 1 - k * h
            bank.mode = "record" if bank.step < inject else "off"
            middle = x - h / 2 * said(x, t, 0, SOURCE)
            x = x - h * said(middle, t - h / 2, 1, SOURCE)
        for k in range(4):
            bank.step, t = k, k * h
            bank.mode = "replay" if bank.step < inject else "off"
            middle = x + h / 2 * said(x, t, 0, TARGET)
            x = x + h * said(middle, t + h / 2, 1, TARGET)
    return x, bank


@pytest.mark.parametrize("inject", [1, 2, 4])
def test_steps_are_paired_from_the_noisy_end(inject: int) -> None:
    model = ours()
    found = RFEdit(model, steps=4, inject=inject, guidance=1.0)(
        IMAGES, source=SOURCE, target=TARGET
    )
    expected, bank = by_hand(model, inject)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-6)
    assert found.bytes == bank.bytes > 0
    plain = RFEdit(model, steps=4, inject=0, guidance=1.0)(IMAGES, source=SOURCE, target=TARGET)
    assert (found.images - plain.images).abs().max() > 1e-3


def test_guidance_injects_into_the_conditional_half_however_it_calls() -> None:
    # In double precision, where the order of sums in another batch is worth 1e-13.
    model, nulls = ours().double(), []
    said = model.net.forward

    def watch(x: Any, t: Any, **condition: Any) -> Any:
        found = said(x, t, **condition)
        null = condition["label"] == 4
        if null.any():
            plain = unhooked.net(x[null], t[null], label=condition["label"][null])
            nulls.append(float((found[null] - plain).abs().max()))
        return found

    unhooked = ours().double()
    unhooked.load_state_dict(model.state_dict())
    model.net.forward = watch
    results = []
    for guide in (ClassifierFreeGuidance, TwoCalls):
        edit = RFEdit(model, steps=3, inject=2, guidance=2.5, guide=guide)
        results.append(edit(IMAGES.double(), source=SOURCE, target=TARGET).images)
    # The null rows never saw a stored value. Called twice, the inversion at scale 1 asks for
    # them too.
    assert len(nulls) == 3 * (2 * 3)
    assert max(nulls) < 1e-10
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_several_targets_for_each_source() -> None:
    edit = RFEdit(ours(), steps=3, inject=2)
    many = edit(IMAGES, source=SOURCE, target={"label": torch.tensor([2, 3, 0, 1])}).images
    first = edit(IMAGES, source=SOURCE, target={"label": torch.tensor([2, 0])}).images
    torch.testing.assert_close(many[::2], first, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="whole number of rows for each of the 2 images, got 3"):
        edit(IMAGES, source=SOURCE, target={"label": torch.tensor([2, 3, 0])})


@pytest.mark.parametrize("name", ["dual", "sd3", "flux"])
def test_edits_of_every_family(name: str) -> None:
    model, images, source, target = case(name)
    seen: list[int] = []
    edit = RFEdit(model, steps=3, inject=2, where="cpu")
    found = edit(images, source=source, target=target, progress=seen.append)
    assert isinstance(found, Edit)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert found.images.shape == images.shape
    assert found.images.isfinite().all()
    plain = replace(edit, inject=0)(images, source=source, target=target)
    # Other values enter the edit and none the inversion.
    assert torch.equal(found.noise, plain.noise)
    assert (found.images - plain.images).abs().max() > 1e-4
    assert found.bytes > 0


def test_flux_takes_guidance_as_its_input() -> None:
    model, images, source, target = case("flux")
    asked: list[tuple[int, float]] = []
    hook = model.net.module.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(
            (len(kwargs["hidden_states"]), float(kwargs["guidance"][0]))
        ),
        with_kwargs=True,
    )
    RFEdit(model, steps=2, inject=1, guidance=3.5)(images, source=source, target=target)
    hook.remove()
    # Guidance 1 on the way to noise and 3.5 back, and never a second half.
    assert asked == [(2, 1.0)] * 4 + [(2, 3.5)] * 4


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"guidance": -1.0}, "guidance must be >= 0, got -1.0"),
        ({"guidance": math.nan}, "guidance must be >= 0, got nan"),
        ({"invert_guidance": math.inf}, "invert_guidance must be finite"),
        ({"inject": 16}, "inject must be from 0 to the 15 steps, got 16"),
        ({"inject": -1}, "inject must be from 0"),
        ({"solver": "dopri5"}, "same evaluations in both directions"),
        ({"solver": "rf-solver:2"}, r"theta must be in \(0, 1\]"),
        ({"steps": [1.0, 0.5, 0.7]}, "times must be"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RFEdit(ours(), **wrong)
