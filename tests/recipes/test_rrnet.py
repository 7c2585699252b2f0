"""The relation recipe: its scenes, its judge, its rules, and the quick preset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rectiflow.recipes.recipe import load_recipe, run_recipe
from rectiflow.recipes.relation_lab import ARMS, FULL, SYMMETRIC, Fitted, Found, Lab
from rectiflow.recipes.relation_scenes import (
    KEY,
    NAMES,
    SHAPE,
    Language,
    as_told,
    examples,
    in_order,
    matches,
    one_square,
    scenes,
    two_squares,
)
from rectiflow.recipes.rrnet import PRESETS, _checks
from rectiflow.training.runs import Run


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fitted(
    best: tuple[float, float] = (0.95, 0.9),
    frozen: tuple[float, float] = (0.45, 0.53),
    cosine: float = 0.2,
) -> Fitted:
    accuracy = {0.0: frozen, 0.4: (0.6, 0.6), 0.8: best, 1.0: best}
    return Fitted(accuracy, 0.8, best, frozen, (1,) * 4, (9,) * 4, best, cosine, torch.zeros(1))


def states(rectifier: Fitted, symmetric: Fitted | None = None) -> list[str]:
    same = symmetric or fitted(best=(0.4, 0.55))
    arms = {arm: [fitted(), rectifier] for arm in ARMS} | {SYMMETRIC: [same, same]}
    return [check.state for check in _checks([Found([(1.0, 1.0)] * 2, arms)] * 3)]


def test_the_judge_reads_scenes_and_not_their_rows() -> None:
    left = torch.randint(4, (200,), generator=generator())
    right = (left + torch.randint(1, 4, (200,), generator=generator(1))) % 4
    pictures = two_squares(left, right, generator())
    noisy = pictures + 0.3 * torch.randn(pictures.shape, generator=generator(2))
    assert torch.equal(matches(noisy).argmax(2), torch.stack([left, right], 1))
    assert pictures.shape == (200, *SHAPE)
    # Four pixels of each square, the rest black.
    assert ((pictures > -1).any(1).flatten(1).sum(1) == 8).all()
    there, exchanged = (NAMES[left[0]], NAMES[right[0]]), (NAMES[right[0]], NAMES[left[0]])
    for judge in (in_order, as_told):
        assert judge(pictures[:1], there) == judge(pictures[:1] / 2 - 0.5, there) == 1
        assert judge(pictures[:1], exchanged) == 0
    # The order is a choice between two even where other colours are seen.
    absent = [name for name in NAMES if name not in there]
    mixed = [in_order(noisy, pair) for pair in (there, exchanged)]
    assert mixed[0] + mixed[1] == pytest.approx(1, abs=1e-6)
    assert as_told(pictures[:1], absent) == 0
    alone = one_square(left, generator())
    assert ((alone > -1).any(1).flatten(1).sum(1) == 4).all()


def test_a_sentence_forgets_the_order_that_the_oracle_says() -> None:
    language = Language.of(32, 3.0, seed=0)
    prompts = language.prompts(("blue", "green"))
    ends = prompts.end_vectors()
    assert torch.equal(ends[0], ends[1])
    told = language.told(("blue", "green"))
    torch.testing.assert_close(told.mean(0), ends[0])
    assert (told[1] - told[0]).norm() == pytest.approx(6.0, rel=1e-5)
    # The sign is that of the colours, whichever way the pair is written.
    torch.testing.assert_close(language.told(("green", "blue")), told.flip(0))


def test_the_flow_is_told_the_order_of_some_of_its_pictures() -> None:
    language = Language.of(32, 3.0, seed=0)
    data = scenes(language, 1000, single=0.2, told=0.7)
    pictures, texts = data.values, data.conditions[KEY]
    counts = (pictures > -1).any(1).flatten(1).sum(1)
    assert (counts == 4).sum() == 200
    both = counts == 8
    seen = matches(pictures[both]).argmax(2)
    silent = language.pairs(*seen.T, torch.zeros(len(seen)))
    said = (texts[both] - silent) @ language.order / 9
    wanted = torch.where(seen[:, 0] < seen[:, 1], 1.0, -1.0)
    spoken = said.abs() > 0.5
    torch.testing.assert_close(said[spoken], wanted[spoken], rtol=0, atol=1e-4)
    assert spoken.float().mean() == pytest.approx(0.7, abs=0.06)


def test_examples_show_what_their_prompts_say() -> None:
    found = examples(Language.of(32, 3.0, seed=0), ("red", "blue"), 5, seed=1)
    assert as_told(found.pictures["ARB"], ("red", "blue")) == 1
    assert as_told(found.pictures["BRA"], ("blue", "red")) == 1
    assert {name: len(pictures) for name, pictures in found.pictures.items()} == dict.fromkeys(
        ("ARB", "BRA", "A", "B"), 5
    )


def test_checks_are_the_specifications_rules() -> None:
    assert states(fitted()) == ["pass"] * 5
    assert states(fitted(frozen=(0.6, 0.6)))[0] == "fail"
    assert states(fitted(best=(0.8, 0.7)))[1] == "weak"
    assert states(fitted(best=(0.7, 0.5)))[1] == "fail"
    # Only one direction improves.
    assert states(fitted(best=(1.0, 0.4)))[2] == "fail"
    assert states(fitted(best=(1.0, 0.55)))[2] == "fail"
    assert states(fitted(cosine=1.0))[3] == "fail"
    assert states(fitted(), fitted(best=(0.9, 0.8)))[4] == "fail"


def test_a_flow_that_cannot_obey_is_refused() -> None:
    lab = Lab(replace(PRESETS["quick"], least_oracle=0.9), seed=100)
    with pytest.raises(ValueError, match=r"the flow obeys in .*% of its pictures where 90% are"):
        lab.oracle()


def test_prompts_are_judged_on_noises_of_their_own() -> None:
    lab = Lab(PRESETS["quick"], seed=0)
    texts = lab.language.prompts(("red", "green")).end_vectors()[:2]
    assert torch.equal(texts[0], texts[1])
    one, other = lab._images(texts, lab.flow, seed=0).chunk(2)
    assert not torch.allclose(one, other)


def test_quick_preset_writes_its_evidence(tmp_path: Path) -> None:
    with Run(tmp_path / "run", "run rrnet") as run:
        result = run_recipe(load_recipe("rrnet"), PRESETS["quick"], run, preset="quick")
    found = json.loads((tmp_path / "run/result.json").read_text())
    assert found["verdict"] == result.verdict
    arms = {number["arm"] for number in found["numbers"]}
    assert {"oracle", "frozen model", *ARMS, f"{FULL}, weight 0.4"} <= arms
    assert json.loads((tmp_path / "run/run.json").read_text())["systems"] == ["rrnet"]
    for name in ("accuracy.png", "pictures.png", "report.html"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    # Without a direction both prompts have one shift.
    (number,) = (
        n
        for n in result.numbers
        if n.arm == SYMMETRIC and n.quantity == "cosine of both ends, best weight"
    )
    assert number.values == pytest.approx((1.0,), abs=1e-5)
