from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.recipes.quick import run_quick

from rectiflow.recipes import classifier_lab
from rectiflow.recipes.classifier_lab import Trained, standardised
from rectiflow.recipes.pixel_regression import regress
from rectiflow.recipes.tract import PLAIN, PRESETS, Settings, _checks
from rectiflow.training.data import load as load_data


def trained(*accuracies: float) -> list[Trained]:
    return [Trained(accuracy, (1.0,)) for accuracy in accuracies]


def test_two_standard_errors_decide() -> None:
    regression = regress(20, 500, 60)
    plain = trained(0.70, 0.72, 0.71)
    # Gains of 2, 1 and 3 points: a mean of 2, a standard error of 0.577.
    sure = {PLAIN: plain, "TrAct, λ = 0.1": trained(0.72, 0.73, 0.74)}
    check = _checks(sure, regression)[0]
    assert check.values == pytest.approx((0.02 - 2 * 0.01 / 3**0.5,))
    assert check.state == "pass"
    # A layer that changes nothing.
    assert _checks({PLAIN: plain, "TrAct, λ = 0.1": plain}, regression)[0].state == "fail"
    unsure = {PLAIN: plain, "TrAct, λ = 0.1": trained(0.71, 0.69, 0.76)}
    assert _checks(unsure, regression)[0].state == "fail"


def test_regression_shows_what_the_rule_does() -> None:
    found = regress(20, 500, 60)
    assert found.plain > 1e4
    assert found.rectified == pytest.approx(found.expected, rel=1e-6)
    assert found.rectified < 1.2
    assert found.losses["TrAct, rate 1"][-1] < 1e-12
    assert found.losses["plain, rate 1"][-1] == 1e12
    assert 1e-3 < found.losses["plain, best rate"][-1] < 1
    arms = {PLAIN: trained(0.7), "TrAct, λ = 0.1": trained(0.8)}
    assert [check.state for check in _checks(arms, found)] == ["pass"] * 4


def test_presets_are_those_of_the_specification() -> None:
    settings = PRESETS["default"]
    assert (settings.train, settings.test, settings.epochs, settings.batch_size) == (
        10_000, 4_000, 2, 128,
    )  # fmt: skip
    assert (settings.pixels, settings.rows, settings.regression_steps) == (20, 500, 60)
    assert settings.lams == (0.05, 0.1, 0.2)
    assert (settings.cnn_rates, settings.vit_rates) == ((0.03, 0.1), (1e-3, 3e-3))
    assert len(settings.seeds) >= 5
    assert min(settings.tuning_seeds) >= 100


def test_digits_stand_in_for_absent_garments(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: str, **options: Any) -> Any:
        if spec == "fashion-mnist":
            raise FileNotFoundError(spec)
        return load_data(spec, **options)

    monkeypatch.setattr(classifier_lab, "load", load)
    images = standardised("fashion-mnist", train=640, test=201)
    assert images.name == "digits"
    assert images.inputs.shape == (640, 1, 8, 8)
    assert float(images.inputs.std()) == pytest.approx(1, abs=1e-3)


def test_data_that_were_named_have_no_stand_in(tmp_path: Path) -> None:
    for spec in ("folder:/no/such/folder", f"fashion-mnist:{tmp_path}"):
        with pytest.raises(FileNotFoundError):
            standardised(spec, train=10, test=10)


def test_rates_are_chosen_on_training_images_alone() -> None:
    images = standardised("digits", train=100, test=50)
    tuning = images.tuning()
    assert torch.equal(torch.cat([tuning.inputs, tuning.test_inputs]), images.inputs)
    assert torch.equal(torch.cat([tuning.labels, tuning.test_labels]), images.labels)
    assert (len(tuning.inputs), len(tuning.test_inputs)) == (80, 20)


def test_the_judged_damping_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"lams must hold 0\.1"):
        Settings(lams=(0.05, 0.2))


def test_quick_preset_leaves_result_and_report(tmp_path: Path) -> None:
    run = run_quick("tract", tmp_path)
    assert {PLAIN, "TrAct, λ = 0.1"} <= run.arms
    assert len(run.table["checks"]) == 4
    accuracies = {
        arm: v for (q, arm), v in run.values.items() if q == "CNN, SGD: test accuracy, per cent"
    }
    assert len(set(map(tuple, accuracies.values()))) == 2, "the first layer made no difference"
    assert run.pictures == 3
