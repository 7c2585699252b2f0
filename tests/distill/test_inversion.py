"""Stored pairs by inversion: those of the live coupling, resumable, gated."""

from __future__ import annotations

import pytest
import torch

from rectiflow.distill import Reflow, check_pairs, invert_pairs
from rectiflow.errors import PairQualityError, RunExistsError
from rectiflow.flows import FlowModel, PairStore, StoredPairs
from rectiflow.flows.couplings import TensorData
from rectiflow.flows.inverted_pairs import invert
from rectiflow.flows.pair_format import normal_sources, shard_file
from rectiflow.nets import build


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = build("mlp", shape=(3,), width=16, depth=1, zero=False, classes=2)
    return FlowModel(net, shape=(3,))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return TensorData(torch.randn(50, 3, generator=generator), {"label": torch.arange(50) % 2})


def test_rows_are_the_data_and_its_inversion(model, data, tmp_path):
    store = invert_pairs(model, tmp_path, data, steps=8, batch_size=7, shard_size=20)
    assert store.complete
    assert store.settings.source == "inverted"
    source, target, condition = PairStore(tmp_path).rows(torch.arange(50))
    assert torch.equal(target, data.values)
    assert torch.equal(condition["label"], data.conditions["label"])
    fresh = torch.cat([normal_sources(store.settings, shard) for shard in range(3)])
    wanted = invert(model, target, fresh, steps=8, **condition)
    torch.testing.assert_close(source, wanted)


def test_a_killed_run_goes_on_to_the_same_bytes(model, data, tmp_path):
    options = {"steps": 4, "shard_size": 20, "gate": None}
    invert_pairs(model, tmp_path / "a", data, **options)
    invert_pairs(model, tmp_path / "b", data, **options)
    shard_file(tmp_path / "b", 1).unlink()
    done = []
    invert_pairs(model, tmp_path / "b", data, progress=done.append, **options)
    assert done == [20, 40, 50]
    for shard in range(3):
        a, b = (shard_file(tmp_path / name, shard).read_bytes() for name in "ab")
        assert a == b
    with pytest.raises(RunExistsError, match="holds pairs made with seed=0, not seed=1"):
        invert_pairs(model, tmp_path / "b", data, seed=1, **options)


def test_the_store_serves_reflow_and_the_pair_check(model, data, tmp_path):
    store = invert_pairs(model, tmp_path, data, steps=16)
    pairs = StoredPairs(store, expects=store.settings.teacher["sha256"])
    assert Reflow(model, pairs).coupling is pairs
    assert check_pairs(model, store).accepted


def test_coarse_solvers_are_refused(data, tmp_path):
    stiff = FlowModel(lambda x, t, label: -6 * x, shape=(3,))
    with pytest.raises(PairQualityError, match="targets differ from a finer solver's"):
        invert_pairs(stiff, tmp_path, data, steps=3, solver="euler")


def test_forward_only_solvers_are_refused(model, data, tmp_path):
    with pytest.raises(ValueError, match="forward in time only"):
        invert_pairs(model, tmp_path, data, solver="reinterpolate")


def test_bad_arguments(model, data, tmp_path):
    with pytest.raises(ValueError, match="count must be from 1 to the 50 samples, got 51"):
        invert_pairs(model, tmp_path, data, count=51)
    with pytest.raises(ValueError, match="batch_size must be > 0"):
        invert_pairs(model, tmp_path, data, batch_size=0)
    with pytest.raises(ValueError, match="does not know its sample shape"):
        invert_pairs(FlowModel(model.net), tmp_path, data)
    with pytest.raises(ValueError, match=r"takes x of shape|states must have shape"):
        invert_pairs(model, tmp_path, torch.zeros(5, 4))
