"""The method that fits a relation: which graph feeds which prompt, what learns, how it resumes."""

from __future__ import annotations

import shutil

import pytest
import torch
from tests.guidance.relations import ENDS, WIDTH, examples, model, rectifier

from rectiflow.align import EarlyStop
from rectiflow.flows import Uniform
from rectiflow.flows.couplings import Draw
from rectiflow.guidance import (
    PairContrastiveDenoising,
    RelationExamples,
    RelationFitting,
    fit_relation,
)
from rectiflow.guidance.relation_fitting import PAIRINGS
from rectiflow.guidance.relation_prompts import PROMPTS
from rectiflow.training import OptimizerSettings, TrainerSettings


def method(**options) -> RelationFitting:
    return RelationFitting(model(), rectifier(), examples(), **options)


def settings(steps: int = 10, **options) -> TrainerSettings:
    optim = OptimizerSettings("adamw", 1e-2)
    return TrainerSettings(steps=steps, batch_size=4, ema=0.0, optim=optim, **options)


def test_five_pairings_in_the_papers_order_with_the_graph_that_begins_with_the_object() -> None:
    """The table of the specification, prompt by prompt."""
    table = (("ARB", "BRA"), ("ARB", "A"), ("ARB", "B"), ("BRA", "B"), ("BRA", "A"))
    assert table == PAIRINGS
    fitting, given = method(jitter=0.0), examples()
    forward, backward = (rectifier()(nodes) for nodes in given.prompts.nodes())
    shift = {"ARB": forward[1], "BRA": backward[1], "A": forward[0], "B": backward[0]}
    for step, pair in enumerate(table * 2):
        fitting.frozen.net.seen.clear()
        fitting.losses(Draw.of(4, step=step))
        seen = fitting.frozen.net.seen[0]
        own, other = seen["context"].unflatten(0, (2, 4, 2))
        assert torch.equal(own, other)
        for half, name in enumerate(pair):
            row = PROMPTS.index(name)
            wanted = given.prompts.condition["context"][row].clone()
            wanted[ENDS[row], :WIDTH] += shift[name]
            torch.testing.assert_close(own[:, half], wanted.expand(4, -1, -1))


def test_objects_alone_are_jittered_and_sentences_are_not() -> None:
    still, shaken = method(jitter=0.0), method(jitter=0.5)
    for step, pair in enumerate(PAIRINGS):
        seen = []
        for fitting in (still, shaken):
            fitting.losses(Draw.of(64, step=step))
            seen.append(fitting.frozen.net.seen[-1]["context"][:128].unflatten(0, (64, 2)))
        difference = seen[1] - seen[0]
        for half, name in enumerate(pair):
            found = difference[:, half, ENDS[PROMPTS.index(name)], :WIDTH].detach()
            if name in ("A", "B"):
                assert float(found.std()) == pytest.approx(0.5, rel=0.15)
            else:
                assert not found.any()


def test_pictures_are_drawn_once_for_five_steps_and_are_of_their_prompt() -> None:
    fitting = method(times=Uniform(1 - 1e-6, 1.0), loss=PairContrastiveDenoising(1.0, 0.0))
    shown: dict[tuple[int, str], torch.Tensor] = {}
    for step in range(10):
        # As the trainer counts them.
        fitting.losses(Draw.of(6, step=step, before=6 * step))
        # At the end of time states are pictures.
        states = fitting.frozen.net.seen[-1]["x"].unflatten(0, (6, 2))
        for half, name in enumerate(PAIRINGS[step % 5]):
            found = states[:, half].detach()
            kept = shown.setdefault((step // 5, name), found)
            torch.testing.assert_close(found, kept, rtol=0, atol=1e-4)
            pictures = examples().pictures[name]
            assert torch.cdist(found, pictures).amin(1).max() < 1e-4
    assert not torch.allclose(shown[0, "ARB"], shown[1, "ARB"], atol=1e-2)


def test_noises_differ_between_steps_and_halves_and_follow_the_seed() -> None:
    fitting = method(times=Uniform(0.0, 1e-6), loss=PairContrastiveDenoising(1.0, 0.0))
    drawn = []
    for step, seed in ((0, 0), (0, 0), (1, 0), (0, 1)):
        fitting.losses(Draw.of(4, step=step, seed=seed))
        drawn.append(fitting.frozen.net.seen[-1]["x"].unflatten(0, (4, 2)))
    first, again, later, other = drawn
    assert torch.equal(first, again)
    assert not torch.allclose(first, later, atol=0.1)
    assert not torch.allclose(first, other, atol=0.1)
    assert not torch.allclose(first[:, 0], first[:, 1], atol=0.1)


def test_parts_of_a_draw_make_the_whole() -> None:
    fitting = method(jitter=0.1)
    whole = fitting.losses(Draw.of(6, step=2)).total
    parts = [fitting.losses(Draw.of(6, step=2, part=slice(i, i + 2))).total for i in range(0, 6, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_only_the_rectifier_gets_gradients_and_the_model_stays_as_it_was() -> None:
    fitting = method()
    before = {name: p.clone() for name, p in fitting.frozen.named_parameters()}
    fitting.frozen.train()
    fitting.loss(Draw.of(4)).backward()
    assert all(p.grad is not None for p in fitting.rectifier.parameters())
    for name, p in fitting.frozen.named_parameters():
        assert p.grad is None
        assert p.requires_grad
        assert torch.equal(p, before[name])
    assert fitting.frozen.training


def test_several_relations_are_learned_together() -> None:
    two = RelationFitting(model(), rectifier(), [examples(3), examples(4)], jitter=0.0)
    one, other = (RelationFitting(model(), rectifier(), e, jitter=0.0) for e in two.examples)
    draw = Draw.of(8)
    losses = [fitting.losses(draw).positive for fitting in (two, one, other)]
    assert two.deltas().shape == (2, 4, WIDTH)
    # Draws of one seed are the same, so each row is that of the example it was given.
    which = Draw.of(8).indices(2, stream=4)
    assert which.unique().tolist() == [0, 1]
    draws = [fitting.losses(Draw.of(8)).positive for fitting in (one, other)]
    torch.testing.assert_close(losses[0], torch.where(which == 0, draws[0], draws[1]))


def test_fitting_raises_the_contrast_and_a_trainer_returns_the_rectifier() -> None:
    fitting = method(loss=PairContrastiveDenoising(1.0, 1.0, hinge=1.0))
    before = fitting.contrast(seed=1)
    assert fitting.contrast(seed=1) == before
    trained = fit_relation(fitting, settings(60))
    assert trained is fitting.rectifier
    assert fitting.contrast(seed=1) > before + 0.005


def test_cap_is_handed_to_the_rectifier() -> None:
    fitting = method(loss=PairContrastiveDenoising(cap=0.2))
    assert fitting.rectifier.cap == 0.2
    ends = examples().prompts.end_vectors().norm(dim=1)
    assert (fitting.deltas()[0].norm(dim=1) <= 0.2 * ends * (1 + 1e-6)).all()


def test_a_fall_of_the_contrast_stops_the_fit_and_goes_back() -> None:
    fitting, seen = method(), []

    def held_out(_: object) -> float:
        seen.append([p.detach().clone() for p in fitting.rectifier.parameters()])
        return float(-len(seen))

    stop = EarlyStop(held_out, every=1, patience=2)
    trained = fit_relation(fitting, settings(50), callbacks=[stop])
    assert len(seen) == 3
    assert stop.stopped
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), seen[0]))


def test_resume_equals_an_uninterrupted_fit(tmp_path) -> None:
    every = {"checkpoint_every": 5}
    whole = fit_relation(method(), settings(10, **every), folder=tmp_path / "a")
    fit_relation(method(), settings(10, **every), folder=tmp_path / "b")
    (tmp_path / "b/checkpoints/step-00000010.pt").unlink()
    again = fit_relation(method(), settings(10, **every), folder=tmp_path / "b", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    # Nothing of the frozen model is kept.
    (kept,) = (tmp_path / "a/checkpoints").glob("*10.pt")
    size = 4 * sum(p.numel() for p in whole.parameters())
    assert kept.stat().st_size < 6 * size + 40_000
    shutil.rmtree(tmp_path / "b")


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="one or more examples and pairings"):
        RelationFitting(model(), rectifier(), [])
    with pytest.raises(ValueError, match="unknown prompt of a relation 'AB'"):
        method(pairings=[("ARB", "AB")])
    with pytest.raises(ValueError, match="jitter must be >= 0"):
        method(jitter=-1.0)
    with pytest.raises(ValueError, match="belongs to another text encoder"):
        RelationFitting(model(), rectifier(width=7), examples())
    wide = {name: torch.zeros(2, 3) for name in PROMPTS}
    with pytest.raises(ValueError, match=r"samples of shape .2,., pictures have .3,."):
        RelationFitting(model(), rectifier(), RelationExamples(examples().prompts, wide))
    with pytest.raises(ValueError, match="pictures must have one shape"):
        RelationExamples(examples().prompts, {**wide, "A": torch.zeros(2, 4)})
