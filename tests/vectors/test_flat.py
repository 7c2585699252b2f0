"""Flat segments against a loop over the pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rectiflow import vectors
from rectiflow.vectors import Segments


def draw(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sizes=st.lists(st.integers(0, 120), min_size=1, max_size=12), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_segments_equal_the_loop(sizes, seed):
    total = sum(sizes)
    a, b = draw(seed, total), draw(seed + 1, total)
    plan = Segments.of(sizes)
    pieces = list(zip(a.split(sizes), b.split(sizes)))
    # float64 sums of at most 120 terms of order one.
    expected = torch.stack([(x * y).sum() for x, y in pieces])
    assert torch.allclose(vectors.segment_inner(a, b, plan), expected, rtol=0, atol=1e-12)
    assert torch.allclose(
        vectors.segment_norm(a, plan), torch.stack([x.norm() for x, _ in pieces]), rtol=1e-13
    )
    split = vectors.segment_split_parallel(a, b, plan)
    loop = [vectors.split_parallel(x, y, start=0) for x, y in pieces]
    assert torch.allclose(split.parallel, torch.cat([p.parallel for p in loop]), atol=1e-12)
    assert torch.allclose(split.orthogonal, torch.cat([p.orthogonal for p in loop]), atol=1e-12)
    values = draw(seed, len(sizes))
    repeated = values.repeat_interleave(torch.tensor(sizes))
    assert torch.equal(plan.expand(values), repeated)


def test_equal_segments_equal_the_batchwise_form():
    a, b = draw(0, 5 * 70), draw(1, 5 * 70)
    flat = vectors.segment_split_parallel(a, b, Segments.of([70] * 5)).orthogonal.view(5, 70)
    batch = vectors.split_parallel(a.view(5, 70), b.view(5, 70)).orthogonal
    assert torch.allclose(flat, batch, rtol=0, atol=1e-13)


def test_a_small_segment_beside_a_huge_one_keeps_its_digits():
    # Differences of a running sum would lose the second segment altogether.
    a = torch.cat([torch.full((3000,), 1e8), torch.full((40,), 1e-4), torch.full((3000,), 1e8)])
    out = vectors.segment_norm(a, Segments.of([3000, 40, 3000]))
    assert torch.allclose(out[1], torch.tensor(1e-4 * 40**0.5), rtol=1e-6)


def test_half_buffers_zeros_and_gradients():
    plan = Segments.of([50, 30])
    half = torch.full((80,), 300.0, dtype=torch.float16)
    assert torch.allclose(vectors.segment_norm(half, plan), torch.tensor([50.0, 30.0]).sqrt() * 300)
    assert vectors.segment_split_parallel(half, half, plan).parallel.dtype == torch.float16
    zero = torch.zeros(80, requires_grad=True)
    split = vectors.segment_split_parallel(torch.ones(80), zero, plan)
    assert torch.equal(split.orthogonal, torch.ones(80))
    (split.parallel.sum() + vectors.segment_norm(zero, plan).sum()).backward()
    assert torch.isfinite(zero.grad).all()
    a, b = draw(0, 20).requires_grad_(), draw(1, 20).requires_grad_()
    plan = Segments.of([3, 17])
    assert torch.autograd.gradcheck(
        lambda x, y: vectors.segment_split_parallel(x, y, plan).parallel, (a, b)
    )


def test_bad_buffers_are_named():
    with pytest.raises(ValueError, match="hold 5 elements"):
        vectors.segment_norm(torch.zeros(4), Segments.of([2, 3]))
    with pytest.raises(ValueError, match="sizes must be"):
        Segments.of([])
