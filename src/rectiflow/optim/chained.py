"""Optimizers made of parts: a direction rule, what rectifies it, weight decay, a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import increment_version

from rectiflow.errors import positive
from rectiflow.optim.buckets import Bucket, working_dtype
from rectiflow.optim.parts import Direction, Part, Stretch, change_gradient, move
from rectiflow.optim.whole_tensors import rectified_gradients, step_whole

if TYPE_CHECKING:
    from torch import Tensor

Params = Iterable[Any]


class ChainedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` chained of parts; `chain` and the named optimizers make them.

    Each step goes through the same order:

    1. the gradient, with its sign turned if `maximize`;
    2. rectifiers of gradients, in the order given (clipping, centring);
    3. with coupled weight decay, `weight_decay` times the weights is added;
    4. the direction rule (momentum, Adam, ...);
    5. rectifiers of directions, in the order given (friction, projection, clipping of updates);
    6. decoupled weight decay, `w <- w (1 - lr weight_decay)`;
    7. the step, `w <- w - lr direction`.

    The weights of a group are laid into one buffer for each device and dtype, of which they become
    views: values, identity, shapes and hooks stay, `state_dict` and checkpoints too. Weights that
    cannot be moved (shared memory) are copied in and out; sharded ones are refused. State is in
    float32 at least. Gradients are left as they are.

    What a part asks of all gradients (a norm, a quantile) it asks of them as the steps before it
    leave them; where there are such, that costs a copy of the gradients.

    Args:
        params: weights, or groups of them with settings of their own.
        parts: the direction rule and its rectifiers, exactly one rule.
        lr: learning rate, a number or a 0-dim tensor.
        weight_decay: weight decay.
        decoupled: whether it is decoupled; otherwise it is added to the gradient.
        maximize: go up instead of down.
        compile: compute each bucket in one compiled kernel (needs a C++ compiler on a CPU). It
            takes a few seconds once, and memory for one more copy of the gradients. Not for
            parts that need whole tensors.
        settings: defaults of the parts' settings to change.

    Raises:
        ValueError: settings out of range, several direction rules or none, parts that do not fit
            together or cannot be compiled, weights that are sharded, complex or no
            floating-point numbers.
    """

    def __init__(
        self,
        params: Params,
        parts: Sequence[Part],
        *,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        decoupled: bool = True,
        maximize: bool = False,
        compile: bool = False,
        **settings: Any,
    ) -> None:
        rules = [part for part in parts if isinstance(part, Direction)]
        if len(rules) != 1:
            raise ValueError(f"a chain has one direction rule, got {len(rules)}")
        self.parts = _ordered(parts, decoupled=decoupled)
        _check_parts(self.parts, compile=compile)
        self.decoupled = decoupled
        self.compile = compile
        self._buckets: dict[int, tuple[list[int], list[Bucket]]] = {}
        self._kernels: dict[Any, Callable[..., Any]] = {}
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        for part in self.parts:
            defaults |= part.defaults
        for name in settings:
            if name not in defaults:
                raise ValueError(f"no part of the chain knows the setting {name!r}")
        super().__init__(params, {**defaults, **settings})

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of all buffers of a weight."""
        return tuple(slot for part in self.parts for slot in part.slots)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights with settings of their own, at any time."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self.check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        # At once, so that whoever looks at the weights' memory from now on sees the buffer.
        with torch.no_grad():
            self._buckets_of(len(self.param_groups) - 1, group)

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for weights or settings of a group that cannot be."""
        for p in group["params"]:
            if hasattr(p, "placements"):
                raise ValueError(
                    f"{type(self).__name__} takes whole weights, got a sharded one "
                    f"({type(p).__name__}): train with DistributedDataParallel, which keeps them "
                    "whole, or with an optimizer of torch.optim"
                )
            if not p.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__} takes real floating-point weights, got {p.dtype}: "
                    "give the real view of complex ones"
                )
        positive("lr", float(group["lr"]), zero=True)
        positive("weight_decay", group["weight_decay"], zero=True)
        for part in self.parts:
            part.check(group)

    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is called first, with gradients enabled, and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for number, group in enumerate(self.param_groups):
            grads = _gradients(self, group["params"])
            if any(grad is not None for grad in grads):
                work.append((number, group, grads))
        surveyed = self._survey(work)
        for (number, group, grads), found in zip(work, surveyed):
            self._step_group(number, group, grads, found)
        return loss

    def _survey(self, work: Sequence[tuple[int, dict[str, Any], list[Any]]]) -> list[dict]:
        """What parts say that look at all gradients, as those before them leave them."""
        found: list[dict[str, Any]] = [{} for _ in work]
        decays = any(group["weight_decay"] for _, group, _ in work)
        earlier: list[Part] = []
        for part in self.parts:
            if part.surveys:
                if earlier:
                    given = self._rectified(earlier, work, found)
                else:
                    given = [
                        (group, [g for g in grads if g is not None]) for _, group, grads in work
                    ]
                for own, more in zip(found, part.survey(given)):
                    own.update(more)
            if part.on == "gradient" and (decays or not isinstance(part, _CoupledDecay)):
                earlier.append(part)
        return found

    def _rectified(
        self,
        parts: Sequence[Part],
        work: Sequence[tuple[int, dict[str, Any], list[Any]]],
        found: Sequence[dict[str, Any]],
    ) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Each group with its gradients as rectifiers of gradients leave them."""
        joint = any(part.whole and part.joint for part in parts)
        made = []
        for (number, group, grads), known in zip(work, found):
            rows: list[Tensor] = []
            for bucket in self._buckets_of(number, group):
                own = _of_bucket(bucket, group, grads)
                bucket.gather()
                for count, indices in bucket.runs([grad is not None for grad in own]):
                    flats = _flattened(bucket, indices, own)
                    numbers = {**self._numbers(group, count + 1), **known}
                    for unit in [indices] if joint else bucket.units(indices):
                        rows += rectified_gradients(parts, bucket, unit, flats, dict(numbers))
            made.append((group, rows))
        return made

    def _step_group(
        self, number: int, group: dict[str, Any], grads: list[Any], found: dict[str, Any]
    ) -> None:
        for bucket in self._buckets_of(number, group):
            own = _of_bucket(bucket, group, grads)
            bucket.gather()
            moved: list[int] = []
            for count, indices in bucket.runs([grad is not None for grad in own]):
                numbers = {**self._numbers(group, count + 1), **found}
                self._advance(bucket, indices, own, numbers)
                moved += indices
                bucket.count(indices, count + 1)
            bucket.scatter(moved)
            increment_version([bucket.params[index] for index in moved])

    def _numbers(self, group: dict[str, Any], step: int) -> dict[str, Any]:
        """The settings of a step as plain numbers."""
        lr = float(group["lr"])
        decay = float(group["weight_decay"])
        numbers: dict[str, Any] = {
            "lr": lr,
            "up": bool(group["maximize"]),
            "decay": lr * decay if self.decoupled else 0.0,
        }
        if decay and not self.decoupled:
            numbers["coupled"] = decay
        for part in self.parts:
            numbers.update(part.numbers(group, step))
        return numbers

    def _advance(
        self, bucket: Bucket, indices: list[int], grads: list[Any], numbers: dict[str, Any]
    ) -> None:
        """One step of the weights of these numbers."""
        if any(part.whole for part in self.parts):
            joint = any(part.whole and part.joint for part in self.parts)
            flats = _flattened(bucket, indices, grads)
            for unit in [indices] if joint else bucket.units(indices):
                step_whole(self.parts, bucket, unit, flats, dict(numbers))
        elif self.compile and len(indices) == len(bucket.params):
            self._run_compiled(bucket, _flattened(bucket, indices, grads), numbers)
        else:
            for block in bucket.blocks(indices):
                target, state = bucket.cut(block)
                piece = bucket.piece(grads, block).to(bucket.dtype)
                stretch = Stretch.of(target.to(bucket.dtype), piece, state, numbers)
                for part in self.parts:
                    part.apply(stretch)
                move(stretch, target)

    def _run_compiled(
        self, bucket: Bucket, flats: dict[int, Tensor], numbers: dict[str, Any]
    ) -> None:
        """A step in one kernel."""
        up = numbers.pop("up")
        fixed = {name: value for name, value in numbers.items() if not torch.is_tensor(value)}
        found = {name: value for name, value in numbers.items() if torch.is_tensor(value)}
        # As tensors: plain numbers would be compiled into the kernel, anew at every step. Of one
        # element each, since for a 0-dim one the compiler would ask what it is.
        values = torch.tensor(list(fixed.values()), dtype=bucket.dtype, device=bucket.device)
        raw = bucket.gathered([flats[index] for index in range(len(bucket.params))])
        self._kernel((*fixed, *found), up)(
            bucket.flat, raw, bucket.state, [*values.split(1), *found.values()]
        )

    def _kernel(self, names: tuple[str, ...], up: bool) -> Callable[..., None]:
        """The compiled step of a buffer, given numbers of these names."""
        key = (names, up)
        if key not in self._kernels:
            parts = self.parts

            def kernel(
                flat: Tensor, raw: Tensor, state: dict[str, Tensor], values: list[Tensor]
            ) -> None:
                numbers = {**dict(zip(names, values)), "up": up}
                dtype = working_dtype(flat.dtype)
                stretch = Stretch.of(flat.to(dtype), raw.to(dtype), state, numbers)
                for part in parts:
                    part.apply(stretch)
                kept = stretch.param * (1 - numbers["decay"])
                flat.copy_(kept - stretch.direction * numbers["lr"])

            # Of any length: else each group would be compiled for itself.
            self._kernels[key] = torch.compile(kernel, fullgraph=True, dynamic=True)
        return self._kernels[key]

    def _buckets_of(self, number: int, group: dict[str, Any]) -> list[Bucket]:
        """The buffers of a group, laid anew if its weights have been exchanged or moved."""
        wanted = [p for p in group["params"] if p.requires_grad or p.grad is not None]
        ids, buckets = self._buckets.get(number, ([], []))
        if ids != [id(p) for p in wanted] or not all(bucket.intact for bucket in buckets):
            kinds: dict[tuple[Any, Any], list[Tensor]] = {}
            for p in wanted:
                kinds.setdefault((p.device, p.dtype), []).append(p)
            buckets = [self._lay(params) for params in kinds.values()]
            self._buckets[number] = ([id(p) for p in wanted], buckets)
        return buckets

    def _lay(self, params: list[Tensor]) -> Bucket:
        """A buffer of weights, with what is known of their state."""
        bucket = Bucket(params)
        for name in self.slots:
            bucket.add_slot(name)
        for index, p in enumerate(params):
            known = self.state.get(p, {})
            views = {name: bucket.slot_view(name, index) for name in self.slots}
            for name, view in views.items():
                if known.get(name) is not None:
                    view.copy_(known[name])
            # Torch's SGD counts no steps; where it left a buffer, there was one.
            begun = any(known.get(name) is not None for name in views)
            steps = known.get("step", float(begun))
            bucket.counts[index] = int(steps)
            bucket.steps[index] = float(steps)
            self.state[p] = {"step": bucket.steps[index], **views}
        return bucket

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, that of a loop optimizer with the same buffers included.

        Buffers that it lacks begin with zeros, settings that it lacks are this optimizer's own.
        State stays in float32 for weights of lower precision.
        """
        super().load_state_dict(state_dict)
        self._buckets.clear()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, own):
            for name, value in state_dict["state"].get(key, {}).items():
                if torch.is_tensor(value) and value.is_floating_point() and name != "step":
                    self.state[p][name] = value.detach().to(
                        p.device, working_dtype(p.dtype), copy=True
                    )

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: self.__dict__[name] for name in ("parts", "decoupled", "compile")}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets, self._kernels = {}, {}


def chain(direction: Direction, *rectifiers: Part) -> Callable[..., ChainedOptimizer]:
    """A builder of optimizers: `chain(Adam(), Friction())(params, lr=1e-3)`.

    Args:
        direction: the direction rule.
        *rectifiers: what changes the gradient before it or the direction after it; each says
            which, and among those of one kind the order given is the order applied.

    Returns:
        a function from weights and the arguments of `ChainedOptimizer` to an optimizer.

    Example:
        >>> from rectiflow.optim import Adam, Friction, RadialProjection
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = chain(Adam(), Friction(), RadialProjection())([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
    """

    def build(params: Params, *, lr: float | Tensor, **settings: Any) -> ChainedOptimizer:
        return ChainedOptimizer(params, (direction, *rectifiers), lr=lr, **settings)

    return build


@dataclass(frozen=True)
class _CoupledDecay(Part):
    """Adds the weights times the coupled weight decay to the gradient."""

    on = "gradient"

    def apply(self, stretch: Stretch) -> None:
        if "coupled" in stretch.numbers:
            added = stretch.param * stretch.numbers["coupled"]
            change_gradient(stretch, lambda gradient: gradient + added)


def _ordered(parts: Sequence[Part], *, decoupled: bool) -> tuple[Part, ...]:
    """The parts in the order in which they are applied."""
    rule = [part for part in parts if isinstance(part, Direction)]
    rectifiers = [part for part in parts if not isinstance(part, Direction)]
    before = [part for part in rectifiers if part.on == "gradient"]
    after = [part for part in rectifiers if part.on == "direction"]
    return (*before, *(() if decoupled else (_CoupledDecay(),)), *rule, *after)


def _check_parts(parts: Sequence[Part], *, compile: bool) -> None:
    """Raise ValueError for parts that do not work together."""
    surveying = [type(part) for part in parts if part.surveys]
    for part in parts:
        name, count = type(part).__name__, surveying.count(type(part))
        if part.surveys and count > 1:
            raise ValueError(
                f"a chain takes one {name} that looks at all gradients, got {count}: keep one"
            )
        if compile and part.whole:
            raise ValueError(
                f"{name} needs whole tensors, which one kernel does not see: leave out compile=True"
            )
        part.check_chain(parts)


def _gradients(optimizer: Any, params: Sequence[Any]) -> list[Tensor | None]:
    """The gradients of weights, of a kind that can be used."""
    grads = [p.grad for p in params]
    layouts = {grad.layout for grad in grads if grad is not None}
    if layouts - {torch.strided}:
        raise RuntimeError(
            f"{type(optimizer).__name__} takes dense gradients, got a sparse one: make the "
            "embedding with sparse=False"
        )
    return grads


def _of_bucket(bucket: Bucket, group: dict[str, Any], grads: list[Any]) -> list[Any]:
    """Those of a group's gradients that belong to the weights of a bucket."""
    if len(bucket.params) == len(grads):
        return grads
    by_param = dict(zip(map(id, group["params"]), grads))
    return [by_param[id(p)] for p in bucket.params]


def _flattened(bucket: Bucket, indices: Sequence[int], grads: Sequence[Any]) -> dict[int, Tensor]:
    """Gradients as 1-D tensors, by the numbers of their weights."""
    return {index: bucket.flatten(index, grads[index]) for index in indices}
