"""Largest eigenvalues against matrices with known spectra, SciPy and Hessians written out."""

from __future__ import annotations

import pytest
import torch
from tests.diagnose.tiny import classifier, data, dense, loss_of, randoms
from torch.nn import functional

from rectiflow.diagnose import (
    Hessian,
    block_sharpness,
    lanczos,
    layers_of,
    power_iteration,
    top_eigenpair,
)


def matrix(*spectrum: float, size: int = 30) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues; the rest lie between -0.5 and 0.5."""
    rest = torch.linspace(-0.5, 0.5, size - len(spectrum), dtype=torch.float64)
    values = torch.cat([torch.tensor(spectrum, dtype=torch.float64), rest])
    basis = torch.linalg.qr(randoms(size * size).view(size, size)).Q
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize("spectrum", [(4.0, 3.9, 1.0), (2.0, -7.0), (3.0, -3.0, -2.9)])
def test_both_methods_find_the_largest(spectrum: tuple[float, ...]) -> None:
    from scipy.sparse.linalg import LinearOperator, eigsh

    m, start = matrix(*spectrum), randoms(30, seed=2)
    wanted = eigsh(LinearOperator(m.shape, lambda v: m.numpy() @ v), k=1, which="LA")[0][0]
    assert wanted == pytest.approx(spectrum[0], abs=1e-9)
    found = lanczos(m.__matmul__, start, tolerance=1e-6)[0]
    slow = power_iteration(m.__matmul__, start, steps=3000, tolerance=1e-6)
    for pair in (found, slow):
        # The error of a Rayleigh quotient is of second order in the residual.
        assert pair.value == pytest.approx(spectrum[0], abs=1e-9)
        assert float((m @ pair.vector - pair.value * pair.vector).norm()) < 1e-5
        assert float(pair.vector.norm()) == pytest.approx(1)
        assert pair.residual <= 1e-6 * pair.value
    assert found.products < slow.products


def test_lanczos_finds_several() -> None:
    m = matrix(5.0, 4.0, 3.0, -9.0)
    pairs = lanczos(m.__matmul__, randoms(30), count=3, tolerance=1e-7)
    assert [pair.value for pair in pairs] == pytest.approx([5, 4, 3], abs=1e-9)
    vectors = torch.stack([pair.vector for pair in pairs])
    assert torch.allclose(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-9)


def test_ends_of_the_road() -> None:
    # All steps used, a matrix of zeros, fewer eigenvalues than asked for, one weight.
    m = matrix(4.0, 3.99)
    rough = lanczos(m.__matmul__, randoms(30), steps=4)[0]
    assert rough.products == 4
    assert rough.value <= 4
    assert abs(4 - rough.value) <= rough.residual
    zero = lanczos(torch.zeros_like, randoms(5), count=2)
    assert [(pair.value, pair.residual) for pair in zero] == [(0, 0)]
    assert power_iteration(torch.zeros_like, randoms(5)).value == 0
    twice = lanczos(lambda v: 2 * v, randoms(5), count=3)
    assert [pair.value for pair in twice] == pytest.approx([2])
    assert lanczos(lambda v: -3 * v, torch.ones(1))[0].value == -3
    assert power_iteration(lambda v: -3 * v, torch.ones(1)).value == -3


def test_warm_starts_cost_little() -> None:
    m = matrix(4.0, 2.0)
    cold = power_iteration(m.__matmul__, randoms(30), steps=100)
    near = cold.vector + 0.01 * randoms(30, seed=3) / 30**0.5
    assert power_iteration(m.__matmul__, near, steps=100).products <= 4
    assert cold.products > 6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="finite and > 0"):
        lanczos(torch.zeros_like, torch.zeros(3))
    with pytest.raises(ValueError, match="steps must be > 0"):
        power_iteration(torch.zeros_like, torch.ones(3), steps=0)
    with pytest.raises(ValueError, match="did you mean 'lanczos'"):
        top_eigenpair(hessian(), method="lanzcos")


def hessian() -> Hessian:
    model, batch = classifier(), data()
    return Hessian(loss_of(model), model.parameters(), [batch], module=model)


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_sharpness_of_a_network(method: str) -> None:
    model, (x, y) = classifier(), data()
    wanted = torch.linalg.eigvalsh(
        dense(model, lambda answer: functional.cross_entropy(answer(x), y))
    )[-1]
    generator = torch.Generator().manual_seed(0)
    h = hessian()
    found = top_eigenpair(h, method=method, steps=60, tolerance=1e-4, generator=generator)
    # Of second order in the residual.
    assert found.value == pytest.approx(float(wanted), rel=1e-6)
    again = top_eigenpair(h, method=method, start=found.vector, steps=60, generator=generator)
    # The tolerance of 1e-3, squared, over the gap to the next eigenvalue.
    assert again.value == pytest.approx(float(wanted), rel=1e-4)
    assert again.products < found.products


def test_an_eigenvector_as_start_is_left_for_a_sharper_one() -> None:
    h = hessian()
    generator = torch.Generator().manual_seed(0)
    start = randoms(35)
    best, second = lanczos(h.__matmul__, start, count=2, tolerance=1e-8)
    assert lanczos(h.__matmul__, second.vector)[0].value == pytest.approx(second.value, rel=1e-6)
    found = top_eigenpair(h, start=second.vector, generator=generator)
    assert found.value == pytest.approx(best.value, rel=1e-3)


def test_layers_are_diagonal_blocks() -> None:
    model, (x, y) = classifier(), data()
    full = dense(model, lambda answer: functional.cross_entropy(answer(x), y))
    blocks = layers_of(model)
    assert {name: len(held) for name, held in blocks.items()} == {"0": 2, "2": 1}
    found = block_sharpness(loss_of(model), blocks, [(x, y)], module=model, tolerance=1e-6)
    wanted = {"0": full[:20, :20], "2": full[20:, 20:]}
    for name, block in wanted.items():
        # Lanczos with 20 products on 20 and 13 weights is exact but for rounding.
        assert found[name] == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=1e-6)
    model[0].bias.requires_grad_(False)
    assert len(layers_of(model)["0"]) == 1
