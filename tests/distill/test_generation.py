"""Pair generation: the plain loop's results, however it is cut, killed or shared."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rectiflow.distill import PairGate, generate_pairs
from rectiflow.errors import PairQualityError, RunExistsError
from rectiflow.files import digest
from rectiflow.flows import FlowModel, StoredPairs, integrate
from rectiflow.flows.artifact import identity
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.flows.pair_format import normal_sources, shard_file

STRESS = Path(__file__).parents[1] / "stress" / "kill_pairs.py"


class Bend(nn.Module):
    """A curved field with weights, shifted by the label if there is one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, label=None):
        shift = 0.0 if label is None else label[:, None].float()
        return self.dropout(torch.tanh(self.layer(x)) * (1 + t[:, None])) + shift


@pytest.fixture
def model():
    return FlowModel(Bend().train(), shape=(6,), lineage=[{"method": "test"}])


@pytest.fixture
def labels():
    return TensorData(torch.zeros(30, 1), {"label": torch.arange(30) % 3})


def contents(folder):
    """Names and digests of the files in a folder, hidden ones included."""
    return {
        name: hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()
        for name in sorted(os.listdir(folder))
    }


def test_equals_a_plain_loop_bit_for_bit(model, tmp_path):
    options = {"batch_size": 8, "shard_size": 20, "seed": 3, "gate": None}
    store = generate_pairs(model, tmp_path, 50, steps=7, **options)
    assert model.net.training  # as it was found
    model.eval()
    targets = []
    for shard in range(3):
        noise = normal_sources(store.settings, shard)
        with torch.no_grad():
            targets += [integrate(model, part, 7, "euler") for part in noise.split(8)]
    source, target, condition = store.rows(torch.arange(50))
    assert torch.equal(target, torch.cat(targets))
    assert condition == {}
    # Shards do not repeat each other's noise.
    assert source.unique(dim=0).shape[0] == 50


def test_seeds_and_noises_are_equal_stores(model, tmp_path):
    a = generate_pairs(model, tmp_path / "a", 50, steps=20, shard_size=20)
    b = generate_pairs(model, tmp_path / "b", 50, steps=20, shard_size=20, store="seed")
    for x, y in zip(a.rows(torch.arange(50))[:2], b.rows(torch.arange(50))[:2]):
        assert torch.equal(x, y)
    assert shard_file(b.folder, 0).stat().st_size < 0.75 * shard_file(a.folder, 0).stat().st_size


def test_processes_make_together_what_one_makes_alone(model, labels, tmp_path):
    options = {"steps": 20, "shard_size": 8, "conditions": labels}
    generate_pairs(model, tmp_path / "one", 60, **options)
    for index in (2, 0, 1):
        store = generate_pairs(
            model, tmp_path / "three", 60, process_index=index, process_count=3, **options
        )
        assert store.complete == (index == 1)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_conditions_follow_the_data_and_reach_the_teacher(model, labels, tmp_path):
    store = generate_pairs(model, tmp_path, 60, steps=20, shard_size=16, conditions=labels)
    source, target, condition = store.rows(torch.arange(60))
    # Two epochs of 30 rows with ten of each label.
    assert torch.bincount(condition["label"]).tolist() == [20, 20, 20]
    with torch.no_grad():
        again = integrate(model.eval(), source, 20, label=condition["label"])
    # Another batch size may round differently.
    torch.testing.assert_close(target, again, rtol=1e-5, atol=1e-5)
    pairs = StoredPairs(store, expects=identity(model)).draw(Draw.of(10))
    assert set(pairs.condition) == {"label"}


def test_sources_from_data(model, tmp_path):
    data = TensorData(torch.rand(40, 6))
    store = generate_pairs(model, tmp_path, 40, steps=20, shard_size=16, source=data)
    source = store.rows(torch.arange(40))[0]
    assert sorted(source.tolist()) == sorted(data.values.tolist())


def test_half_precision_targets(model, tmp_path):
    full = generate_pairs(model, tmp_path / "a", 40, steps=20)
    half = generate_pairs(model, tmp_path / "b", 40, steps=20, dtype=torch.float16)
    a, b = full.rows(torch.arange(40))[1], half.rows(torch.arange(40))[1]
    # Half precision rounds to 11 bits; 6e-8 is its smallest step.
    torch.testing.assert_close(b, a, rtol=2**-11, atol=6e-8)
    assert not torch.equal(a, b)


def test_a_guided_field_is_followed_and_noted(model, tmp_path):
    class Faster:
        def __init__(self):
            self.scale = 2.0

        def __call__(self, x, t):
            return 0 * x + self.scale

    store = generate_pairs(model, tmp_path, 40, steps=4, field=Faster())
    source, target, _ = store.rows(torch.arange(40))
    torch.testing.assert_close(target, source + 2)
    assert store.settings.guidance.endswith("Faster(scale=2.0)")


def test_the_teacher_is_named_by_its_saved_weights(model, tmp_path):
    store = generate_pairs(model, tmp_path / "pairs", 8, steps=20)
    model.save_pretrained(tmp_path / "model")
    stated = store.settings.teacher
    assert stated["sha256"] == digest(tmp_path / "model" / "model.safetensors")
    assert stated["lineage"] == [{"method": "test"}]


def test_finished_shards_are_kept_and_damaged_ones_remade(model, tmp_path):
    options = {"steps": 20, "shard_size": 10}
    generate_pairs(model, tmp_path, 40, **options)
    before = contents(tmp_path)
    times = {i: shard_file(tmp_path, i).stat().st_mtime_ns for i in range(4)}
    shard_file(tmp_path, 1).unlink()
    damaged = shard_file(tmp_path, 2)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / ".pairs-00001.safetensors.abc").write_bytes(b"half")
    done = []
    assert generate_pairs(model, tmp_path, 40, progress=done.append, **options).complete
    assert contents(tmp_path) == before
    assert done == [30, 40]
    assert [shard_file(tmp_path, i).stat().st_mtime_ns == times[i] for i in range(4)] == [
        True, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"steps": 21}, {"seed": 1}, {"solver": "heun"}, {"store": "seed"}, {"count": 41}]
)
def test_other_settings_are_refused_unless_overwritten(model, tmp_path, change):
    options = {"count": 40, "steps": 20}
    generate_pairs(model, tmp_path, **options)
    with pytest.raises(RunExistsError, match="holds pairs made with"):
        generate_pairs(model, tmp_path, **{**options, **change})
    store = generate_pairs(model, tmp_path, **{**options, **change}, overwrite=True)
    assert store.complete


def test_another_teacher_is_refused(model, tmp_path):
    generate_pairs(model, tmp_path, 40, steps=20)
    with torch.no_grad():
        model.net.layer.bias.add_(1)
    with pytest.raises(RunExistsError, match="another teacher"):
        generate_pairs(model, tmp_path, 40, steps=20)


def test_a_full_disk_keeps_what_is_finished(model, tmp_path, monkeypatch):
    options = {"steps": 20, "shard_size": 10}
    generate_pairs(model, tmp_path / "whole", 40, **options)
    real, calls = Path.write_bytes, []

    def full(path, content):
        calls.append(path)
        if len(calls) > 2:
            real(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="finished shards are kept") as caught:
        generate_pairs(model, tmp_path / "part", 40, **options)
    assert caught.value.errno == errno.ENOSPC
    names = ["pairs-00000.safetensors", "pairs-00001.safetensors", "store.json"]
    assert sorted(os.listdir(tmp_path / "part")) == names
    monkeypatch.undo()
    generate_pairs(model, tmp_path / "part", 40, **options)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_non_finite_results_are_refused(tmp_path):
    # A hole that the gate's pairs miss: only large noises fall into it.
    hole = FlowModel(lambda x, t: torch.where(x > 3.2, torch.inf, 0.0), shape=(2,))
    gate = PairGate(pairs=4)
    with pytest.raises(PairQualityError, match="not finite in float32"):
        generate_pairs(hole, tmp_path, 20_000, steps=1, gate=gate)


def test_a_coarse_solver_is_refused_before_anything_is_written(tmp_path):
    curved = FlowModel(lambda x, t: 4 * torch.stack([-x[:, 1], x[:, 0]], 1), shape=(2,))
    with pytest.raises(PairQualityError, match="more steps or solver='dopri5'"):
        generate_pairs(curved, tmp_path, 1000, steps=2)
    assert os.listdir(tmp_path) == ["store.json"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "count must be > 0"),
        ({"batch_size": 0}, "batch_size must be > 0"),
        ({"shard_size": -1}, "shard_size must be > 0"),
        ({"process_index": 2, "process_count": 2}, "process_index must be 0 to 1"),
        ({"overwrite": True, "process_count": 2}, "delete the folder first"),
        ({"solver": "sde"}, "take an ODE solver"),
        ({"solver": "oiler"}, "did you mean 'euler'"),
        ({"store": "noises"}, "did you mean 'noise'"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"steps": [0.0, 0.5]}, "must go from 0 to 1"),
        ({"store": "seed", "source": TensorData(torch.zeros(3, 6))}, "cannot be drawn from a seed"),
        ({"source": TensorData(torch.zeros(3, 5))}, "sources have shape"),
    ],
)
def test_bad_arguments_say_what_to_do(model, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        generate_pairs(model, tmp_path, **{"count": 10, **change})


def test_half_precision_teachers_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"call model\.float\(\) first"):
        generate_pairs(model.bfloat16(), tmp_path, 10)


def test_killed_runs_end_with_the_same_bytes():
    command = [sys.executable, str(STRESS), "--kills", "3", "--shards", "60"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("3 kills")
