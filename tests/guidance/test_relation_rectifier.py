"""A field with shifted prompts: what it shifts, what it must not touch, what it goes with."""

from __future__ import annotations

import pytest
import torch
from tests.guidance.relations import ENDS, WIDTH, model, prompts, rectifier

from rectiflow.flows import Field, integrate
from rectiflow.guidance import APG, ClassifierFreeGuidance, RelationRectifier, RelationShifts


def shifts(seed: int = 1) -> RelationShifts:
    with torch.no_grad():
        return rectifier(seed).shifts(prompts())


def start(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(5))


def follow(field, condition) -> torch.Tensor:
    with torch.no_grad():
        return integrate(field, start(), 4, "heun", **condition)


def test_each_row_gets_the_shift_of_its_prompt_at_its_end() -> None:
    base, given = model(), shifts()
    condition = prompts().rows(torch.tensor([0, 1, 2, 3]))
    before = condition["context"].clone()
    RelationRectifier(base, given, 0.4).velocity(start(), torch.zeros(4), **condition)
    seen = base.net.seen[-1]["context"]
    assert torch.equal(condition["context"], before)
    moved = torch.zeros_like(before)
    moved[torch.arange(4), ENDS, :WIDTH] = 0.4 * given.deltas
    torch.testing.assert_close(seen, before + moved)
    untouched = moved == 0
    assert torch.equal(seen[untouched], before[untouched])


def test_weight_zero_and_no_relation_are_the_field_inside_bit_for_bit() -> None:
    base, condition = model(), prompts().rows(torch.tensor([0, 1, 0, 1]))
    plain = {"context": condition["context"]}
    wanted = follow(base, plain)
    assert torch.equal(follow(RelationRectifier(base, shifts(), 0.0), condition), wanted)
    assert torch.equal(follow(RelationRectifier(base, shifts()), plain), wanted)
    none = {**condition, "relation": torch.full((4,), 4)}
    assert torch.equal(follow(RelationRectifier(base, shifts()), none), wanted)
    assert not torch.allclose(follow(RelationRectifier(base, shifts()), condition), wanted)
    guided = ClassifierFreeGuidance(RelationRectifier(base, shifts(), 0.0), 3.0)
    assert torch.equal(follow(guided, condition), follow(ClassifierFreeGuidance(base, 3.0), plain))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("negative", [False, True])
def test_guidance_never_shifts_what_it_guides_away_from(batched: bool, negative: bool) -> None:
    base, condition = model(), prompts().rows(torch.tensor([0, 1, 2, 3]))
    away = {"context": torch.ones(4, 8)} if negative else None
    field = ClassifierFreeGuidance(
        RelationRectifier(base, shifts()), 3.0, negative=away, batched=batched
    )
    base.net.seen.clear()
    field.velocity(start(), torch.zeros(4), **condition)
    contexts = torch.cat([one["context"] for one in base.net.seen])
    assert len(contexts) == 8
    assert not torch.equal(contexts[:4], condition["context"])
    assert torch.equal(contexts[4:], torch.full_like(contexts[4:], float(negative)))


def test_guidance_of_shifted_prompts_is_guidance_with_shifted_prompts() -> None:
    base, given = model(), shifts()
    condition = prompts().rows(torch.tensor([0, 1, 0, 1]))
    moved = given.added(condition["context"], condition["relation"], 0.6)
    for guide in (
        lambda field: ClassifierFreeGuidance(field, 3.0),
        lambda field: APG(field, 3.0, norm=1.0),
    ):
        wanted = follow(guide(base), {"context": moved})
        inside = follow(guide(RelationRectifier(base, given, 0.6)), condition)
        torch.testing.assert_close(inside, wanted)
        around = follow(RelationRectifier(guide(base), given, 0.6), condition)
        torch.testing.assert_close(around, wanted)


def test_every_view_is_shifted() -> None:
    base, condition = model(), prompts().rows(torch.tensor([0, 1, 2, 3]))
    field = RelationRectifier(base, shifts())
    assert isinstance(field, Field)
    moved = {"context": shifts().added(condition["context"], condition["relation"])}
    for view in ("velocity", "denoise", "noise"):
        wanted = getattr(base, view)(start(), torch.full((4,), 0.5), **moved)
        found = getattr(field, view)(start(), torch.full((4,), 0.5), **condition)
        assert torch.equal(found, wanted)
    assert field.null_condition(**condition)["relation"].tolist() == [4] * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"relation": torch.tensor([0, 1, 2, 5])}, r"from 0 to 3 \(4 for none\), got 0 to 5"),
        ({"relation": torch.tensor([0, 1])}, "one row for each of the 4 samples"),
        ({"relation": torch.zeros(4)}, "must be one int64 number a sample, got torch.float32"),
        ({"context": torch.zeros(4, 8)}, "not what the shifts were made for"),
        ({"context": None}, "relation needs the condition 'context' to shift, got none"),
    ],
)
def test_what_cannot_be_shifted_is_refused(change, message) -> None:
    condition = {**prompts().rows(torch.tensor([0, 1, 2, 3])), **change}
    condition = {name: value for name, value in condition.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        integrate(RelationRectifier(model(), shifts()), start(), 2, **condition)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_wrong_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be"):
        RelationRectifier(model(), shifts(), weight)
