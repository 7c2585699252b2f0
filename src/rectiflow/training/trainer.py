"""The training loop: one for every method, on one process or many."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rectiflow.errors import NonFiniteLossError, positive, require, unknown
from rectiflow.flows.couplings import Draw
from rectiflow.flows.fields import FlowModel
from rectiflow.optim.coordinate_clipping import clip_coordinates_
from rectiflow.optim.tract import GRAMS
from rectiflow.optim.tract_layers import remove_tract
from rectiflow.training import checkpoints, curvature, optimizers
from rectiflow.training.acceleration import flat, make_accelerator
from rectiflow.training.averaging import EMA
from rectiflow.training.batches import Batches, GrowthSettings
from rectiflow.training.first_layer import train_first_layer
from rectiflow.training.interrupts import interruptible
from rectiflow.training.method import Method, Phase, PhaseModule
from rectiflow.training.optimizers import OptimizerSettings
from rectiflow.training.phase_state import phase_state, restore_phase
from rectiflow.training.progress import bar
from rectiflow.training.random_state import random_state, set_random_state
from rectiflow.training.records import MetricsLog

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainerSettings:
    """How long, how large, how often."""

    steps: int = 4000
    """Training steps (optimizer updates)."""
    batch_size: int | Literal["auto"] = 256
    """Samples of one micro-batch on one process; auto grows batches as gradients ask for it."""
    accumulate: int = 1
    """Micro-batches added up before an update."""
    ema: float = 0.999
    """Decay of the weight average; 0 keeps the last weights."""
    seed: int = 0
    """Seed of data order, noises and times."""
    precision: str = "no"
    """no, bf16 or fp16 mixed precision."""
    compile: bool = False
    """Compile the network with torch.compile."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 50
    """Steps between logged losses."""
    tracker: str = "none"
    """Experiment tracker of Accelerate: tensorboard, wandb, mlflow, ... or none."""
    optim: OptimizerSettings = field(default_factory=OptimizerSettings)
    """The optimizer."""
    growth: GrowthSettings = field(default_factory=GrowthSettings)
    """How --batch-size auto grows batches."""
    tract: float | None = None
    """Train the first layer through its outputs (TrAct), with this damping relative to the inputs'
    mean square; the flag alone means 0.1."""
    tract_layer: str | None = None
    """Path in the network of the layer that --tract trains so, in place of the first."""
    tract_gram: str | None = None
    """Whose inputs --tract takes the second moment of: local, of each process alone, or allreduce,
    of all that share a batch, the default."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "checkpoint_every", "keep", "log_every"):
            positive(name, getattr(self, name))
        if self.batch_size != "auto":
            object.__setattr__(self, "batch_size", _whole("batch_size", self.batch_size))
            positive("batch_size", self.batch_size)
            if self.growth != GrowthSettings():
                raise ValueError("--growth.* is for batches that grow: add --batch-size auto")
        elif self.accumulate != 1:
            raise ValueError(
                "--batch-size auto plans accumulation itself: give --growth.micro in the place of "
                "--accumulate"
            )
        if self.tract is not None:
            positive("tract", self.tract)
            if self.optim.name.startswith("sophia"):
                raise ValueError(
                    f"{self.optim.name} reads curvature off gradients, and --tract changes those "
                    "of the first layer: choose one of them"
                )
        elif self.tract_layer is not None or self.tract_gram is not None:
            flag = "--tract-layer" if self.tract_layer is not None else "--tract-gram"
            raise ValueError(f"{flag} says how --tract trains a layer: add --tract")
        if self.tract_gram not in (None, *GRAMS):
            raise unknown("tract_gram", self.tract_gram, GRAMS)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise unknown("precision", self.precision, ("no", "bf16", "fp16"))

    @property
    def micro(self) -> int:
        """The most samples that one process sees at once."""
        return self.batch_size if isinstance(self.batch_size, int) else self.growth.micro

    @property
    def systems(self) -> tuple[str, ...]:
        """Systems of the catalog that these settings use."""
        chosen = {"adadagrad": self.batch_size == "auto", "tract": self.tract is not None}
        return tuple(name for name, used in chosen.items() if used)


class Trainer:
    """Trains a method.

    Runs on Accelerate: CPU, one GPU, data-parallel under `accelerate launch`, mixed precision,
    accumulation. The randomness of a step follows from seed and step alone, so two processes make
    the step that one process with the doubled batch makes, and a resumed training equals an
    uninterrupted one (bit for bit on a CPU).

    Args:
        method: what to train.
        settings: how.
        folder: where checkpoints (`checkpoints/`) and the loss log (`metrics.jsonl`) go; without
            one nothing is written.
        title: shown beside the progress bar.
        callbacks: called with the trainer and the number of finished steps after each update.
        accelerator: an `accelerate.Accelerator` of your own.

    Example:
        >>> from rectiflow.flows.couplings import Independent
        >>> from rectiflow.nets import build
        >>> from rectiflow.training import FlowMatching
        >>> model = FlowModel(build("mlp", shape=(2,), width=8, depth=1), shape=(2,))
        >>> method = FlowMatching(model, Independent(torch.randn(64, 2)))
        >>> trainer = Trainer(method, TrainerSettings(steps=3, batch_size=8))
        >>> trained = trainer.fit()
    """

    def __init__(
        self,
        method: Method,
        settings: TrainerSettings | None = None,
        *,
        folder: Path | str | None = None,
        title: str = "train",
        callbacks: Sequence[Callable[[Trainer, int], None]] = (),
        accelerator: Any = None,
    ) -> None:
        require("app", "accelerate")
        self.method = method
        self.settings = settings if settings is not None else TrainerSettings()
        check = getattr(method, "check_training", None)
        if check is not None:
            check(self.settings)
        self.folder = Path(folder) if folder is not None else None
        self.title, self.callbacks = title, list(callbacks)
        self.accelerator = accelerator or make_accelerator(
            self.settings.precision, self.settings.tracker, self.folder
        )
        self.device = self.accelerator.device
        self.phases = list(method.phases())
        method.model.to(self.device)
        for phase in self.phases:
            phase.module.to(self.device)
        processes = int(self.accelerator.num_processes)
        self.batches = Batches(
            self.settings.batch_size,
            self.settings.accumulate,
            self.settings.growth,
            process=self.accelerator.process_index,
            processes=processes,
        )
        if self.batches.controller is not None and len(self.phases) > 1:
            raise ValueError(
                f"--batch-size auto watches one loss, not {len(self.phases)}: give a number"
            )
        self.generator = torch.Generator(self.device)
        if self.settings.tract is not None:
            look = Draw.of(2, seed=self.settings.seed, generator=self.generator)
            train_first_layer(
                method,
                self.phases,
                self.settings.tract,
                look,
                layer=self.settings.tract_layer,
                gram=self.settings.tract_gram or ("allreduce" if processes > 1 else "local"),
            )
        if self.settings.compile and isinstance(method.model.net, nn.Module):
            method.model.net.compile()
        self._options = [phase.optimizer or self.settings.optim for phase in self.phases]
        own = {id(p) for p in method.model.parameters()}
        # The average counts updates of the model, not steps in which only other parts learned.
        self._moves_model = [
            any(id(p) in own for p in phase.module.parameters()) for phase in self.phases
        ]
        self._modules, self._optimizers = [], []
        for phase, options in zip(self.phases, self._options):
            optimizer = optimizers.build(phase.module.parameters(), options)
            curvature.check(optimizer, phase, compiled=self.settings.compile)
            module, optimizer = self.accelerator.prepare(PhaseModule(phase), optimizer)
            self._modules.append(module)
            self._optimizers.append(optimizer)
        self.ema = EMA(method.model, self.settings.ema)
        self.step = 0
        self._enough = False

    def fit(self, *, resume: bool = False) -> FlowModel:
        """Train to the last step and return the averaged model.

        Args:
            resume: go on from the newest checkpoint in the folder, if there is one; without it the
                folder's checkpoints are removed.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
            KeyboardInterrupt: Ctrl-C or a termination signal, after a checkpoint was written.
            OSError: a checkpoint could not be written; earlier ones are intact.
        """
        settings = self.settings
        if self._folder is not None and self._writes:
            checkpoints.sweep(self._folder)
            if not resume:
                checkpoints.clear(self._folder)
        if resume and self._folder is not None:
            self._resume(self._folder)
        path = self.folder / "metrics.jsonl" if self.folder is not None else None
        log = MetricsLog(path if self._writes else None, self.step)
        self.accelerator.init_trackers("rectiflow", config=flat(asdict(settings)))
        for phase in self.phases:
            phase.module.train()
        shown = self.accelerator.is_main_process
        window = torch.zeros(len(self.phases), dtype=widest(self.device), device=self.device)
        since = self.step
        with (
            interruptible() as interrupted,
            self._progress(shown) as progress,
        ):
            numbers: dict[str, float] = {}
            while not self.ends:
                self._update(window)
                self.step += 1
                for callback in self.callbacks:
                    callback(self, self.step)
                last = self.ends
                stop = self._agreed(interrupted.is_set())
                due = last or stop or self.step % settings.checkpoint_every == 0
                if due or self.step % settings.log_every == 0:
                    numbers = self._numbers(window, self.step - since)
                    window.zero_()
                    since = self.step
                    log.write(self.step, numbers)
                    self.accelerator.log(numbers, step=self.step)
                if due:
                    self._save()
                if stop and not last:
                    raise KeyboardInterrupt(f"stopped at step {self.step}")
                progress.update(self.step if self._budget is None else self._samples, **numbers)
        # Not `end_training`, which would take the process group from whatever comes next.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.method.model.eval()
        if settings.tract is not None:
            remove_tract(self.method.model)
        return self.result()

    def finish_early(self) -> None:
        """Make the present step the last one; for callbacks that watch the model."""
        self._enough = True

    @property
    def ends(self) -> bool:
        """Whether the step that is finished was the last one."""
        spent = self._budget is not None and self._samples >= self._budget
        return spent or self._enough or self.step >= self.settings.steps

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizer of each phase, for callbacks that look at rates or state."""
        return [prepared.optimizer for prepared in self._optimizers]

    def result(self) -> FlowModel:
        """The averaged model, in evaluation mode."""
        model = self.method.model
        return self.ema.averaged(model).eval() if self.settings.ema else model.eval()

    @property
    def _budget(self) -> int | None:
        """Samples to train on in all, where they and not the steps are counted."""
        return self.settings.growth.samples

    @property
    def _samples(self) -> int:
        """Samples of the finished steps."""
        return self.batches.before(self.step)

    def _progress(self, shown: bool) -> AbstractContextManager[Any]:
        """The progress bar, in samples where they are counted."""
        if self._budget is not None:
            return bar(self.title, self._budget, start=self._samples, unit="samples", shown=shown)
        return bar(self.title, self.settings.steps, start=self.step, shown=shown)

    def _update(self, window: Tensor) -> None:
        """One training step: every phase that is due, then the average."""
        settings, accelerator = self.settings, self.accelerator
        size = self.batches.plan.size
        share = size // accelerator.num_processes
        moved = False
        for index, phase in enumerate(self.phases):
            if not phase.due(self.step):
                continue
            moved = moved or self._moves_model[index]
            options, optimizer = self._options[index], self._optimizers[index]
            module = self._modules[index]
            for group in optimizer.param_groups:
                since, steps = float(self.step - phase.first), settings.steps - phase.first
                if self._budget is not None:
                    since = steps * self._samples / self._budget
                group["lr"] = optimizers.rate(options, since, steps) * self.batches.lr_factor
            draws = [partial(self._draw, size, rows) for rows in self.batches.micros()]
            curvature.refresh_if_due(optimizer.optimizer, phase, draws)
            scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
            micros = self.batches.begin(phase.module.parameters(), scale=scale)
            for micro, rows in enumerate(micros):
                draw = self._draw(size, rows)
                hold = micro + 1 < len(micros)
                quiet = accelerator.no_sync(module) if hold else contextlib.nullcontext()
                with quiet:
                    loss = module(draw)
                    if len(micros) > 1:
                        loss = loss / (share / (rows.stop - rows.start))
                    self._guard(phase, loss, rows)
                    accelerator.backward(loss)
                self.batches.observe(rows, last=not hold)
                window[index] += loss.detach()
            self.batches.test()
            if options.clip_coordinates:
                accelerator.unscale_gradients()
                clip_coordinates_(phase.module.parameters(), options.clip_coordinates)
            if options.clip_norm:
                # Accelerate's own takes out the scale of fp16, which is allowed once a step.
                clipped = bool(options.clip_coordinates)
                clip = nn.utils.clip_grad_norm_ if clipped else accelerator.clip_grad_norm_
                clip(phase.module.parameters(), options.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.batches.advance()
        if settings.ema and moved:
            self.ema.update()

    def _draw(self, size: int, rows: slice) -> Draw:
        return Draw.of(
            size,
            step=self.step,
            seed=self.settings.seed,
            part=rows,
            generator=self.generator,
            before=self.batches.before(self.step),
        )

    def _guard(self, phase: Phase, loss: Tensor, rows: slice) -> None:
        """Stop before a bad step is taken, where looking at the loss costs nothing."""
        if self.device.type == "cpu" and self.accelerator.num_processes == 1:
            value = float(loss.detach())
            if not math.isfinite(value):
                draw = self._draw(self.batches.plan.size, rows)
                found = phase.inspect(draw) if phase.inspect else ""
                self._refuse(phase.name, value, f"step {self.step + 1}", found)

    def _refuse(self, name: str, value: float, where: str, found: str = "") -> None:
        kept = checkpoints.list_checkpoints(self._folder) if self._folder else []
        last = f"the checkpoint of step {kept[-1][0]} is kept" if kept else "no checkpoint was made"
        advice = found or "lower --optim.learning-rate or check the data"
        raise NonFiniteLossError(f"the {name} loss is {value} at {where}; {last}: {advice}")

    def _numbers(self, window: Tensor, steps: int) -> dict[str, float]:
        """Mean loss of each phase since the last look, over all processes."""
        means = self.accelerator.reduce(window, "mean").tolist()
        numbers = {}
        for phase, total in zip(self.phases, means):
            name = "loss" if len(self.phases) == 1 else f"loss/{phase.name}"
            runs = sum(1 for s in range(self.step - steps, self.step) if phase.due(s))
            if not math.isfinite(total):
                self._refuse(phase.name, total, f"steps {self.step - steps + 1} to {self.step}")
            if runs:
                numbers[name] = total / runs
        found = curvature.win_rates(self.phases, self._optimizers)
        return numbers | found | self.batches.numbers()

    def _agreed(self, stop: bool) -> bool:
        """Whether any process was asked to stop."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor([float(stop)], device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    @property
    def _folder(self) -> Path | None:
        return self.folder / CHECKPOINTS if self.folder is not None else None

    @property
    def _writes(self) -> bool:
        return self.folder is not None and bool(self.accelerator.is_main_process)

    def _save(self) -> None:
        if self._folder is None:
            return
        state: dict[str, Any] = {
            "step": self.step,
            "seed": self.settings.seed,
            "size": self.batches.kind,
            "batches": self.batches.state_dict(),
            "ema": self.ema.state_dict(),
            "random": random_state(self.device),
        }
        for phase, module, optimizer in zip(self.phases, self._modules, self._optimizers):
            state[f"phase/{phase.name}"] = phase_state(module, optimizer.optimizer, self.device)
        if self._writes:
            checkpoints.write(self._folder, self.step, state, keep=self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _resume(self, folder: Path) -> None:
        state = checkpoints.read_newest(folder, map_location="cpu")
        if state is None:
            return
        for name, own in (("seed", self.settings.seed), ("size", self.batches.kind)):
            if state[name] != own:
                word = "seed" if name == "seed" else "batch over all processes"
                raise ValueError(
                    f"cannot resume: the checkpoint's {word} is {state[name]}, now {own}; use the "
                    "settings of the first run or start a new one"
                )
        for phase, module, optimizer in zip(self.phases, self._modules, self._optimizers):
            restore_phase(module, optimizer.optimizer, state[f"phase/{phase.name}"])
        self.ema.load_state_dict(state["ema"])
        set_random_state(state["random"], self.device)
        self.step = int(state["step"])
        self.batches.load_state_dict(state["batches"])


def widest(device: torch.device) -> torch.dtype:
    """The widest floating type of a device; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _whole(name: str, value: Any) -> int:
    """A whole number as an int, NumPy's included."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number or 'auto', got {value!r}")
    return int(value)
