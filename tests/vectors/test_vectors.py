"""The shared kernel against loops, its algebra, and its behaviour at zero."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import vectors as oracle

from rectiflow import vectors

SHAPE = (3, 2, 4, 4)


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or SHAPE), generator=generator, dtype=torch.float64).to(dtype)


# --- oracle ---


@pytest.mark.parametrize("start", [0, 1, 2])
def test_products_equal_the_loop(start):
    a, b = draw(0), draw(1)
    expected = torch.tensor(oracle.inner(a, b, start), dtype=torch.float64)
    # float64 sums of 32 terms: a few units in the last place.
    assert torch.allclose(vectors.inner(a, b, start=start).flatten(), expected, rtol=0, atol=1e-13)
    squares = torch.tensor(oracle.inner(a, a, start), dtype=torch.float64)
    assert torch.allclose(vectors.norm(a, start=start).flatten(), squares.sqrt(), rtol=1e-14)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_split_equals_the_loop(start):
    v, r = draw(0), draw(1)
    for ours, theirs in zip(
        vectors.split_parallel(v, r, start=start), oracle.split_parallel(v, r, start)
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bound", [0.0, 3.0, 5.5, 100.0])
def test_clip_norm_equals_the_loop(bound):
    v = draw(0)
    assert torch.allclose(vectors.clip_norm(v, bound), oracle.clip_norm(v, bound), atol=1e-15)


@pytest.mark.parametrize("order", [2, math.inf])
def test_clip_pixels_equals_the_loop(order):
    v = draw(0)
    ours = vectors.clip_pixels(v, 0.7, order=order)
    assert torch.allclose(ours, oracle.clip_pixels(v, 0.7, order), rtol=0, atol=1e-15)


# --- limit ---


def test_a_zero_reference_has_no_parallel_part():
    v = draw(0)
    split = vectors.split_parallel(v, torch.zeros_like(v))
    assert torch.equal(split.parallel, torch.zeros_like(v))
    assert torch.equal(split.orthogonal, v)


@pytest.mark.parametrize("factor", [1e-40, 1e-25, 1e25])
def test_extreme_lengths_neither_vanish_nor_overflow(factor):
    v, r = draw(0, dtype=torch.float32), draw(1, dtype=torch.float32)
    tiny = r * factor
    # Subnormal numbers (1e-40) keep about 16 bits.
    assert torch.allclose(
        vectors.split_parallel(v, tiny).parallel, vectors.split_parallel(v, r).parallel, atol=1e-3
    )
    assert torch.allclose(vectors.norm(tiny) / factor, vectors.norm(r), rtol=1e-3)
    assert torch.allclose(vectors.norm(vectors.clip_norm(v * 1e25, 2.0)), torch.tensor(2.0))


def test_balanced_vectors_have_the_mean_length_and_direction():
    v = draw(0, 3, 5, 7)
    out = vectors.balance(v)
    mean = vectors.norm(v, start=2).mean(0)
    assert torch.allclose(vectors.norm(out, start=2), mean.expand(3, 5), rtol=1e-13)
    assert torch.allclose(vectors.cosine(out, v, start=2), torch.ones(3, 5).double(), atol=1e-14)
    v[1] = 0
    kept = vectors.norm(v, start=2).sum(0) / 2
    assert torch.allclose(vectors.norm(vectors.balance(v), start=2)[0], kept, rtol=1e-13)


def test_combining_equal_vectors_changes_nothing_and_matching_restores_length():
    one = draw(0, 1, 4, 6)
    assert torch.allclose(vectors.combine(one.expand(3, 4, 6), match=True), one[0], atol=1e-14)
    v = draw(1, 3, 4, 6)
    weights = torch.tensor([1.0, 2.0, 5.0]).double()
    share = (weights / 8).view(3, 1)
    mean = vectors.combine(v, weights)
    assert torch.allclose(mean, (share[..., None] * v).sum(0), atol=1e-15)
    matched = vectors.combine(v, weights, match=True)
    energy = (share * vectors.norm(v, start=2) ** 2).sum(0)
    assert torch.allclose(vectors.norm(matched) ** 2, energy, rtol=1e-13)
    assert torch.allclose(vectors.combine(v, weights[:, None].expand(3, 4)), mean, atol=1e-15)


# --- property ---


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 4),
    width=st.integers(1, 9),
    scale=st.floats(1e-6, 1e6),
)
@settings(max_examples=30, deadline=None)
def test_splits_are_orthogonal_idempotent_and_complete(seed, rows, width, scale):
    v, r = draw(seed, rows, width), draw(seed + 1, rows, width) * scale
    parallel, orthogonal = vectors.split_parallel(v, r)
    size = vectors.norm(v)
    assert torch.allclose(parallel + orthogonal, v, rtol=0, atol=1e-14 * float(size.max()))
    # Rounding of one projection in float64, relative to the lengths.
    assert (vectors.inner(orthogonal, r).abs() <= 1e-12 * size * vectors.norm(r)).all()
    pythagoras = vectors.norm(parallel) ** 2 + vectors.norm(orthogonal) ** 2
    assert torch.allclose(pythagoras, size**2, rtol=1e-12)
    again = vectors.split_parallel(orthogonal, r)
    assert (vectors.norm(again.parallel) <= 1e-12 * size).all()
    assert torch.allclose(vectors.split_parallel(parallel, r).parallel, parallel, rtol=1e-12)


@given(seed=st.integers(0, 10**6), bound=st.floats(0.0, 4.0))
@settings(max_examples=30, deadline=None)
def test_clips_bound_what_is_outside_and_keep_bits_inside(seed, bound):
    v = draw(seed, 4, 3, 2, 2, dtype=torch.float32)
    # Below the smallest normal number each of 12 components rounds by the spacing of numbers there.
    most = bound * (1 + 1e-6) + 12 * 2.0**-149
    by_norm = vectors.clip_norm(v, bound)
    inside = vectors.norm(v) <= bound
    assert torch.equal(by_norm[inside], v[inside])
    assert (vectors.norm(by_norm) <= most).all()
    by_pixel = vectors.clip_pixels(v, bound).movedim(1, -1)
    pixels = v.movedim(1, -1)
    inside = vectors.norm(pixels, start=3) <= bound
    assert torch.equal(by_pixel[inside], pixels[inside])
    assert (vectors.norm(by_pixel, start=3) <= most).all()
    by_value = vectors.clip_value(v, bound)
    assert torch.equal(by_value, v.clamp(-bound, bound))


def test_bounds_per_vector_and_per_image():
    v = draw(0)
    bound = torch.tensor([0.0, 1.0, math.inf]).double()
    out = vectors.clip_norm(v, bound)
    assert torch.equal(vectors.norm(out)[0], torch.zeros(()).double())
    assert torch.allclose(vectors.norm(out)[1], bound[1])
    assert torch.equal(out[2], v[2])
    assert torch.equal(vectors.clip_value(v, bound)[2], v[2])
    assert torch.equal(vectors.clip_pixels(v, bound)[1], vectors.clip_pixels(v[1:2], 1.0)[0])
    assert torch.allclose(
        vectors.norm(vectors.rescale(v, bound[:2].repeat(2)[:3])), bound[[0, 1, 0]]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # The squares of 300 overflow float16; the sum of 10,000 of them stalls in bfloat16.
    v = torch.full((1, 10_000), 300.0, dtype=dtype)
    assert vectors.inner(v, v).dtype == torch.float32
    assert torch.allclose(vectors.norm(v), v[:, :1].float().flatten() * 100, rtol=1e-5)
    parallel, orthogonal = vectors.split_parallel(v, v)
    assert parallel.dtype == dtype
    assert torch.equal(parallel, v)
    assert torch.equal(orthogonal, torch.zeros_like(v))
    assert vectors.clip_norm(v, 1.0).dtype == dtype
    assert torch.equal(vectors.clip_norm(v, 1e6), v)


def test_inputs_are_not_written_to_and_samples_do_not_mix():
    v, r = draw(0), draw(1)
    before = v.clone(), r.clone()
    whole = vectors.split_parallel(v, r).orthogonal
    for call in (vectors.clip_norm, vectors.clip_value, vectors.clip_pixels, vectors.rescale):
        call(v, 0.5)
    vectors.balance(v)
    vectors.combine(v, match=True)
    assert torch.equal(v, before[0])
    assert torch.equal(r, before[1])
    assert torch.equal(vectors.split_parallel(v[1:2], r[1:2]).orthogonal, whole[1:2])


# --- gradient ---


def test_gradients_are_right_and_finite_at_zero():
    v, r = draw(0, 3, 4).requires_grad_(), draw(1, 3, 4).requires_grad_()
    calls = [
        lambda a, b: vectors.split_parallel(a, b).orthogonal,
        vectors.cosine,
        lambda a, b: vectors.clip_norm(a, 1.0) + vectors.norm(b)[:, None],
        lambda a, b: vectors.rescale(a, 2.0) * b,
        lambda a, b: vectors.combine(torch.stack([a, b]), match=True),
        lambda a, b: vectors.balance(torch.stack([a, b])),
    ]
    for call in calls:
        assert torch.autograd.gradcheck(call, (v, r))
        zeros = [torch.zeros(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        out = call(*zeros)
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), zeros))
    zero = torch.zeros(1, 3, 2, 2, requires_grad=True)
    for order in (2, math.inf):
        vectors.clip_pixels(zero, 0.1, order=order).sum().backward()
    vectors.clip_norm(zero, math.inf).sum().backward()
    assert torch.isfinite(zero.grad).all()


# --- life ---


def test_compiled_split_equals_the_eager_one():
    v, r = draw(0), draw(1)
    compiled = torch.compile(vectors.split_parallel, fullgraph=True, backend="eager")
    for ours, theirs in zip(compiled(v, r), vectors.split_parallel(v, r)):
        assert torch.allclose(ours, theirs, atol=1e-15)


def test_bad_arguments_are_named():
    v = draw(0)
    with pytest.raises(ValueError, match="bound must be >= 0, got -1"):
        vectors.clip_norm(v, -1.0)
    with pytest.raises(ValueError, match="same shape"):
        vectors.inner(v, v[:1])
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.4"):
        vectors.norm(v, start=5)
    with pytest.raises(ValueError, match="order must be 2"):
        vectors.clip_pixels(v, 1.0, order=1)
    with pytest.raises(ValueError, match="stacks"):
        vectors.balance(v, start=0)
