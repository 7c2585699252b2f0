"""Optimizers as loops over tensors, written from the papers: slow, and easy to check by eye."""

from __future__ import annotations

import math

import torch


class Loop(torch.optim.Optimizer):
    """A loop over weights; subclasses say what a step does to one of them."""

    slots: tuple[str, ...] = ()
    decoupled = True

    def __init__(self, params, lr, weight_decay=0.0, **settings):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **settings})

    @torch.no_grad()
    def step(self):
        shared = self.survey([(g, [p.grad for p in g["params"] if p.grad is not None])
                              for g in self.param_groups])  # fmt: skip
        for group, common in zip(self.param_groups, shared):
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                wide = torch.promote_types(p.dtype, torch.float32)
                if not state:
                    state["step"] = torch.tensor(0.0)
                for slot in self.slots:
                    state.setdefault(slot, torch.zeros_like(p, dtype=wide))
                state["step"] += 1
                weight, grad = p.to(wide), p.grad.to(wide)
                if not self.decoupled:
                    grad = grad + group["weight_decay"] * weight
                decay = group["lr"] * group["weight_decay"] if self.decoupled else 0.0
                direction, decay = self.direction(
                    weight, grad, p.grad.to(wide), state, group, int(state["step"]), common, decay
                )
                p.copy_(weight * (1 - decay) - group["lr"] * direction)

    def survey(self, groups):
        return [{} for _ in groups]

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        raise NotImplementedError


def adam(state, grad, averaged, group, step, *, corrected=True, nesterov=False):
    b1, b2 = group["betas"]
    state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * averaged
    state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * grad**2
    mean = state["exp_avg"]
    if nesterov:
        mean = b1 * mean + (1 - b1) * averaged
    mean = mean / (1 - b1**step)
    root = math.sqrt(1 - b2**step)
    if corrected:
        return mean / (state["exp_avg_sq"].sqrt() / root + group["eps"])
    return mean * root / (state["exp_avg_sq"].sqrt() + group["eps"])


def momentum(state, grad, group, step):
    if not group["momentum"]:
        return grad
    if step == 1:
        state["momentum_buffer"] = grad.clone()
    else:
        kept = group["momentum"] * state["momentum_buffer"]
        state["momentum_buffer"] = kept + (1 - group["dampening"]) * grad
    return state["momentum_buffer"]


class DiffGrad(Loop):
    slots = ("exp_avg", "exp_avg_sq", "previous_grad")
    decoupled = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps)

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        friction = 1 / (1 + (-(state["previous_grad"] - grad).abs()).exp())
        state["previous_grad"] = grad.clone()
        return friction * adam(state, grad, grad, group, step, corrected=False), decay


def project(weight, raw, direction, delta, wd_ratio, eps):
    """The official order of views: channels, then the whole tensor."""
    if weight.ndim < 2 or not weight.numel():
        return direction, 1.0
    for rows in (weight.shape[0], 1):
        w, g, d = (x.reshape(rows, -1) for x in (weight, raw, direction))
        cosine = torch.nn.functional.cosine_similarity(w, g, dim=1, eps=eps).abs()
        if cosine.max() < delta / w.shape[1] ** 0.5:
            unit = w / (w.norm(dim=1, keepdim=True) + eps)
            d = d - unit * (unit * d).sum(1, keepdim=True)
            return d.reshape(weight.shape), wd_ratio
    return direction, 1.0


class AdamP(Loop):
    slots = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, delta=0.1,
        wd_ratio=0.1, nesterov=False,
    ):  # fmt: skip
        self.nesterov = nesterov
        options = {"delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, lr, weight_decay, betas=betas, eps=eps, **options)

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        found = adam(state, grad, grad, group, step, nesterov=self.nesterov)
        found, share = project(weight, raw, found, group["delta"], group["wd_ratio"], group["eps"])
        return found, decay * share


class SGDP(Loop):
    slots = ("momentum_buffer",)

    def __init__(
        self, params, lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
        eps=1e-8, delta=0.1, wd_ratio=0.1, project_buffer=False,
    ):  # fmt: skip
        self.eps, self.nesterov, self.project_buffer = eps, nesterov, project_buffer
        options = {"delta": delta, "wd_ratio": wd_ratio, "dampening": dampening}
        super().__init__(params, lr, weight_decay, momentum=momentum, **options)

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        found = momentum(state, grad, group, step)
        if self.nesterov:
            found = grad + group["momentum"] * found
        found, share = project(weight, raw, found, group["delta"], group["wd_ratio"], self.eps)
        if self.project_buffer and not self.nesterov:
            state["momentum_buffer"] = found.clone()
        return found, decay * share / (1 - group["momentum"])


class Sophia(Loop):
    slots = ("exp_avg", "hessian")

    def __init__(
        self, params, lr=1e-4, betas=(0.96, 0.99), gamma=0.05, eps=1e-12, weight_decay=0.2,
        eps_mode="max",
    ):  # fmt: skip
        self.eps_mode = eps_mode
        super().__init__(params, lr, weight_decay, betas=betas, gamma=gamma, eps=eps)

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        b1 = group["betas"][0]
        state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * grad
        scaled = group["gamma"] * state["hessian"]
        if self.eps_mode == "add":
            curvature = torch.clamp(scaled, min=0) + group["eps"]
        else:
            curvature = torch.clamp(scaled, min=group["eps"])
        return torch.clamp(state["exp_avg"] / curvature, -1, 1), decay


class AdAdaGrad(Loop):
    slots = ("sum",)
    decoupled = False

    def __init__(self, params, lr=1e-2, eps=1e-10, weight_decay=0.0):
        super().__init__(params, lr, weight_decay, eps=eps)

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        state["sum"] = state["sum"] + grad**2
        return grad / (state["sum"].sqrt() + group["eps"]), decay


class AdAdaGradNorm(Loop):
    decoupled = False

    def __init__(self, params, lr=1e-2, eps=1e-10, weight_decay=0.0, initial=1e-2):
        super().__init__(params, lr, weight_decay, eps=eps, sum_of_squares=initial)

    def survey(self, groups):
        for group, grads in groups:
            if grads:
                group["sum_of_squares"] = group["sum_of_squares"] + sum(
                    float((p.grad.double() + group["weight_decay"] * p.double()).square().sum())
                    for p in group["params"]
                    if p.grad is not None
                )
        return [{} for _ in groups]

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        return grad / (float(group["sum_of_squares"]) ** 0.5 + group["eps"]), decay


def threshold(groups, fraction):
    """The number with floor(fraction n) larger ones, by sorting."""
    values = torch.cat([g.flatten() for _, grads in groups for g in grads]).abs()
    return values.sort(descending=True).values[int(len(values) * fraction)]


class Clipped(Loop):
    """The paper's clipped SGD and Adam: Adam's second moment sees the whole gradient."""

    def __init__(self, params, base="sgd", lr=1e-2, weight_decay=0.0):
        self.base = base
        self.fraction = {"sgd": 0.1, "adam": 0.5, "lion": 0.5}[base]
        self.slots = {
            "sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)
        }[base]  # fmt: skip
        options = {
            "sgd": {"momentum": 0.9, "dampening": 0.0},
            "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
            "lion": {"betas": (0.9, 0.99)},
        }[base]
        super().__init__(params, lr, weight_decay, **options)

    def survey(self, groups):
        tau = threshold(groups, self.fraction)
        return [{"tau": tau} for _ in groups]

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        clipped = grad.sign() * grad.abs().minimum(common["tau"].to(grad.dtype))
        if self.base == "sgd":
            return momentum(state, clipped, group, step), decay
        if self.base == "adam":
            return adam(state, grad, clipped, group, step), decay
        b1, b2 = group["betas"]
        mixed = b1 * state["exp_avg"] + (1 - b1) * clipped
        state["exp_avg"] = b2 * state["exp_avg"] + (1 - b2) * clipped
        return mixed.sign(), decay


class SplitSGD(Loop):
    slots = ("momentum_buffer",)

    def __init__(
        self, params, lr=0.1, fraction=0.05, ratio=1e-2, momentum=0.9, dampening=0.9,
        weight_decay=0.0,
    ):  # fmt: skip
        self.fraction = fraction
        options = {"momentum": momentum, "dampening": dampening, "sign_ratio": ratio}
        super().__init__(params, lr, weight_decay, **options)

    def survey(self, groups):
        tau = threshold(groups, self.fraction)
        return [{"tau": tau} for _ in groups]

    def direction(self, weight, grad, raw, state, group, step, common, decay):
        kept = group["momentum"] * state["momentum_buffer"]
        state["momentum_buffer"] = kept + (1 - group["dampening"]) * grad
        memory = state["momentum_buffer"]
        signs = group["sign_ratio"] * memory.sign()
        return torch.where(grad.abs() > common["tau"].to(grad.dtype), signs, memory), decay
