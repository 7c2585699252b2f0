import json
import re

import pytest
import torch
from torch import nn

from rectiflow import __version__, nets
from rectiflow.errors import ModelFolderError
from rectiflow.files import digest
from rectiflow.flows import EDMPath, FlowModel
from rectiflow.flows.artifact import identity


class Tiny(nn.Module):
    """A net with a name and a config, as the registry asks for."""

    name = "tiny-for-tests"

    def __init__(self, *, width=3):
        super().__init__()
        self.config = {"width": width}
        self.layer = nn.Linear(width, width)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x, t):
        return self.layer(x) * t[:, None]


nets.register(Tiny.name, Tiny, replace=True)


def saved(tmp_path, net=None, **options):
    model = FlowModel(
        net if net is not None else Tiny(),
        EDMPath(sigma_max=10.0),
        "noise",
        shape=(3,),
        sampling={"solver": "heun", "steps": 7},
        data={"name": "toys"},
        lineage=[{"method": "flow-matching", "steps": 5}, {"method": "reflow", "round": 1}],
        **options,
    )
    return model, model.save_pretrained(tmp_path / "model")


def change(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    config.update(entries)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, message, kind=ModelFolderError, **options):
    """The folder is refused by exactly this sentence."""
    with pytest.raises(kind) as caught:
        FlowModel.from_pretrained(folder, **options)
    assert str(caught.value) == message
    assert "\n" not in message


def test_round_trip_is_equal_to_the_bit(tmp_path):
    model, folder = saved(tmp_path)
    state = torch.random.get_rng_state()
    again = FlowModel.from_pretrained(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], tensor)
    for name in ("path", "prediction", "shape", "sampling", "data", "lineage"):
        assert getattr(again, name) == getattr(model, name)
    x, t = torch.randn(4, 3), torch.rand(4)
    assert torch.equal(again.velocity(x, t), model.velocity(x, t))
    assert not again.training
    assert identity(again) == identity(model)
    assert identity(FlowModel(Tiny())) != identity(model)
    second = again.save_pretrained(tmp_path / "second")
    for file in folder.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


def test_config_and_card_tell_what_it_is(tmp_path):
    _, folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["rectiflow"] == __version__
    assert config["net"] == {"name": "tiny-for-tests", "config": {"width": 3}}
    assert config["sha256"] == digest(folder / "model.safetensors")
    card = (folder / "README.md").read_text()
    for line in ("# A flow on toys", "1. **flow-matching** (steps: 5)", "2. **reflow** (round: 1)"):
        assert line in card.splitlines()


def test_folders_are_never_overwritten_silently(tmp_path):
    model, folder = saved(tmp_path)
    with pytest.raises(FileExistsError, match="exists: choose another folder or pass overwrite"):
        model.save_pretrained(folder)
    model.lineage = []
    model.save_pretrained(folder, overwrite=True)
    assert FlowModel.from_pretrained(folder).lineage == []
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model(tmp_path):
    model, folder = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model.data = {"score": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        model.save_pretrained(folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_own_networks_are_given_back_by_their_owner(tmp_path):
    net = nn.Linear(3, 3)
    _, folder = saved(tmp_path, net)
    refused(
        folder,
        f"{folder} was saved from a network of your own (Linear): pass it as "
        "from_pretrained(..., net=...)",
    )
    other = nn.Linear(3, 3)
    assert FlowModel.from_pretrained(folder, net=other).net is other
    assert torch.equal(other.weight, net.weight)


def test_tied_weights_survive(tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    _, folder = saved(tmp_path, net)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    FlowModel.from_pretrained(folder, net=other)
    assert torch.equal(other[1].weight, net[0].weight)


def test_functions_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="only networks that are torch modules can be saved"):
        FlowModel(lambda x, t: x).save_pretrained(tmp_path / "model")


def test_missing_weights(tmp_path):
    _, folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    refused(folder, f"{folder} has no model.safetensors: the folder is incomplete, copy it anew")


def test_pickles_are_refused_and_never_read(tmp_path):
    _, folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "weights.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(
        folder,
        f"{folder} holds pickled weights (weights.pt), which can run code when read and are "
        "refused: save the model as model.safetensors",
    )


@pytest.mark.parametrize("damage", ["truncated", "tampered"])
def test_changed_weights(tmp_path, damage):
    _, folder = saved(tmp_path)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "tampered":
        content[-1] ^= 1
    file.write_bytes(content[:-4] if damage == "truncated" else content)
    refused(
        folder,
        f"{file} is not the file that config.json describes (SHA-256 differs): it is truncated "
        "or was changed, copy the folder anew",
    )


def test_weights_that_are_no_safetensors(tmp_path):
    _, folder = saved(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(b"rubbish")
    change(folder, sha256=digest(file))
    with pytest.raises(ModelFolderError, match=f"^{re.escape(str(file))} cannot be read "):
        FlowModel.from_pretrained(folder)


def test_weights_of_another_shape_or_another_net(tmp_path):
    _, folder = saved(tmp_path)
    change(folder, net={"name": Tiny.name, "config": {"width": 4}})
    with pytest.raises(ModelFolderError, match=r"does not fit its network: layer\.\w+ is \(3,"):
        FlowModel.from_pretrained(folder)
    refused(
        folder,
        f"{folder / 'model.safetensors'} does not fit its network: 0 tensors are missing and 1 "
        "are unknown, such as count",
        net=nn.ModuleDict({"layer": nn.Linear(3, 3)}),
    )


def test_unknown_parts_of_the_config(tmp_path):
    _, folder = saved(tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(folder, path={"name": "straight"})
    with pytest.raises(
        ModelFolderError, match=r"config\.json describes no model: unknown path 'str"
    ):
        FlowModel.from_pretrained(folder)
    change(folder, path={"name": "vp", "c": 1.0})
    refused(folder, f"{file} describes no model: path 'vp' takes a, b, got c")
    change(folder, path={})
    refused(folder, f"{file} lacks the name of its path: restore the file")
    change(folder, path=config["path"], prediction="epsilon")
    with pytest.raises(ModelFolderError, match="describes no model: unknown prediction 'epsilon'"):
        FlowModel.from_pretrained(folder)
    change(folder, prediction="noise", net={"name": "tiny-for-test", "config": {}})
    with pytest.raises(ModelFolderError, match="describes no network: unknown net 'tiny-for-test'"):
        FlowModel.from_pretrained(folder)
    change(folder, net={"name": Tiny.name, "config": {"depth": 3}})
    with pytest.raises(ModelFolderError, match="describes no network: net 'tiny-for-tests' has no"):
        FlowModel.from_pretrained(folder)
    change(folder, net={"name": Tiny.name, "config": 3})
    with pytest.raises(ModelFolderError, match=r"describes no network: .* must be a mapping"):
        FlowModel.from_pretrained(folder)


def test_formats_of_the_future(tmp_path):
    _, folder = saved(tmp_path)
    change(folder, format=2)
    refused(
        folder,
        f"{folder / 'config.json'} has format 2, this version reads up to 1: update rectiflow",
    )


def test_configs_that_are_missing_or_damaged(tmp_path):
    _, folder = saved(tmp_path)
    file = folder / "config.json"
    change(folder, sha256=5)
    refused(folder, f"{file} lacks a valid 'sha256': restore the file")
    file.write_text("[]")
    refused(folder, f"{file} must hold a table, got list")
    file.write_text('{"format": 1')
    with pytest.raises(ModelFolderError, match=r"config.json is not valid JSON \(.*; restore or"):
        FlowModel.from_pretrained(folder)
    file.unlink()
    refused(folder, f"{folder} has no config.json: it is not a rectiflow model folder")


def test_no_folder(tmp_path):
    missing = tmp_path / "nowhere"
    refused(
        missing,
        f"no model folder at {missing} (a folder with config.json and model.safetensors, or "
        "owner/name on the Hub)",
        FileNotFoundError,
    )
