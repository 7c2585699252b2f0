"""Batch-size tests: their statistics against stored gradients, and what follows from them."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rectiflow.optim import (
    AdAdaGrad,
    AdAdaGradNorm,
    BatchPlan,
    BatchSizeController,
    GradientStatistics,
    InnerProductTest,
    MicroBatchStatistics,
    NormTest,
    ResizableBatches,
    per_sample_statistics,
    rank_statistics,
)
from rectiflow.optim.micro_batches import single

DOUBLE = torch.float64


def problem(count: int = 13) -> tuple[nn.Module, list[torch.Tensor]]:
    """A small classifier with a frozen layer, and its batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
        net[2].requires_grad_(False)
        return net, [torch.randn(count, 5, dtype=DOUBLE), torch.randint(3, (count,))]


def loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(net(x), y)


def stored(net: nn.Module, rows: list[torch.Tensor]) -> np.ndarray:
    """Every sample's gradient as a row, one backward pass each."""
    found = []
    trained = [p for p in net.parameters() if p.requires_grad]
    for i in range(len(rows[0])):
        one = torch.autograd.grad(loss(net, *(r[i : i + 1] for r in rows)), trained)
        found.append(torch.cat([g.flatten() for g in one]).numpy())
    return np.stack(found)


def of(rows: torch.Tensor, cuts: tuple[int, ...] = ()) -> GradientStatistics:
    """Statistics of given gradients, cut into tensors."""
    parts = torch.tensor_split(rows, cuts, 1)
    mean = [p.mean(0) for p in parts]
    centred = [p - m for p, m in zip(parts, mean)]
    products = torch.stack([c @ m for c, m in zip(centred, mean)])
    inner = torch.cat([products.sum(0, keepdim=True), products]).square().sum(1)
    squares = tuple(c.square().sum(0) for c in centred)
    return GradientStatistics(len(rows), 1, tuple(mean), squares, inner)


# Oracles


@pytest.mark.parametrize("chunk", [1, 4, 13, None])
@pytest.mark.parametrize("offset", [False, True])
def test_statistics_are_those_of_stored_gradients(chunk, offset) -> None:
    net, rows = problem()
    g = stored(net, rows)
    sizes = [p.numel() for p in net.parameters() if p.requires_grad]
    extra = [torch.full_like(p, 0.3) for p in net.parameters() if p.requires_grad]
    found = per_sample_statistics(
        net, loss, rows, inner=True, chunk=chunk, offset=extra if offset else None
    )
    mean = g.mean(0) + (0.3 if offset else 0.0)
    products = g @ mean
    parts = np.split(np.arange(g.shape[1]), np.cumsum(sizes)[:-1])
    by_tensor = sum(np.var(g[:, p] @ mean[p], ddof=1) for p in parts)
    wanted = {
        "signal": mean @ mean,
        "noise": np.var(g, axis=0, ddof=1).sum(),
        "along": np.var(products, ddof=1),
        "along_tensors": by_tensor,
    }
    assert found.samples == 13
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-10), name
    assert found.along != pytest.approx(found.along_tensors, rel=1e-3)
    fine = per_sample_statistics(net, loss, rows, coordinates=True, chunk=chunk)
    variance = torch.cat([v.flatten() for v in fine.variances()]).numpy()
    np.testing.assert_allclose(variance, np.var(g, axis=0, ddof=1), rtol=1e-10, atol=1e-16)
    assert all(p.grad is None for p in net.parameters())


def test_variance_survives_a_mean_that_is_far_larger() -> None:
    # In float32, sums of squares would give 1e8 (1 ± 1e-7) - 1e8: nothing of the variance is left.
    net = nn.Linear(1, 1, bias=False)
    x = 1e4 + torch.linspace(-1, 1, 64)[:, None]
    for chunk in (7, 64):
        found = per_sample_statistics(net, lambda net, x: net(x).sum(), [x], chunk=chunk)
        # The mean is rounded to 6e-4, the deviations to no more.
        assert found.noise == pytest.approx(float(x.double().var()), rel=0.01)


def test_sums_are_taken_in_double_precision() -> None:
    ones = torch.ones(300_000, dtype=torch.bfloat16)
    halves = GradientStatistics(3, 1, (ones,), (ones,))
    assert (halves.signal, halves.noise) == (300_000.0, 150_000.0)


def test_weights_that_samples_do_not_move_apart() -> None:
    net = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}).double()
    net.register_parameter("shift", nn.Parameter(torch.zeros((), dtype=DOUBLE)))
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [2.0, 4.0]], dtype=DOUBLE)

    def summed(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net["used"](x).sum() + x.square().sum() * net.shift

    found = per_sample_statistics(net, summed, [x], inner=True, chunk=2)
    g = np.array([[1, 0, 1, 1], [3, 2, 1, 13], [2, 4, 1, 20.0]])
    assert found.noise == pytest.approx(np.var(g, axis=0, ddof=1).sum(), rel=1e-12)
    assert found.along == pytest.approx(np.var(g @ g.mean(0), ddof=1), rel=1e-12)


def test_needed_batches_by_hand() -> None:
    # Gradients (3, 1), (1, -1), (2, 3): mean (2, 1), variances 1 and 4.
    g = torch.tensor([[3.0, 1.0], [1.0, -1.0], [2.0, 3.0]], dtype=DOUBLE)
    found = of(g, (1,))
    assert found.noise == pytest.approx(5)
    assert found.signal == pytest.approx(5)
    assert NormTest(0.5).needed(found) == pytest.approx(5 / 0.25 / 5)
    # Inner products with the mean: 7, 1, 7, of variance 12; by tensor 6, 2, 4 and 1, -1, 3.
    assert InnerProductTest(0.5).needed(found) == pytest.approx(12 / 0.25 / 25)
    assert InnerProductTest(0.5, by_tensor=True).needed(found) == pytest.approx((4 + 4) / 0.25 / 25)
    across = 5 - 12 / 5
    assert InnerProductTest(0.5, nu=0.1).needed(found) == pytest.approx(across / 0.01 / 5)
    assert NormTest(0.5, "max").needed(found) == pytest.approx(4 / 0.25)
    assert NormTest(0.5, "quantile:0.5").needed(found) == pytest.approx(1 / 4 / 0.25)
    assert NormTest(0.5, "tensor").needed(found) == pytest.approx(4 / 0.25)


def test_variance_is_what_lies_along_and_across() -> None:
    net, rows = problem()
    g = stored(net, rows)
    found = per_sample_statistics(net, loss, rows, inner=True)
    unit = g.mean(0) / np.linalg.norm(g.mean(0))
    across = np.var(g - np.outer(g @ unit, unit), axis=0, ddof=1).sum()
    assert found.along / found.signal + across == pytest.approx(found.noise, rel=1e-10)
    ((_, _), (noise, _)) = InnerProductTest(nu=1.0).measures(found)
    assert noise == pytest.approx(across, rel=1e-9)


def test_gaussian_gradients_ask_for_what_theory_says() -> None:
    generator = torch.Generator().manual_seed(3)
    mu = torch.linspace(0.5, 1.5, 40, dtype=DOUBLE)
    g = mu + 2 * torch.randn(20_000, 40, generator=generator, dtype=DOUBLE)
    wanted = 4 * 40 / (0.3**2 * float(mu.square().sum()))
    assert NormTest(0.3).needed(of(g)) == pytest.approx(wanted, rel=0.02)
    along = 4 / (0.3**2 * float(mu.square().sum()))
    assert InnerProductTest(0.3).needed(of(g)) == pytest.approx(along, rel=0.05)


def test_micro_batches_estimate_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(30, dtype=DOUBLE))
    estimates = []
    for _ in range(50):
        watch = MicroBatchStatistics([weight], unit=5, times=8)
        weight.grad = None
        for _ in range(8):
            x = 1 + 2 * torch.randn(5, 30, generator=generator, dtype=DOUBLE)
            (x.mean(0) @ weight / 8).backward()
            watch.observe()
        found = watch.statistics()
        assert found.samples == 40
        estimates.append(found.noise)
    # 50 estimates of 4 * 30 with 7 * 30 degrees of freedom each: a standard error of 1.7.
    assert np.mean(estimates) == pytest.approx(120, abs=6)
    torch.testing.assert_close(found.mean[0], weight.grad, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="nothing was observed"):
        watch.statistics()


def _worker(rank: int, folder: str, queue) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    net, rows = problem()
    own = [r[:4] if rank == 0 else r[4:] for r in rows]
    found = per_sample_statistics(net, loss, own, inner=True, chunk=3)
    ranks = rank_statistics([torch.tensor([1.0 + 2 * rank, 2.0])], unit=6, inner=True)
    queue.put(
        [
            [s.samples, s.signal, s.noise, s.along, s.along_tensors]
            for s in (found, ranks)
        ]
    )  # fmt: skip
    torch.distributed.destroy_process_group()


def test_processes_pool_exactly(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [fork.Process(target=_worker, args=(r, str(tmp_path), queue)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    net, rows = problem()
    whole = per_sample_statistics(net, loss, rows, inner=True)
    for pooled, ranks in results:
        assert pooled == pytest.approx(
            [13, whole.signal, whole.noise, whole.along, whole.along_tensors], rel=1e-10
        )
        # (1, 2) and (3, 2): mean (2, 2), variance 2 between means of 6 samples.
        assert ranks == pytest.approx([12, 8.0, 6 * 2.0, 6 * 8.0, 6 * 8.0])


# Limits and properties


@pytest.mark.parametrize("cut", [1, 4, 12])
@pytest.mark.parametrize("coordinates", [False, True])
def test_merging_shards_is_exact(cut, coordinates) -> None:
    net, rows = problem()
    whole = per_sample_statistics(net, loss, rows, coordinates=coordinates)
    shards = [
        per_sample_statistics(net, loss, part, coordinates=coordinates)
        for part in ([r[:cut] for r in rows], [r[cut:] for r in rows])
    ]
    merged = shards[0].merged(shards[1])
    assert merged.samples == 13
    for a, b in zip((*merged.mean, *merged.squares), (*whole.mean, *whole.squares)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


TESTS = (
    NormTest(0.3),
    NormTest(0.3, "max"),
    NormTest(0.3, "quantile:0.9"),
    NormTest(0.3, "tensor"),
    InnerProductTest(0.3),
    InnerProductTest(0.3, nu=0.5),
    InnerProductTest(0.3, by_tensor=True),
)


@pytest.mark.parametrize("rule", TESTS, ids=str)
def test_every_test(rule) -> None:
    generator = torch.Generator().manual_seed(1)
    g = 0.2 + torch.randn(9, 12, generator=generator, dtype=DOUBLE)
    found = of(g, (5, 8))
    asked = rule.needed(found)
    assert 0 < asked < math.inf
    # Units of the loss do not matter.
    assert rule.needed(of(1e3 * g, (5, 8))) == pytest.approx(asked, rel=1e-9)
    # Samples that agree ask for nothing, a mean of zero for everything.
    assert rule.needed(of(g[:1].expand(9, -1), (5, 8))) < 1e-25
    apart = torch.cat([g, -g])
    assert rule.needed(of(apart - apart.mean(0), (5, 8))) > 1e12 or isinstance(
        rule, InnerProductTest
    )
    with pytest.raises(ValueError, match="two gradients or more, got 1"):
        rule.needed(of(g[:1], (5, 8)))
    g[3, 2] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        rule.needed(of(g, (5, 8)))


def test_order_of_what_tests_ask_for() -> None:
    generator = torch.Generator().manual_seed(1)
    found = of(0.2 + torch.randn(9, 12, generator=generator, dtype=DOUBLE), (5, 8))
    asked = [NormTest(eta).needed(found) for eta in (0.1, 0.2, 0.5, 1.0)]
    assert asked == sorted(asked, reverse=True)
    by = {c: NormTest(0.3, c).needed(found) for c in (None, "tensor", "quantile:0.5", "max")}
    assert by[None] <= by["tensor"] <= by["max"]
    assert by["quantile:0.5"] <= by["max"]
    theta = [InnerProductTest(theta, nu=1e6).needed(found) for theta in (0.1, 0.5)]
    assert theta == [InnerProductTest(theta).needed(found) for theta in (0.1, 0.5)]
    assert theta[0] > theta[1]


@pytest.mark.parametrize(
    "processes, max_micro, b_max", [(1, None, 50), (3, None, 50), (4, 10, 90), (1, 7, 101)]
)
def test_plans_hold_what_is_asked(processes, max_micro, b_max) -> None:
    for size in range(processes, b_max + 1):
        found = BatchPlan.of(size, processes=processes, max_micro=max_micro, at_most=b_max)
        assert found.size <= b_max
        assert found.micro <= (max_micro or b_max)
        free = BatchPlan.of(size, processes=processes, max_micro=max_micro)
        assert size <= free.size < size + processes * free.accumulate
        assert found.size == free.size or free.size > b_max
        assert BatchPlan.of(free.size, processes=processes, max_micro=max_micro) == free


def told(noise: float, signal: float) -> GradientStatistics:
    """Statistics of this noise and signal."""
    mean = torch.tensor([signal], dtype=DOUBLE).sqrt()
    return GradientStatistics(2, 1, (mean,), (torch.tensor(noise, dtype=DOUBLE),))


def test_controller_grows_and_never_shrinks() -> None:
    controller = BatchSizeController(NormTest(1.0), 4, b_max=90, processes=2, max_micro=10)
    sizes = []
    for noise in (3.0, 30.0, 8.0, math.inf, 1.0):
        assert controller.due == (controller.batch_size < 90)
        planned = controller.test(lambda noise=noise: told(noise, 1.0))
        held = controller.batch_size
        controller.advance()
        assert controller.plan == planned
        sizes.append(planned.size)
        assert sizes[-1] >= held
        for _ in range(9):
            assert not controller.due
            controller.advance()
    assert sizes == [4, 32, 32, 90, 90]
    uneven = BatchSizeController(NormTest(1.0), 4, b_max=40, max_micro=16, interval=1)
    uneven.test(lambda: told(1e9, 1.0))
    uneven.advance()
    assert (uneven.batch_size, uneven.due) == (39, False)
    assert not controller.due
    records = controller.records
    assert [r.batch_size for r in records] == [4, 4, 32, 32, 90]
    assert [r.step for r in records] == [0, 10, 20, 30, 40]
    used = [4] * 11 + [32] * 20 + [90] * 9
    assert [r.samples for r in records] == [sum(used[: r.step]) for r in records]
    assert records[1].signal_to_noise == pytest.approx(4 / 30)
    assert records[1].plan == BatchPlan(8, 2, 2)
    assert all(r.seconds >= 0 for r in records)


def test_samples_are_those_of_the_batches_that_were_used() -> None:
    controller = BatchSizeController(NormTest(1.0), 4, b_max=100, interval=2, lr_scaling="sqrt")
    used = []
    for step in range(6):
        used.append(controller.batch_size)
        assert controller.samples == sum(used[:-1])
        if controller.due:
            controller.test(lambda step=step: told(4.0 * 4**step, 1.0))
        controller.advance()
    assert used == [4, 4, 4, 64, 64, 100]
    assert controller.lr_factor == 5
    again = BatchSizeController(NormTest(1.0), 4, b_max=100, interval=2, lr_scaling="sqrt")
    again.load_state_dict(controller.state_dict())
    assert again.state_dict() == controller.state_dict()
    assert (again.batch_size, again.samples, again.lr_factor) == (100, 240, 5)


def test_growth_and_smoothing() -> None:
    slow = BatchSizeController(NormTest(1.0), 4, b_max=100, max_growth=2)
    assert slow.test(lambda: told(50.0, 1.0)).size == 8
    smooth = BatchSizeController(NormTest(1.0), 4, b_max=100, ema=0.5)
    assert smooth.test(lambda: told(6.0, 1.0)).size == 6
    # Weights 1/4 and 1/2 of what was seen: (6 / 4 + 50 / 2) / (1 / 4 + 1 / 2).
    assert smooth.test(lambda: told(50.0, 1.0)).size == math.ceil(26.5 / 0.75)


def test_shuffled_epochs_survive_changes_of_size() -> None:
    batches = ResizableBatches(17, 4, seed=3)
    stream, seen = iter(batches), []
    for size in (4, 4, 6, 10, 2, 40, 2):
        batches.batch_size = size
        batch = next(stream)
        assert len(batch) == size
        seen += batch
    for epoch in range(4):
        assert sorted(seen[17 * epoch : 17 * (epoch + 1)]) == list(range(17))
    assert seen[:17] != seen[17:34]
    resumed = ResizableBatches(17, 4, seed=3)
    resumed.load_state_dict(batches.state_dict())
    assert next(iter(resumed)) == next(stream)
    # After 24 samples, whatever the workers of a loader have fetched since.
    resumed.load_state_dict({"position": 24, "batch_size": 7})
    assert next(iter(resumed)) == seen[24:31]
    whole = ResizableBatches(17, 6, seed=3)
    shares = [ResizableBatches(17, 6, seed=3, process=p, processes=2) for p in (0, 1)]
    for one, *parts in itertools.islice(zip(whole, *shares), 5):
        assert one == parts[0] + parts[1]
    with pytest.raises(ValueError, match="cannot share a batch of 5"):
        next(iter(ResizableBatches(17, 5, processes=2)))


def test_scalar_adagrad_turns_with_its_weights() -> None:
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE)).Q
    matrix = torch.diag(torch.tensor([1.0, 5.0, 0.2], dtype=DOUBLE))
    ends = {}
    for kind in (AdAdaGradNorm, AdAdaGrad):
        found = []
        for turn in (torch.eye(3, dtype=DOUBLE), rotation):
            weight = nn.Parameter(turn @ torch.ones(3, dtype=DOUBLE))
            optimizer = kind([weight], lr=0.3)
            for _ in range(20):
                optimizer.zero_grad()
                (weight @ (turn @ matrix @ turn.T) @ weight).backward()
                optimizer.step()
            found.append(turn.T @ weight.detach())
        ends[kind] = (found[0] - found[1]).norm()
    assert ends[AdAdaGradNorm] < 1e-9
    assert ends[AdAdaGrad] > 1e-3


def test_what_cannot_be_is_refused() -> None:
    net, rows = problem()
    with pytest.raises(ValueError, match="one number of rows, got"):
        per_sample_statistics(net, loss, [rows[0], rows[1][:3]])
    with pytest.raises(ValueError, match="one number of rows"):
        per_sample_statistics(net, loss, [r[:0] for r in rows])
    with pytest.raises(ValueError, match="chunk must be > 0"):
        per_sample_statistics(net, loss, rows, chunk=0)
    mixed = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(ValueError, match="'1' is batch norm in training mode"):
        per_sample_statistics(mixed, loss, rows)
    assert per_sample_statistics(mixed.eval(), loss, rows).noise > 0
    with pytest.raises(ValueError, match="no parameter requires"):
        per_sample_statistics(net.requires_grad_(False), loss, rows)
    found = single([torch.ones(3)], 4).merged(single([torch.zeros(3)], 4))
    with pytest.raises(ValueError, match="inner=True"):
        InnerProductTest().needed(found)
    with pytest.raises(ValueError, match="coordinates=True"):
        NormTest(0.1, "max").needed(found)
    for bad in ("mean", "quantile:2", "quantile"):
        with pytest.raises(ValueError, match="'max', 'tensor' or 'quantile:Q'"):
            NormTest(0.1, bad)
    for make in (
        lambda: NormTest(0.0),
        lambda: InnerProductTest(-1.0),
        lambda: InnerProductTest(1.0, nu=0.0),
    ):
        with pytest.raises(ValueError, match="must be > 0"):
            make()
    for options, text in (
        ({"batch_size": 1, "b_max": 8}, "begin with 2 or more"),
        ({"batch_size": 8, "b_max": 4}, "b_max must be at least"),
        ({"batch_size": 8, "b_max": 9, "max_growth": 1.0}, "max_growth must be > 1"),
        ({"batch_size": 8, "b_max": 9, "ema": 1.0}, "ema must be in"),
        ({"batch_size": 8, "b_max": 9, "interval": 0}, "interval must be > 0"),
        ({"batch_size": 8, "b_max": 9, "lr_scaling": "log"}, "unknown learning-rate scaling"),
        ({"batch_size": 2, "b_max": 3, "processes": 4}, "4 processes cannot share"),
    ):
        with pytest.raises(ValueError, match=text):
            BatchSizeController(NormTest(), **options)
