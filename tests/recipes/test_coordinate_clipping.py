from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes import opposing_signals
from rectiflow.recipes.character_lab import (
    ADAM,
    ADAM_CLIPPED,
    SGD,
    SGD_CLIPPED,
    SPLIT,
    Look,
    NetSettings,
    RaceSettings,
    Tuned,
    lost,
    optimizer,
    race,
    train,
)
from rectiflow.recipes.characters import CharacterModel, Characters, standard_library
from rectiflow.recipes.coordinate_clipping import Settings, _checks, _numbers
from rectiflow.recipes.tools import shifted_mean, standard_errors

LOOK = Look(
    {SGD: 1.0, SGD_CLIPPED: 0.4, ADAM: 0.2},
    {},
    {SGD: 0.002, SGD_CLIPPED: 0.003, ADAM: 0.003},
    0.9,
)
LOSSES = {
    SGD: (2.37, 2.38), SGD_CLIPPED: (2.31, 2.30), ADAM: (2.23, 2.23), ADAM_CLIPPED: (2.3, 2.3),
}  # fmt: skip


def states(second: Look = LOOK, **losses: tuple[float, ...]) -> list[str]:
    looks = {ADAM: [{20: LOOK, 100: second}], SGD: [{20: LOOK}]}
    found = {**LOSSES, **losses}
    tuned = {name: Tuned(1.0, {1.0: 2.0}, values) for name, values in found.items()}
    return [check.state for check in _checks(looks, tuned)]


def test_checks_follow_the_rules_of_the_specification() -> None:
    assert set(states()) == {"pass"}
    sharp = LOOK.sharpness
    assert states(replace(LOOK, sharpness={**sharp, SGD_CLIPPED: 1.1}))[0] == "fail"
    assert states(replace(LOOK, sharpness={**sharp, ADAM: 0.5}))[1] == "weak"
    assert states(replace(LOOK, sharpness={**sharp, ADAM: 1.1}))[1] == "fail"
    assert states(replace(LOOK, decrease={**LOOK.decrease, SGD_CLIPPED: 1e-3}))[2] == "fail"
    assert states(**{SGD_CLIPPED: (2.36, 2.385)})[3] == "weak"
    assert states(**{SGD_CLIPPED: (2.39, 2.39)})[3] == "fail"
    assert states(**{SGD_CLIPPED: (math.inf, math.inf)})[3] == "fail"
    assert states(**{SGD: (math.inf, 2.38)})[3] == "fail"
    # Clipping that changes nothing.
    same = replace(LOOK, sharpness={**sharp, SGD_CLIPPED: sharp[SGD]})
    assert states(same)[0] == "fail"
    same = replace(LOOK, decrease={**LOOK.decrease, SGD_CLIPPED: LOOK.decrease[SGD]})
    assert states(same)[2] == "fail"
    assert states(replace(LOOK, sharpness={**sharp, SGD_CLIPPED: math.nan}))[0] == "fail"


def test_standard_errors() -> None:
    # Differences of 1, 2 and 3, seed by seed.
    assert standard_errors([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(2 * math.sqrt(3))
    assert math.isnan(standard_errors([3.0], [2.0]))
    assert standard_errors([1.0, 1.0], [2.0, 2.0]) == -math.inf
    assert standard_errors([1.0, 1.0], [2.0, math.inf]) == -math.inf
    assert math.isnan(standard_errors([1.0, math.inf], [2.0, 2.0]))
    assert math.isnan(standard_errors([1.0, math.inf], [math.inf, 2.0]))
    assert math.isnan(shifted_mean([1.0, math.inf], -2))


def test_arms_that_diverged_are_told() -> None:
    fine, bad = (Tuned(1.0, {1.0: 2.0}, (2.0, last)) for last in (2.0, math.inf))
    assert lost({SGD: fine}) == []
    assert "SGD (1)." in lost({SGD: bad, ADAM: fine})[0]
    assert [n.values for n in _numbers({}, {SGD: bad})] == [(2.0, math.inf)]


def test_best_rates_at_the_edge_are_told() -> None:
    tuned = Tuned(3.0, {1.0: 2.0, 3.0: 1.0, 9.0: math.inf}, (1.0,))
    assert str(tuned) == "1, 3, 9 (best 3)"
    assert str(replace(tuned, rate=9.0)) == "1, 3, 9 (best 9, at the edge)"
    assert str(replace(tuned, rate=1.0, tried={1.0: 2.0})) == "1 (best 1)"


def test_a_race_takes_the_best_rate_of_its_own_seed() -> None:
    net = NetSettings(8, 1, 2, 8, 4)
    settings = RaceSettings({ADAM: (1e9, 3e-3), SGD: (1.0,)}, 20_000, net, 3)
    found = race(settings, (0, 1))
    assert list(found) == [ADAM, SGD]
    assert found[ADAM].rate == 3e-3
    text = standard_library(20_000)
    for rate, loss in found[ADAM].tried.items():
        assert loss == train(text, net, ADAM, rate, steps=3, seed=100)
    assert found[SGD].losses == tuple(
        train(text, net, SGD, 1.0, steps=3, seed=seed) for seed in (0, 1)
    )


def test_text_is_the_standard_library_in_ascii() -> None:
    text = standard_library(20_000)
    assert len(text.codes) == 20_000
    assert text.alphabet.isascii()
    written = "".join(text.alphabet[code] for code in text.codes[:4000])
    assert "import" in written
    assert standard_library(20_000) is text


def test_windows_keep_apart_what_is_held_out() -> None:
    text = Characters(torch.arange(100), "")
    generator = torch.Generator().manual_seed(0)
    seen = text.windows(200, 5, generator=generator)
    assert seen.shape == (200, 6)
    assert torch.equal(seen.diff(dim=1), torch.ones(200, 5, dtype=torch.long))
    assert (int(seen.min()), int(seen.max())) == (0, 89)
    held_out = text.windows(200, 5, held_out=True, generator=generator)
    assert (int(held_out.min()), int(held_out.max())) == (90, 99)
    with pytest.raises(ValueError, match="longer text, got 10 in its held-out part"):
        text.windows(1, 10, held_out=True)


def test_the_model_sees_no_later_character() -> None:
    model = CharacterModel(9, length=6, width=8, depth=2, heads=2)
    codes = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(0))
    changed = codes.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 9
    one, other = model(codes), model(changed)
    assert torch.equal(one[:, :4], other[:, :4])
    assert not torch.allclose(one[:, 4:], other[:, 4:])
    # At first all characters are about as likely: the loss is about log 9.
    loss = model.loss(torch.cat([codes, codes[:, :1]], 1))
    assert float(loss.detach()) == pytest.approx(math.log(9), abs=0.1)
    with pytest.raises(ValueError, match="multiple of heads"):
        CharacterModel(9, length=6, width=9, depth=1, heads=2)


def test_default_network_has_the_size_that_is_claimed() -> None:
    model = NetSettings().build(Characters(torch.zeros(1), "x" * 96), seed=0)
    assert sum(p.numel() for p in model.parameters()) == 68_160


def test_every_arm_learns() -> None:
    text, net = standard_library(20_000), NetSettings(8, 1, 2, 8, 8)
    rates = {SGD: 3.0, SGD_CLIPPED: 15.0, SPLIT: 2.0, ADAM: 1e-2, ADAM_CLIPPED: 3e-2}
    for name, rate in rates.items():
        before, after = (train(text, net, name, rate, steps=n, seed=0) for n in (1, 60))
        assert after < before - 0.2, name
    weight = torch.nn.Parameter(torch.ones(20))
    clipped = optimizer(SGD_CLIPPED, [weight], 1.0)
    weight.grad = torch.arange(20.0)
    clipped.step()
    assert float(weight.detach().min()) == 1 - 17


def test_settings_follow_the_specification() -> None:
    default = Settings()
    assert default.looks == (20, 100, 300)
    assert default.real == {ADAM: 2e-3, SGD: 0.3}
    for given in (default.race, opposing_signals.Settings().race):
        assert {len(grid) for grid in given.grids.values()} == {4}
        assert given.steps == 600
    assert max(default.race.grids[ADAM_CLIPPED]) == 0.3


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    found = run_quick("coordinate-clipping", tmp_path)
    assert len(found.table["checks"]) == 4
    assert {SGD, SGD_CLIPPED, ADAM, ADAM_CLIPPED, "sign", "gradient"} <= found.arms
    assert found.pictures == 3
    assert any("best" in note for note in found.table["notes"])
