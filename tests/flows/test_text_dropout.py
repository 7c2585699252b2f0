"""Text encoders are dropped whole, independently, and as a function of the draw."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flows import SD3_ENCODERS, EncoderDropout, EncoderPart, Independent
from rectiflow.flows.couplings import Draw, TensorData

PARTS = (
    EncoderPart(tokens=(0, 2), channels=(0, 1), pooled=(0, 1)),
    EncoderPart(tokens=(0, 2), channels=(1, 3), pooled=(1, None)),
    EncoderPart(tokens=(2, None)),
)


def pairs(size: int, *, part: slice | None = None, **settings):
    given = {"context": torch.ones(50, 4, 4), "pooled": torch.ones(50, 3)}
    data = TensorData(torch.zeros(50, 2), given)
    made = EncoderDropout(Independent(data), PARTS, **settings).draw(Draw.of(size, part=part))
    assert bool(given["context"].all()), "the data stay as they are"
    return made.condition["context"], made.condition["pooled"]


def present(context: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Which encoders each sample kept, having checked that they are kept or dropped whole."""
    parts = []
    for i, part in enumerate(PARTS):
        block = context[:, slice(*part.tokens), slice(*part.channels)].flatten(1)
        assert torch.equal(block.amin(1), block.amax(1))
        if i < 2:
            assert torch.equal(pooled[:, slice(*part.pooled)].amin(1), block.amin(1))
        parts.append(block[:, 0])
    return torch.stack(parts, 1)


def test_each_encoder_is_dropped_with_its_probability_and_all_in_one_of_ten():
    kept = present(*pairs(8000))
    # Four standard errors: 0.022 for one encoder, 0.0134 for all three.
    assert kept.mean(0).tolist() == pytest.approx([0.536] * 3, abs=0.0223)
    assert float((kept.sum(1) == 0).float().mean()) == pytest.approx(0.464**3, abs=0.0135)


def test_padding_is_nobodys():
    context, _ = pairs(20, probability=1.0)
    assert bool((context[:, :2, 3] == 1).all())
    assert not context[:, :2, :3].any()


def test_limits_and_parts_of_a_step():
    context, pooled = pairs(6, probability=0.0)
    assert bool(context.all())
    assert bool(pooled.all())
    whole = pairs(6)[0]
    assert torch.equal(pairs(6, part=slice(2, 5))[0], whole[2:5])


def test_the_released_layout_covers_two_clips_and_t5():
    sizes = [part.channels for part in SD3_ENCODERS]
    assert sizes == [(0, 768), (768, 2048), (0, None)]
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 1.5"):
        EncoderDropout(Independent(torch.zeros(2, 2)), probability=1.5)
