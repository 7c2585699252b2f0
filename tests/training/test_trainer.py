"""The trainer against a hand-written loop, against itself resumed, and against faults."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rectiflow.errors import NonFiniteLossError
from rectiflow.flows import FlowModel, Independent, PseudoHuber
from rectiflow.flows.couplings import Draw, TensorData
from rectiflow.nets import build
from rectiflow.training import (
    EMA,
    FlowMatching,
    OptimizerSettings,
    Phase,
    Trainer,
    TrainerSettings,
    checkpoints,
    optimizers,
)
from rectiflow.training.records import read_log
from rectiflow.training.sessions import train_model
from rectiflow.training.trainer import widest

DATA = torch.randn(200, 2, generator=torch.Generator().manual_seed(5)) + 1


def make_model(dropout: float = 0.0) -> FlowModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = build("mlp", shape=(2,), width=16, depth=1, dropout=dropout, zero=False)
    return FlowModel(net, shape=(2,))


def settings(steps: int = 12, **changes) -> TrainerSettings:
    options = {"batch_size": 16, "checkpoint_every": 5, "log_every": 3, "ema": 0.99}
    return TrainerSettings(steps=steps, **{**options, **changes})


def train(
    steps: int = 12, folder: Path | None = None, resume: bool = False, **changes
) -> FlowModel:
    method = FlowMatching(make_model(), Independent(DATA))
    return Trainer(method, settings(steps, **changes), folder=folder).fit(resume=resume)


def weights(model: FlowModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_equals_a_hand_written_loop():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    average = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator()
    for step in range(12):
        draw = Draw.of(16, step=step, seed=0, generator=generator)
        pairs = Independent(DATA).draw(draw)
        t = torch.rand(16, generator=generator)
        x = t[:, None] * pairs.target + (1 - t[:, None]) * pairs.source
        loss = (model.net(x, t) - (pairs.target - pairs.source)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.99, (1 + step) / (10 + step))
        for a, p in zip(average, model.parameters()):
            a.mul_(decay).add_(p.detach(), alpha=1 - decay)
    trained = train(optim=OptimizerSettings(learning_rate=1e-2))
    expected = torch.cat([a.flatten() for a in average])
    # The fused optimizer and foreach lerp round differently from the plain loop.
    torch.testing.assert_close(weights(trained), expected, rtol=1e-5, atol=1e-6)


def test_accumulation_equals_one_large_batch():
    whole = train(batch_size=32)
    parts = train(batch_size=8, accumulate=4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    def interrupt(trainer: Trainer, step: int) -> None:
        if step == stop + 1:
            raise RuntimeError("pulled the plug")

    # Dropout draws from torch's own generator, whose state the checkpoint has to carry.
    def fit(folder, callbacks=(), resume=False):
        torch.manual_seed(11)
        method = FlowMatching(make_model(dropout=0.2), Independent(DATA))
        options = settings(checkpoint_every=1, optim=OptimizerSettings(schedule="cosine", warmup=3))
        return Trainer(method, options, folder=folder, callbacks=callbacks).fit(resume=resume)

    expected = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="plug"):
        fit(tmp_path / "cut", callbacks=[interrupt])
    torch.manual_seed(99)
    resumed = fit(tmp_path / "cut", resume=True)
    assert torch.equal(weights(resumed), weights(expected))
    whole = [row["step"] for row in read_log(tmp_path / "whole/metrics.jsonl")]
    assert [row["step"] for row in read_log(tmp_path / "cut/metrics.jsonl")] == whole


@pytest.mark.parametrize("name", sorted(set(optimizers._BUILDERS) - {"adam"}))
def test_every_optimizer_resumes_bit_for_bit(tmp_path, name):
    optim = OptimizerSettings(name=name, learning_rate=1e-2, clip_coordinates=0.1)
    options = {"optim": optim, "checkpoint_every": 4}
    expected = train(8, folder=tmp_path / "whole", **options)
    train(4, folder=tmp_path / "cut", **options)
    resumed = train(8, folder=tmp_path / "cut", resume=True, **options)
    assert torch.equal(weights(resumed), weights(expected))
    assert not torch.equal(weights(resumed), weights(make_model()))


@pytest.mark.parametrize("name", ["sophiag", "sophiah"])
def test_curvature_does_not_depend_on_micro_batches(name):
    # A refresh at steps 0, 3 and 6; targets and probes are drawn for the whole step.
    optim = OptimizerSettings(name, learning_rate=1e-2, curvature_every=3, clip_norm=0.0)
    whole = train(8, batch_size=32, optim=optim)
    parts = train(8, batch_size=8, accumulate=4, optim=optim)
    # Squares of gradients double their rounding; the first steps are signs, which none may flip.
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)


def test_curvature_is_that_of_drawn_targets():
    method = FlowMatching(make_model(), Independent(DATA))
    optim = OptimizerSettings("sophiag", curvature_every=2, clip_norm=0.0, learning_rate=1e-3)
    trainer = Trainer(method, settings(1, optim=optim))
    before = [p.detach().clone() for p in method.model.parameters()]
    trainer.fit()
    state = trainer._optimizers[0].optimizer.state
    found = [state[p]["hessian"].clone() for p in method.model.parameters()]
    for p, old in zip(method.model.parameters(), before):
        p.data.copy_(old)
    # By hand: targets around the outputs with the variance that makes half a mean of n squares a
    # unit-variance likelihood, squared mean gradient times the number of rows, one part in 100.
    draw = Draw.of(16, step=0, seed=0)
    pairs = Independent(DATA).draw(draw)
    t = torch.rand(16, generator=draw.generator)
    output = method.model(t[:, None] * pairs.target + (1 - t[:, None]) * pairs.source, t)
    target = output.detach() + draw.normal((2,))
    loss = (output - target).square().mean()
    grads = torch.autograd.grad(loss, list(method.model.parameters()))
    for h, grad in zip(found, grads):
        torch.testing.assert_close(h, 0.01 * 16 * grad.square(), rtol=1e-4, atol=1e-9)


class Normalised(nn.Module):
    """A field with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.norm(x))


class Attending(nn.Module):
    """A field that attends to the rows of its input, by torch's fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.out = nn.Linear(2, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        q, k, v = self.inward(x)[None, None].chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[0, 0])


@pytest.mark.parametrize("name", ["sophiag", "sophiah"])
def test_curvature_leaves_running_statistics_alone(name):
    found = []
    for optimizer in ("adam", name):
        torch.manual_seed(0)
        net = Normalised()
        method = FlowMatching(FlowModel(net, shape=(2,)), Independent(DATA))
        Trainer(method, settings(1, optim=OptimizerSettings(optimizer, curvature_every=1))).fit()
        found.append(net.norm.running_mean)
    assert float(found[0].norm()) > 0
    assert torch.equal(*found)


def test_curvature_goes_through_fused_attention():
    torch.manual_seed(0)
    net = Attending()
    method = FlowMatching(FlowModel(net, shape=(2,)), Independent(DATA))
    trainer = Trainer(method, settings(1, optim=OptimizerSettings("sophiah", curvature_every=1)))
    trainer.fit()
    state = trainer._optimizers[0].optimizer.state
    assert float(state[net.inward.weight]["hessian"].abs().sum()) > 0


def test_sophia_reports_the_share_of_unclipped_weights(tmp_path):
    optim = OptimizerSettings("sophiag", gamma=1e6, curvature_every=1)
    train(6, folder=tmp_path, checkpoint_every=6, optim=optim)
    shares = [row["win_rate"] for row in read_log(tmp_path / "metrics.jsonl")]
    # With so much curvature only weights without a gradient are not inside.
    assert len(shares) == 2
    assert min(shares) > 0.9


def test_sophia_is_refused_where_it_cannot_see_the_curvature():
    robust = FlowMatching(make_model(), Independent(DATA), premetric=PseudoHuber())
    with pytest.raises(ValueError, match=r"flow loss is not the squared error.*take sophiah"):
        Trainer(robust, settings(optim=OptimizerSettings("sophiag")))
    plain = FlowMatching(make_model(), Independent(DATA))
    with pytest.raises(ValueError, match=r"second derivatives.*leave --compile out"):
        Trainer(plain, settings(compile=True, optim=OptimizerSettings("sophiah")))


def test_resume_refuses_other_batches(tmp_path):
    train(folder=tmp_path)
    with pytest.raises(ValueError, match="batch over all processes is 16, now 8"):
        train(20, folder=tmp_path, resume=True, batch_size=8)
    with pytest.raises(ValueError, match="seed is 0, now 1"):
        train(20, folder=tmp_path, resume=True, seed=1)


def test_overwritten_run_goes_on_as_itself(tmp_path):
    """A long run, overwritten by another that is cut and resumed, leaves nothing of itself."""

    def fit(folder, *, seed, steps=12, resume=False, cut=False):
        def pull(trainer: Trainer, step: int) -> None:
            if step == 7:
                raise RuntimeError("pulled the plug")

        method = FlowMatching(make_model(), Independent(DATA))
        return train_model(
            method,
            settings(steps, seed=seed),
            folder,
            entry={"method": "flow"},
            resume=resume,
            callbacks=[pull] if cut else [],
        )

    expected = fit(tmp_path / "whole", seed=1)
    fit(tmp_path / "run", seed=0, steps=30)
    with pytest.raises(RuntimeError, match="plug"):
        fit(tmp_path / "run", seed=1, cut=True)
    assert not (tmp_path / "run/model").exists()
    assert [s for s, _ in checkpoints.list_checkpoints(tmp_path / "run/checkpoints")] == [5]
    resumed = fit(tmp_path / "run", seed=1, resume=True)
    assert torch.equal(weights(resumed), weights(expected))
    assert resumed.lineage[-1]["steps"] == 12
    assert [row["step"] for row in read_log(tmp_path / "run/metrics.jsonl")][-1] == 12


def test_checkpoints_of_later_steps_go(tmp_path):
    for step in (3000, 4000):
        checkpoints.write(tmp_path, step, {"step": step})
    for step in (500, 1000, 1500):
        checkpoints.write(tmp_path, step, {"step": step})
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [1000, 1500]


def test_half_written_checkpoints_are_swept(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in (".step-00000005.pt.x1y2z3", "notes.txt"):
        (folder / name).write_text("part")
    train(folder=tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["notes.txt", "step-00000010.pt", "step-00000012.pt"]


def test_weights_that_no_loss_uses_do_not_hinder_a_resume(tmp_path):
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.used(x)

    def fit(steps, folder, resume=False):
        torch.manual_seed(0)
        method = FlowMatching(FlowModel(Spare(), shape=(2,)), Independent(DATA))
        options = settings(steps, optim=OptimizerSettings(learning_rate=1e-2))
        return weights(Trainer(method, options, folder=folder).fit(resume=resume))

    expected = fit(8, tmp_path / "whole")
    fit(4, tmp_path / "cut")
    assert torch.equal(fit(8, tmp_path / "cut", resume=True), expected)


def test_gradients_are_unscaled_once_a_step(monkeypatch):
    for fraction in (0.1, 0.0):
        optim = OptimizerSettings(clip_coordinates=fraction)
        trainer = Trainer(FlowMatching(make_model(), Independent(DATA)), settings(1, optim=optim))
        calls = []
        monkeypatch.setattr(trainer.accelerator, "unscale_gradients", lambda: calls.append(1))  # noqa: B023
        trainer.fit()
        # A gradient scaler refuses a second time.
        assert calls == [1]


def test_sums_are_as_wide_as_the_device_allows():
    # Apple's GPUs have no float64.
    assert widest(torch.device("mps")) is torch.float32
    assert widest(torch.device("cpu")) is torch.float64


def test_nan_in_the_data_stops_with_its_place(tmp_path):
    data = DATA.clone()
    data[17, 1] = float("nan")
    method = FlowMatching(make_model(), Independent(data))
    trainer = Trainer(method, settings(40, checkpoint_every=1), folder=tmp_path)
    with pytest.raises(NonFiniteLossError, match=r"nan at step \d+; .*1 of its 16 pairs hold NaN"):
        trainer.fit()
    kept = checkpoints.read_newest(tmp_path / "checkpoints")
    if kept is not None:
        assert all(v.isfinite().all() for v in kept["ema"].values() if torch.is_tensor(v))
    assert weights(method.model).isfinite().all()


def test_diverging_loss_keeps_the_last_good_checkpoint(tmp_path):
    model = make_model()

    def explode(trainer: Trainer, step: int) -> None:
        if step == 7:
            with torch.no_grad():
                next(model.parameters()).fill_(float("inf"))

    method = FlowMatching(model, Independent(DATA))
    trainer = Trainer(method, settings(), folder=tmp_path, callbacks=[explode])
    with pytest.raises(NonFiniteLossError, match="at step 8; the checkpoint of step 5 is kept"):
        trainer.fit()
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path / "checkpoints")] == [5]


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    real = torch.save

    def full(value, file, *rest, **options):
        if value["step"] == 10:
            Path(file).write_bytes(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        return real(value, file, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step 10 could not be written.*step 5 is intact"):
        train(folder=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.pt"]
    assert checkpoints.read_newest(tmp_path / "checkpoints")["step"] == 5


def test_damaged_checkpoint_falls_back(tmp_path):
    expected = train(folder=tmp_path)
    newest = checkpoints.list_checkpoints(tmp_path / "checkpoints")[-1][1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"):
        resumed = train(folder=tmp_path, resume=True)
    assert torch.equal(weights(resumed), weights(expected))


def test_checkpoint_with_code_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trapped"),))

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"step": 1, "trap": Trap()}, folder / "step-00000001.pt")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert checkpoints.read_newest(folder) is None
    assert not (tmp_path / "trapped").exists()


def test_phases_run_when_due():
    first, second = make_model(), torch.nn.Linear(2, 1)
    calls: list[tuple[str, int]] = []

    class Two:
        model = first

        def phases(self):
            def one(draw: Draw):
                calls.append(("one", draw.step))
                return first(draw.normal((2,)), draw.uniform()).square().mean()

            def two(draw: Draw):
                calls.append(("two", draw.step))
                return second(draw.normal((2,))).square().mean()

            slow = OptimizerSettings(name="sgd", learning_rate=1e-3)
            return [Phase("one", first, one), Phase("two", second, two, every=3, optimizer=slow)]

    Trainer(Two(), settings(7, log_every=7)).fit()
    assert [step for name, step in calls if name == "one"] == list(range(7))
    assert [step for name, step in calls if name == "two"] == [0, 3, 6]


def test_interrupt_saves_and_reports(tmp_path):
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_trainer as t
        def press(trainer, step):
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)
        method = t.FlowMatching(t.make_model(), t.Independent(t.DATA))
        # A job in the background of a shell inherits that interrupts are ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            t.Trainer(method, t.settings(), folder={str(tmp_path)!r}, callbacks=[press]).fit()
        except KeyboardInterrupt as stop:
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            print(stop)
            sys.exit(130)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 130, done.stderr
    assert "stopped at step 4" in done.stdout
    assert checkpoints.read_newest(tmp_path / "checkpoints")["step"] == 4


def test_average_warms_up_and_round_trips():
    module = torch.nn.Linear(1, 1, bias=False)
    average = EMA(module, 0.9)
    expected = value = module.weight.item()
    for n in range(30):
        value = float(n)
        with torch.no_grad():
            module.weight.fill_(value)
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert float(average.averaged(module).weight) == pytest.approx(expected, rel=1e-5)
    twin = EMA(torch.nn.Linear(1, 1, bias=False), 0.9)
    twin.load_state_dict(average.state_dict())
    assert twin.updates == 30
    assert torch.equal(twin.averaged(module).weight, average.averaged(module).weight)


def test_condition_dropout_uses_the_null_label():
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        classes = 4

        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

        def null_condition(self, **condition):
            return {"label": torch.full_like(condition["label"], 4)}

        def forward(self, x, t, *, label):
            seen.append(label)
            return self.inner(x)

    data = TensorData(torch.zeros(4000, 2), {"label": torch.arange(4000) % 4})
    method = FlowMatching(FlowModel(Spy()), Independent(data), condition_dropout=0.25)
    method.loss(Draw.of(4000))
    share = (seen[0] == 4).float().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    kept = seen[0] != 4
    rows = Draw.of(4000).indices(4000)
    assert torch.equal(seen[0][kept], (rows % 4)[kept])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "steps must be > 0, got 0"),
        ({"batch_size": -4}, "batch_size must be > 0, got -4"),
        ({"batch_size": 512 / 2}, "batch_size must be a whole number or 'auto', got 256.0"),
        ({"batch_size": "often"}, "batch_size must be a whole number or 'auto', got 'often'"),
        ({"batch_size": True}, "batch_size must be a whole number or 'auto', got True"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"precision": "bf"}, "did you mean 'bf16'"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainerSettings(**changes)


def test_whole_numbers_of_numpy_are_batch_sizes():
    made = TrainerSettings(batch_size=np.int64(64))
    assert type(made.batch_size) is int
    assert made.batch_size == made.micro == 64


def test_unknown_optimizer_suggests():
    with pytest.raises(ValueError, match="unknown optimizer 'adma': did you mean 'adam'"):
        OptimizerSettings(name="adma")


def test_bf16_training_keeps_float32_weights():
    model, seen = make_model(), set()
    layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda module, given, output: seen.add(output.dtype))
    method = FlowMatching(model, Independent(DATA))
    model = Trainer(method, settings(precision="bf16")).fit()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert weights(model).isfinite().all()


def test_killed_trainings_end_with_the_same_weights():
    stress = Path(__file__).parents[1] / "stress" / "kill_training.py"
    command = [sys.executable, str(stress), "--kills", "3", "--steps", "120"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.startswith("3 kills")
