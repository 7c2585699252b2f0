"""The catalog of systems: complete, unique, light to import, true about what is built."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from rectiflow.recipes import catalog
from rectiflow.recipes.catalog import SYSTEMS, bibtex, find, recipe_exists, recipe_module

# A name of the design for each system, written out by hand: a lost or renamed row shows here.
NAMES = {
    1: "distill.Reflow", 2: "distill.RectifiedDiffusion", 3: "nets.MMDiT",
    4: "flows.UShaped", 5: "distill.OneStepDistillation", 6: "distill.AnnealingReflow",
    7: "guidance.FlowChef", 8: "flows.solvers.RFSolver", 9: "guidance.APG",
    10: "distill.FDistill", 11: "align.AlignProp", 12: "guidance.Anagram",
    13: "guidance.RelationRectifier", 14: "images.PMRF",
    15: "images.HierarchicalCollaborativeDownscaling", 16: "images.warps.ThinPlateSpline",
    17: "compress.DiffRate", 18: "compress.CurriculumDataSynthesis", 19: "optim.apply_tract",
    20: "optim.DiffGrad", 21: "optim.SGDP", 22: "optim.SophiaG",
    23: "diagnose.directional_sharpness", 24: "optim.NormTest", 25: "diagnose.OpposingSignals",
    26: "optim.PixelwiseClip", 27: "distributed.GradientCode", 28: "distributed.DIFF2",
    29: "compress.ReSTE", 30: "compress.GAQAT", 31: "control.ODICE",
    32: "solvers.conjugate_gradient", 33: "estimators.ConvexReLUClassifier",
    34: "diagnose.AttentionSVM", 35: "estimators.MatrixCompletion",
    36: "estimators.BoostedNetRegressor", 37: "physics.ConstraintLayer", 38: "scenes.OReX",
    39: "scenes.rasterize", 40: "scenes.Direct25", 41: "physics.tactile.TactileScene",
}  # fmt: skip


def test_forty_one_rows_in_order() -> None:
    assert [system.number for system in SYSTEMS] == list(range(1, 42))


@pytest.mark.parametrize("field", ["slug", "title", "arxiv", "summary"])
def test_rows_do_not_share(field: str) -> None:
    assert len({getattr(system, field) for system in SYSTEMS}) == 41


def test_names_of_the_design() -> None:
    assert {s.number: NAMES[s.number] for s in SYSTEMS if NAMES[s.number] in s.names} == NAMES


def test_recipes_belong_to_one_system_each() -> None:
    slugs = [slug for system in SYSTEMS for slug in system.recipes]
    assert len(slugs) == len(set(slugs)) == 44
    assert find("rectified-flow").recipes == (
        "rectified-flow",
        "domain-transfer",
        "few-step-shootout",
    )


def test_rooms_come_from_names() -> None:
    assert find("rf-solver").rooms == ("flows", "images")


def test_built_follows_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"rectified-flow", "few-step-shootout"}
    monkeypatch.setattr(catalog, "recipe_exists", present.__contains__)
    assert not find("rectified-flow").built, "one of its three recipes is absent"
    present.add("domain-transfer")
    assert find("rectified-flow").built
    assert not find("apg").built


def test_recipe_exists_looks_at_modules() -> None:
    assert recipe_exists("catalog")
    assert not recipe_exists("no-such-recipe")
    assert recipe_module("direct2.5") == "rectiflow.recipes.direct2_5"


def test_built_systems_have_their_names() -> None:
    for system in SYSTEMS:
        if system.built:
            for name in system.names:
                module, _, attribute = f"rectiflow.{name}".rpartition(".")
                assert hasattr(importlib.import_module(module), attribute), name
            for slug in system.recipes:
                assert callable(importlib.import_module(recipe_module(slug)).run)


def test_find_suggests() -> None:
    assert find("domain-transfer") is find("rectified-flow") is SYSTEMS[0]
    with pytest.raises(ValueError, match=r"unknown system 'pmfr': did you mean 'pmrf'\?"):
        find("pmfr")


def test_bibtex_states_what_is_known() -> None:
    entry = bibtex(find("slimflow"))
    assert entry.startswith("@misc{arxiv:2407.12718,\n")
    assert entry.endswith("}")
    assert entry.count("{") == entry.count("}")
    assert "year = {2024}" in entry
    assert "archivePrefix = {arXiv}" in entry
    assert "author" not in entry


def test_import_brings_no_torch() -> None:
    code = (
        "import sys; from rectiflow.recipes.catalog import SYSTEMS; [s.built for s in SYSTEMS];"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
