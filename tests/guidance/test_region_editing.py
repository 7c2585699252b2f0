"""Editing by region: what is kept stays, the rest follows the condition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rectiflow.flows import FlowModel, integrate
from rectiflow.flows.guidance import ClassifierFreeGuidance
from rectiflow.guidance import APG, RegionalField, edit_region, latent_mask
from rectiflow.images.degradations import box_mask

IMAGE = (1, 4, 4)
KEEP = box_mask(IMAGE, 2)
LABELS = {"label": torch.tensor([3, 3])}
NULL = {"label": torch.tensor([0])}


class Toward(nn.Module):
    """The velocity that leads to a picture filled with the label."""

    calls = 0

    def forward(self, x, t, *, label):
        self.calls += 1
        return (label[:, None, None, None] - x) / (1 - t).clamp(min=0.05)[:, None, None, None]

    def null_condition(self, *, label):
        return {"label": torch.zeros_like(label)}


def model() -> FlowModel:
    return FlowModel(Toward(), shape=IMAGE)


def reference() -> torch.Tensor:
    return torch.rand(2, *IMAGE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def edited(field=None, **settings):
    field = model() if field is None else field
    generator = torch.Generator().manual_seed(0)
    defaults = {"condition": LABELS, "source": NULL, "steps": 20, "source_steps": 4}
    settings = {**defaults, **settings}
    return edit_region(field, reference(), KEEP, generator=generator, **settings)


def test_guidance_acts_in_the_region_only():
    inner = model()
    field = RegionalField(inner, NULL, KEEP, 2.0)
    x, t = torch.randn(2, *IMAGE), torch.full((2,), 0.3)
    found, inside = field.velocity(x, t, **LABELS), KEEP == 0
    plain = inner.velocity(x, t, **LABELS)
    guided = ClassifierFreeGuidance(inner, 3.0).velocity(x, t, **LABELS)
    assert torch.equal(found[..., ~inside], plain[..., ~inside])
    torch.testing.assert_close(found[..., inside], guided[..., inside])
    torch.testing.assert_close(field.denoise(x, t, **LABELS), x + 0.7 * found)
    torch.testing.assert_close(field.noise(x, t, **LABELS), x - 0.3 * found)


def test_scale_zero_is_the_field_itself_at_one_call():
    inner = model()
    field = RegionalField(inner, NULL, KEEP, 0.0)
    x = torch.randn(2, *IMAGE)
    assert torch.equal(integrate(field, x, 5, **LABELS), integrate(inner, x, 5, **LABELS))
    assert inner.net.calls == 10


class Still(nn.Module):
    """A picture of the label, whatever the state: the velocity depends on the noise alone."""

    def forward(self, x, t, *, label):
        return label[:, None, None, None] + 0 * x


def test_the_rest_stays_and_the_region_changes():
    """With a velocity that is constant, every kept pixel contracts by 0.8 a step."""
    field = FlowModel(Still(), shape=IMAGE)
    found = edited(field, source=None, source_steps=0, steps=50)
    kept = KEEP > 0
    assert (found - reference())[..., kept].abs().max() < 1e-3
    free = edited(field, source=None, source_steps=0, steps=50, step_size=0.0)
    torch.testing.assert_close(found[..., ~kept], free[..., ~kept], rtol=0, atol=0)


def test_source_steps_by_default_are_half_of_few_steps():
    same = [edited(steps=9, source_steps=n) for n in (None, 4)]
    assert torch.equal(*same)
    same = [edited(steps=30, source_steps=n) for n in (None, 10)]
    assert torch.equal(*same)
    assert edited(steps=2, source_steps=None).isfinite().all()


def test_source_steps_pull_the_region_too():
    field = FlowModel(Still(), shape=IMAGE)
    away = [
        float((edited(field, source=None, source_steps=n) - reference())[..., KEEP == 0].norm())
        for n in (0, 5, 18)
    ]
    assert away[0] > away[1] > away[2]


def test_estimate_from_the_source_costs_one_more_call():
    fields = {name: model() for name in ("combined", "source")}
    found = {name: edited(field, estimate=name) for name, field in fields.items()}
    assert fields["combined"].net.calls == 40
    assert fields["source"].net.calls == 40 + 19
    assert not torch.equal(*found.values())


def test_momentum_of_one_condition_is_not_that_of_the_other():
    with pytest.raises(ValueError, match="two calls at one time, so a field that remembers"):
        RegionalField(APG(model(), 2.0), NULL, KEEP, 1.0)
    RegionalField(APG(model(), 2.0, momentum=0.0), NULL, KEEP, 1.0)


def test_generator_decides():
    assert torch.equal(edited(), edited())


def test_cells_of_latents_are_kept_only_as_a_whole():
    keep = torch.ones(4, 6)
    keep[1, 2] = 0
    assert latent_mask(keep, (2, 3)).tolist() == [[1, 0, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match="the mask is 4x6, which is no multiple"):
        latent_mask(keep, (3, 3))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"keep": torch.zeros(4, 4)}, "keeps nothing"),
        ({"keep": torch.ones(4, 4)}, "keeps everything"),
        ({"keep": torch.ones(3, 3)}, r"the mask has shape \(3, 3\)"),
        ({"estimate": "edit"}, "unknown estimate"),
        ({"estimate": "source", "source": None}, "needs source="),
        ({"scale": -1.0, "source": NULL}, "scale must be >= 0"),
        ({"noise": torch.zeros(2, 1, 8, 8)}, "bring it to the model's size"),
        (
            {"steps": 10, "source_steps": 9},
            "source_steps must be below 9, the number of steps that end before time 1",
        ),
        ({"steps": [0.0, 0.5, 1.0], "source_steps": 1}, "got 1: the mask would never be used"),
    ],
)
def test_bad_input(settings, said):
    keep = settings.pop("keep", KEEP)
    with pytest.raises(ValueError, match=said):
        edit_region(model(), reference(), keep, condition=LABELS, **settings)
