"""Attention to words, the overlap of concepts, and steering by it; anagrams from end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.interop.pipelines import PROMPTS, shared, tokens
from tests.stirring import stirred
from torch import Tensor

from rectiflow.flows import ClassifierFreeGuidance, FlowModel, integrate
from rectiflow.guidance import (
    APG,
    Anagram,
    AntiSegregation,
    Balance,
    FlowChef,
    MultiViewField,
    OverlapMeter,
    alignment,
    concealment,
    overlap,
    score_matrix,
    segregation,
    text_attention,
)
from rectiflow.guidance.views import Flip, Identity, Negate, Rotate
from rectiflow.interop.diffusers import concept_tokens, encode_prompts, from_pipeline, with_prompts
from rectiflow.nets import MLP, MMDiT

WIDE = (1, 8, 8)
SPANS = [(1,), (1, 2)]


def model(**options: Any) -> FlowModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MMDiT(shape=WIDE, depth=2, heads=2, head_dim=8, context_dim=6, **options)
    return FlowModel(stirred(net, 0.2), shape=WIDE)


def context(seed: int) -> dict[str, Tensor]:
    return {"context": torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(seed))}


VIEWS = [(Identity(), context(1)), (Rotate(90), context(2))]
X = torch.randn(2, *WIDE, generator=torch.Generator().manual_seed(5))


# oracle


def test_overlap_of_maps() -> None:
    """Invariant 6."""
    one = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    left, right = one.clone(), one.clone()
    left[..., 2:], right[..., :2] = 0, 0
    same = segregation(torch.cat([one, one]))
    torch.testing.assert_close(same, torch.full((2,), 0.05))
    apart = segregation(torch.cat([left, right]))
    torch.testing.assert_close(apart, torch.full((2,), 0.45))
    torch.testing.assert_close(segregation(torch.cat([one] * 3)), torch.full((2,), 0.1))
    torch.testing.assert_close(segregation(torch.cat([one, 3 * one])), torch.full((2,), 0.2))
    assert overlap(torch.cat([one, left, right])).shape == (3, 2)
    assert segregation(torch.zeros(2, 1, 2, 2)).item() == pytest.approx(0.45)


def test_the_gradient_of_the_overlap() -> None:
    """Invariant 6."""
    maps = torch.rand(3, 2, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradcheck(segregation, (maps.requires_grad_(),))


def test_maps_of_our_network_are_the_softmax_of_its_scores() -> None:
    """By hand for the first block, whose inputs are known; tokens of the text come first."""
    net, given = model().net, torch.cat([context(1)["context"]] * 2)
    block, seen = net.blocks[0], {}
    hook = block.register_forward_hook(lambda _, given, made: seen.update(given=given))
    with text_attention(net) as maps:
        net(X, torch.full((2,), 0.3), context=given)
    hook.remove()
    said, tokens_of_image, e = seen["given"]
    shift, scale = block.image.modulations(e)[:2]
    norm = torch.nn.functional.layer_norm
    flat = norm(tokens_of_image, tokens_of_image.shape[-1:], eps=1e-6) * (1 + scale) + shift
    query, key, _ = block.image.attention(flat)
    shift, scale = block.context.modulations(e)[:2]
    text = block.context.attention(norm(said, said.shape[-1:], eps=1e-6) * (1 + scale) + shift)[1]
    keys = torch.cat([text, key], 1)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, keys) / 8**0.5
    torch.testing.assert_close(maps[0], scores.softmax(-1)[..., :3].sum(1))
    assert len(maps) == 2
    assert not block.image.attention._forward_hooks


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_maps_of_pipelines_are_what_their_attention_uses(name: str) -> None:
    """Values that count tokens make an attention's output the map itself."""
    pipe = shared(name)
    network = getattr(pipe, "transformer", None) or pipe.unet
    flow = from_pipeline(pipe, size=(16, 16), tokens=tokens(name))
    given = encode_prompts(pipe, PROMPTS, tokens=tokens(name), cache=None).everything()
    probed: list[Tensor] = []
    attentions = [
        m
        for n, m in network.named_modules()
        if n.endswith("attn2") or (name == "sd3" and n.endswith(".attn"))
    ]
    hooks = []
    for attention in attentions:

        def values(_: Any, given: Any, made: Tensor) -> Tensor:
            # The first token of the text says 1, all others 0.
            return torch.zeros_like(made).index_fill_(1, torch.tensor([0]), 1.0)

        def nothing(_: Any, given: Any, made: Tensor) -> Tensor:
            return torch.zeros_like(made)

        def out(_: Any, given: Any, made: Tensor, heads: int = attention.heads) -> None:
            # Averaged over a head's equal numbers, summed over heads.
            probed.append(given[0].unflatten(-1, (heads, -1)).mean(-1).sum(-1))

        if name == "sd3":
            hooks.append(attention.add_v_proj.register_forward_hook(values))
            hooks.append(attention.to_v.register_forward_hook(nothing))
        else:
            hooks.append(attention.to_v.register_forward_hook(values))
        hooks.append(attention.to_out[0].register_forward_hook(out))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), text_attention(flow) as maps:
        flow.velocity(noise, torch.full((2,), 0.4), **given)
    for hook in hooks:
        hook.remove()
    assert len(maps) == len(probed) == len(attentions) > 0
    for found, wanted in zip(maps, probed):
        torch.testing.assert_close(found[..., 0], wanted, rtol=1e-4, atol=1e-5)


def test_concepts_are_found_by_their_tokens() -> None:
    """The tokenizer of the tests makes a token of every letter, after one that starts the text."""
    pipe = shared("sd")
    assert concept_tokens(pipe, "a fox", "fox") == (2, 3, 4)
    assert concept_tokens(pipe, "fox a fox", "fox") == (5, 6, 7)
    assert concept_tokens(pipe, "a red fox", "red fox") == (2, 3, 4, 5, 6, 7)
    both = concept_tokens(shared("sd3"), "a fox", "fox")
    # T5 cuts into a mark of the space and letters, 16 tokens further on.
    assert both == (2, 3, 4, *range(18, 22))
    with pytest.raises(ValueError, match="the concept 'cat' is not in the prompt 'a fox'"):
        concept_tokens(pipe, "a fox", "cat")
    with pytest.raises(ValueError, match="is not in the prompt"):
        concept_tokens(pipe, "a fox that runs so far away", "away")


# property


def steered(settings: dict[str, Any], **chef: Any) -> tuple[Tensor, OverlapMeter, FlowChef]:
    cost = AntiSegregation(SPANS, **settings)
    corrector, meter = (
        FlowChef(cost, **{"step_size": 20.0, "clip": None, **chef}),
        OverlapMeter(cost),
    )
    field = MultiViewField(ClassifierFreeGuidance(model(), 3.0), VIEWS)
    with torch.no_grad():
        found = integrate(field, X, 6, correctors=(corrector, meter))
    return found, meter, corrector


def test_a_step_goes_down_the_gradient_of_the_state_after_it() -> None:
    field = MultiViewField(model(), VIEWS)
    cost = AntiSegregation(SPANS)
    plain = integrate(field, X, [0.2, 0.5])
    free = plain.detach().requires_grad_()
    value = segregation(cost.maps(field, free, torch.full((2,), 0.5)))
    (slope,) = torch.autograd.grad(value.sum(), free)
    chef = FlowChef(cost, step_size=2.0, clip=None)
    found = integrate(field, X, [0.2, 0.5], correctors=(chef,))
    torch.testing.assert_close(found, plain - 2.0 * slope)
    torch.testing.assert_close(chef.costs[0], value.detach())
    assert slope.abs().max() > 1e-5
    # Down the cost, for a short step.
    t = torch.full((2,), 0.5)
    after = segregation(cost.maps(field, plain - 2.0 * slope, t))
    assert (after < value).all()


def test_steering_brings_concepts_nearer_to_each_other() -> None:
    _, plain, off = steered({"target": 0.5}, step_size=0.0)
    _, near, on = steered({"target": 0.5})
    assert plain.overlap is not None
    assert near.overlap is not None
    assert near.overlap.mean() > plain.overlap.mean()
    # Five corrections of six steps: the last step is left alone.
    assert (len(off.costs), len(on.costs)) == (0, 5)
    assert len(steered({}, until=0.5)[2].costs) == 3


def test_maps_stand_where_the_picture_has_its_concept() -> None:
    """Two views of one picture under one text: the maps lie on each other in the first view."""
    field = MultiViewField(model(), [(Identity(), context(1)), (Negate(), context(1))])
    found = AntiSegregation([(0,), (0,)]).maps(field, 0 * X, torch.full((2,), 0.5))
    torch.testing.assert_close(found[0], found[1])
    assert (found > 0).all()
    assert found.shape == (2, 2, 8, 8)
    turned = MultiViewField(model(), [(Flip(), context(1)), (Flip(), context(1))])
    seen = AntiSegregation([(0,), (0,)]).maps(turned, X, torch.full((2,), 0.5))
    upright = MultiViewField(model(), [(Identity(), context(1))] * 2)
    flipped = AntiSegregation([(0,), (0,)]).maps(upright, X.flip(-2), torch.full((2,), 0.5))
    torch.testing.assert_close(seen, flipped.flip(-2))


def test_batches_are_their_samples() -> None:
    """Invariant 10."""
    cost, field = AntiSegregation(SPANS), MultiViewField(model(), VIEWS)
    together = cost.maps(field, X, torch.full((2,), 0.5))
    for row in range(2):
        alone = cost.maps(field, X[row : row + 1], torch.full((1,), 0.5))
        torch.testing.assert_close(together[:, row : row + 1], alone)


def test_maps_are_made_in_the_correction_only() -> None:
    flow, calls = model(), []
    hook = flow.net.register_forward_hook(lambda _, given, made: calls.append(len(given[0])))
    field = MultiViewField(ClassifierFreeGuidance(flow, 3.0), VIEWS)
    chef = FlowChef(AntiSegregation(SPANS), until=0.5)
    integrate(field, X, 4, correctors=(chef,))
    hook.remove()
    # Two views, two branches, two samples; then a conditional call a view in half of the steps.
    assert sorted(calls) == [2] * 4 + [8] * 4


def test_a_pipeline_is_steered() -> None:
    pipe = shared("sd")
    flow = with_prompts(
        from_pipeline(pipe, size=(16, 16)), encode_prompts(pipe, PROMPTS, cache=None)
    )
    spans = [concept_tokens(pipe, *words) for words in zip(PROMPTS, ("fox", "doors"))]
    anagram = Anagram(
        flow,
        [(Identity(), {"prompt": 0}), (Flip(), {"prompt": 1})],
        guide=lambda inner: APG(inner, 3.0),
        steps=[0.2, 0.5, 0.8],
        spans=spans,
        antiseg=5.0,
    )
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found = anagram(source=noise)
    plain = Anagram(flow, anagram.views, guide=anagram.guide, steps=anagram.steps)(source=noise)
    assert found.isfinite().all()
    assert not torch.allclose(found, plain, atol=1e-6)


# what is refused


def test_wrong_uses() -> None:
    field, t = MultiViewField(model(), VIEWS), torch.full((2,), 0.5)
    with pytest.raises(ValueError, match="two or more views: give the tokens of each, got"):
        AntiSegregation([(1,)])
    with pytest.raises(ValueError, match="two or more views"):
        AntiSegregation([(1,), ()])
    with pytest.raises(ValueError, match="2 views and 3 spans of tokens"):
        AntiSegregation([(1,)] * 3).maps(field, X, t)
    with pytest.raises(ValueError, match="the text has 3 tokens, numbered from 0"):
        AntiSegregation([(1,), (3,)]).maps(field, X, t)
    with pytest.raises(ValueError, match="no attention map with 5 rows: there are 4"):
        AntiSegregation(SPANS, side=5).maps(field, X, t)
    with pytest.raises(ValueError, match="follow a MultiViewField"):
        AntiSegregation(SPANS).maps(model(), X, t)
    plain = FlowModel(MLP(shape=WIDE, width=8, depth=1, classes=3), shape=WIDE)
    labelled = MultiViewField(plain, [(Identity(), {"label": 0}), (Flip(), {"label": 1})])
    with pytest.raises(ValueError, match="MLP has no attention to text that can be read"):
        AntiSegregation(SPANS).maps(labelled, X, t)
    with pytest.raises(ValueError, match="takes neither velocity nor skip"):
        FlowChef(AntiSegregation(SPANS), skip=False)


# the whole


def labelled() -> FlowModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MLP(shape=WIDE, width=16, depth=1, classes=4, zero=False)
    return FlowModel(net, shape=WIDE)


def test_an_anagram_is_its_parts_put_together() -> None:
    views = [(Identity(), {"label": 1}), (Rotate(90), {"label": 2})]
    flow = labelled()
    balance = Balance(lambda x, label: 0.3 + 0.1 * x.flatten(1).mean(1).tanh())
    anagram = Anagram(
        flow,
        views,
        guide=lambda inner: APG(inner, 3.0, norm=1.0),
        combine="balanced",
        balance=balance,
        steps=4,
        solver="heun",
    )
    steps: list[int] = []
    found = anagram(source=X, progress=steps.append)
    guided = APG(flow, 3.0, norm=1.0)
    field = MultiViewField(guided, views, combine="balanced", balance=balance, steps=4)
    torch.testing.assert_close(found, integrate(field, X, 4, "heun"))
    assert steps == [1, 2, 3, 4]
    assert torch.equal(anagram.shown(found)[1], found.rot90(1, (-2, -1)))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(anagram(2, generator=generator), found)


def test_anagrams_refuse() -> None:
    views = [(Identity(), {"label": 1}), (Flip(), {"label": 2})]
    with pytest.raises(ValueError, match="antiseg must be >= 0, got nan"):
        Anagram(labelled(), views, antiseg=float("nan"))
    with pytest.raises(ValueError, match="antiseg needs spans"):
        Anagram(labelled(), views, antiseg=1.0)
    with pytest.raises(ValueError, match="did you mean 'alternate'"):
        Anagram(labelled(), views, combine="alternating")


def test_scores_of_views() -> None:
    pictures = [torch.tensor([[0.9, 0.2], [0.5, 0.5]]), torch.tensor([[0.1, 0.6], [0.5, 0.5]])]
    wanted = [{"label": torch.tensor([0, 0])}, {"label": torch.tensor([1, 1])}]

    def score(x: Tensor, label: Tensor) -> Tensor:
        return x.gather(1, label[:, None])[:, 0]

    matrix = score_matrix(score, pictures, wanted)
    assert matrix[0].flatten().tolist() == pytest.approx([0.9, 0.2, 0.1, 0.6])
    assert alignment(matrix).tolist() == pytest.approx([0.6, 0.5])
    sure, unsure = concealment(matrix).tolist()
    assert sure == pytest.approx(1)
    assert unsure == pytest.approx(0.5)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        concealment(matrix, temperature=0.0)
