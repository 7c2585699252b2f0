"""Pair stores: rows come back as written, and nothing damaged or swapped is trained on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from rectiflow.errors import PairStoreError
from rectiflow.flows import DormandPrince, PairStore, StoredPairs
from rectiflow.flows.couplings import Draw
from rectiflow.flows.pair_format import (
    STORE,
    PairSettings,
    describe_solver,
    normal_sources,
    read_shard,
    shard_file,
    solver_of,
    write_settings,
    write_shard,
)

COUNT, SHARD = 100, 16


def write(folder, settings=None, *, swapped=False, skip=(), complete=True):
    """A store whose targets are 3 times the sources, and the tensors in it."""
    settings = settings or PairSettings(
        count=COUNT,
        shard_size=SHARD,
        shape=(2, 3),
        conditions={"label": {"dtype": "int64", "shape": []}},
        teacher={"sha256": "a" * 64, "lineage": []},
    )
    sources, digests = [], []
    for shard in range(settings.shards):
        source = normal_sources(settings, shard)
        sources.append(source)
        label = torch.arange(len(source)) + shard * settings.shard_size
        condition = {"label": label} if settings.conditions else {}
        ends = (3 * source, source) if swapped else (source, 3 * source)
        if shard not in skip:
            write_shard(folder, settings, shard, *ends, condition)
            digests.append(read_shard(folder, settings, shard)[1]["sha256"])
    write_settings(folder, settings, digests=digests if complete and not skip else None)
    return settings, torch.cat(sources)


@pytest.fixture
def written(tmp_path):
    return tmp_path, *write(tmp_path)


def test_rows_equal_the_written_tensors_in_any_order(written):
    folder, _, sources = written
    store = PairStore(folder)
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, COUNT, (300,), generator=generator)
    source, target, condition = store.rows(indices)
    torch.testing.assert_close(source, sources[indices], rtol=0, atol=0)
    torch.testing.assert_close(target, 3 * sources[indices], rtol=0, atol=0)
    assert torch.equal(condition["label"], indices)
    assert (len(store), store.complete, store.missing) == (COUNT, True, [])
    assert store.rows(torch.tensor([], dtype=torch.int64))[0].shape == (0, 2, 3)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_seeds_give_the_noises_that_would_have_been_stored(tmp_path, cache_bytes):
    settings = PairSettings(count=COUNT, shard_size=SHARD, shape=(3,), store="seed")
    _, sources = write(tmp_path, settings)
    store = PairStore(tmp_path, cache_bytes=cache_bytes)
    everything = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    assert torch.equal(store.rows(everything)[0], sources[everything])
    # What is kept is bounded by the given memory, one shard at least.
    assert len(store._drawn) == (1 if cache_bytes == 0 else settings.shards)


def test_another_random_generator_is_noticed(tmp_path, monkeypatch):
    write(tmp_path, PairSettings(count=COUNT, shard_size=SHARD, shape=(3,), store="seed"))
    from rectiflow.flows import pair_store

    monkeypatch.setattr(
        pair_store, "normal_sources", lambda settings, shard: normal_sources(settings, shard) + 1
    )
    with pytest.raises(PairStoreError, match="cannot be drawn again"):
        PairStore(tmp_path).rows(torch.tensor([0]))


def test_half_precision_targets_read_as_float32(tmp_path):
    settings = PairSettings(count=COUNT, shard_size=SHARD, shape=(3,), dtype="float16")
    _, sources = write(tmp_path, settings)
    source, target, _ = PairStore(tmp_path).rows(torch.arange(COUNT))
    assert target.dtype == torch.float32
    assert torch.equal(source, sources)
    # Half precision rounds to 11 bits.
    torch.testing.assert_close(target, 3 * sources, rtol=2**-11, atol=0)


def test_an_epoch_takes_every_pair_once_and_never_re_pairs(written):
    folder, _, _ = written
    coupling = StoredPairs(folder, expects="a" * 64)
    seen = []
    for step in range(2 * COUNT // 20):
        pairs = coupling.draw(Draw.of(20, step=step, seed=5))
        torch.testing.assert_close(pairs.target, 3 * pairs.source, rtol=0, atol=0)
        seen.append(pairs.condition["label"])
    first, second = torch.cat(seen).view(2, COUNT)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(COUNT))
    assert not torch.equal(first, second)


def test_pairs_of_another_teacher_are_refused(written):
    with pytest.raises(PairStoreError, match="made by a teacher with weights aaaa"):
        StoredPairs(written[0], expects="b" * 64)


def test_swapped_ends_are_refused(tmp_path):
    write(tmp_path, swapped=True)
    with pytest.raises(PairStoreError, match="look swapped"):
        PairStore(tmp_path)


def test_standardised_data_in_place_of_noise_are_refused(tmp_path):
    settings = PairSettings(count=256, shard_size=256, shape=(4,))
    noise = normal_sources(settings, 0)
    # Mean 0 and standard deviation 1 over all, but not in each dimension.
    scales = torch.tensor([0.2, 0.2, 1.4, 1.4])
    write_shard(tmp_path, settings, 0, noise * scales, noise, {})
    write_settings(tmp_path, settings)
    with pytest.raises(PairStoreError, match="look swapped"):
        PairStore(tmp_path)
    # Sources that are data on purpose (transfer) are not normal, and welcome.
    settings = replace(settings, source="data")
    write_shard(tmp_path, settings, 0, noise * scales, noise, {})
    write_settings(tmp_path, settings)
    assert PairStore(tmp_path).complete


def test_unfinished_stores_say_what_is_missing(tmp_path):
    write(tmp_path, skip=(1, 4))
    store = PairStore(tmp_path)
    assert (store.complete, store.missing) == (False, [1, 4])
    assert store.rows(torch.tensor([0]))[0].shape == (1, 2, 3)
    with pytest.raises(PairStoreError, match="lacks 2 of 7 shards"):
        store.rows(torch.tensor([SHARD]))
    with pytest.raises(PairStoreError, match="lacks 2 of 7 shards"):
        StoredPairs(store)


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-4])


def _flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda file: file.unlink(), "is missing"),
        (_truncate, "not those of its header"),
        (lambda file: file.write_bytes(b""), "is not a shard"),
        (lambda file: file.write_bytes(b"\xff" * 100), "is not a shard"),
        (_flip, "was changed"),
    ],
)
def test_damaged_shards_are_named(written, damage, message):
    folder, _, _ = written
    damage(shard_file(folder, 2))
    with pytest.raises(PairStoreError, match=rf"pairs-00002\.safetensors.*{message}"):
        PairStore(folder)


def test_shards_of_another_store_or_place_are_refused(written, tmp_path_factory):
    folder, settings, _ = written
    good = shard_file(folder, 2).read_bytes()
    shard_file(folder, 2).write_bytes(shard_file(folder, 1).read_bytes())
    with pytest.raises(PairStoreError, match="belongs to other pairs"):
        PairStore(folder)
    other = tmp_path_factory.mktemp("other")
    write(other, replace(settings, seed=1))
    shard_file(folder, 2).write_bytes(shard_file(other, 2).read_bytes())
    with pytest.raises(PairStoreError, match="belongs to other pairs"):
        PairStore(folder)
    shard_file(folder, 2).write_bytes(good)
    # A consistent shard that is not the one generated.
    write_shard(
        folder,
        settings,
        2,
        torch.randn(16, 2, 3),
        torch.randn(16, 2, 3),
        {"label": torch.zeros(16).long()},
    )
    with pytest.raises(PairStoreError, match="not the shard that was generated"):
        PairStore(folder)


@pytest.mark.parametrize("change", [{"format": 99}, {"settings": {}}, {"digests": []}])
def test_a_wrong_description_is_refused(written, change):
    folder = written[0]
    value = json.loads((folder / STORE).read_text())
    (folder / STORE).write_text(json.dumps({**value, **change}))
    with pytest.raises(PairStoreError, match=r"store\.json"):
        PairStore(folder)


def test_no_store_and_indices_outside(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="no pairs in"):
        PairStore(tmp_path / "nothing")
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match="numbered 0 to 99"):
            PairStore(written[0]).rows(torch.tensor([index]))


@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", DormandPrince(rtol=1e-4)])
def test_solvers_are_described_and_rebuilt(solver):
    described = json.loads(json.dumps(describe_solver(solver)))
    assert describe_solver(solver_of(described)) == described
    assert described["name"] == (solver if isinstance(solver, str) else "dopri5")
