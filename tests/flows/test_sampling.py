import pytest
import torch
from torch import nn

from rectiflow.errors import BeyondDistilledStepsWarning
from rectiflow.flows import EDMPath, FlowModel, integrate, sample
from rectiflow.flows.sampling import device_of, draw_source


def model(**options):
    return FlowModel(lambda x, t: torch.cos(x), shape=(2,), **options)


def test_batches_change_nothing():
    first, second = (
        sample(model(), 10, batch_size=size, generator=torch.Generator().manual_seed(0))
        for size in (3, 1024)
    )
    torch.testing.assert_close(first, second)


def test_the_models_own_settings_are_used():
    source = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    own = model(sampling={"solver": "heun", "steps": 3})
    assert torch.equal(sample(own, source=source), integrate(own, source, 3, "heun"))
    found = sample(own, source=source, steps=[0.0, 0.3, 1.0], solver="euler")
    assert torch.equal(found, integrate(own, source, [0.0, 0.3, 1.0], "euler"))


def test_noises_are_scaled_by_the_path():
    still = FlowModel(lambda x, t: torch.zeros_like(x), EDMPath(), shape=(2,))
    torch.testing.assert_close(sample(still, source=torch.ones(1, 2)), torch.full((1, 2), 80.0))


def test_conditions_are_cut_with_the_batch():
    net = FlowModel(lambda x, t, label, scale: scale * label[:, None] * torch.ones_like(x))
    label = torch.arange(5.0)
    found = sample(net, source=torch.zeros(5, 1), batch_size=2, steps=1, label=label, scale=2)
    torch.testing.assert_close(found, 2 * label[:, None])
    with pytest.raises(ValueError, match="condition 'label' must have one row for each of the 4"):
        sample(net, source=torch.zeros(4, 1), label=label, scale=2)


def test_modules_are_evaluated_and_put_back():
    net = nn.Module()
    net.drop, net.seen = nn.Dropout(), []
    net.forward = lambda x, t: net.seen.append(net.drop.training) or x
    wrapped = FlowModel(net, shape=(2,))
    assert not sample(wrapped, 2, steps=1).requires_grad
    assert net.seen == [False]
    assert net.drop.training


def test_progress_counts_samples():
    done = []
    sample(model(), 5, batch_size=2, steps=1, progress=done.append)
    assert done == [2, 4, 5]


def test_sources_come_from_the_generator():
    wanted = torch.randn(3, 2, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_source(model(), 3, generator=torch.Generator().manual_seed(7)), wanted)
    assert device_of(nn.Linear(1, 1)).type == "cpu"


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="give count or source"):
        sample(model())
    with pytest.raises(ValueError, match="count is 3 but source holds 2 noises"):
        sample(model(), 3, source=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        sample(model(), 3, batch_size=0)
    with pytest.raises(ValueError, match="count must be >= 1"):
        sample(model(), 0)
    with pytest.raises(ValueError, match="does not know its sample shape"):
        sample(FlowModel(lambda x, t: x), 2)


@pytest.mark.parametrize("times", [3, [0.0, 0.3, 0.6, 1.0]])
def test_more_steps_than_a_model_was_made_for_are_warned_of(times):
    made = model(sampling={"solver": "euler", "steps": 2, "made_for": 2})
    with pytest.warns(BeyondDistilledStepsWarning, match="distilled to 2 steps .* with 3"):
        sample(made, 1, steps=times)


def test_as_many_steps_as_a_model_was_made_for_are_not(recwarn):
    made = model(sampling={"solver": "euler", "steps": 2, "made_for": 2})
    for steps in (None, 1, 2):
        sample(made, 1, steps=steps)
    assert not recwarn
