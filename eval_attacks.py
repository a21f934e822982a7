"""Robust accuracy under the paper's attacks: NAT, PGD-20, PGD-100, CW, APGD-CE and AutoAttack, all bundled.

    python eval_attacks.py runs/clirat-resnet18-s1/last.pt --attacks nat pgd20 pgd100 cw apgd aa

AutoAttack is the standard version for L-infinity (Croce & Hein 2020): APGD-CE, targeted APGD, targeted FAB and Square,
each on what is still robust. Every attack works on any module that maps images (N, C, H, W) in [0, 1] to logits (N, K)
and returns images in the ball around x. Noise belongs to an image's number (`index`), so that batch size, order and
the other images change a verdict by rounding at most.
"""

import argparse
import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import models
from clirat import (
    exit_if_any,
    frozen,
    is_lead,
    join_processes,
    load_data_once,
    lock,
    number,
    open_device,
    pgd,
    pm,
    to_input,
    write,
)

# ---- Common --------------------------------------------------------------------------------------------------------


def noise(shape, index, *seeds):
    """Uniform [0, 1) noise, (N, *shape), each point's drawn from its number in index (N,) and seeds, int or (N,)."""
    generator, draws = torch.Generator(), []
    for key in torch.stack(torch.broadcast_tensors(index, *map(torch.as_tensor, seeds)), 1).tolist():
        generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        draws.append(torch.rand(shape, generator=generator))
    return torch.stack(draws)


def numbered(x, index):
    """The images' numbers, (N,) on the CPU: index, by default 0..N-1."""
    return torch.arange(len(x)) if index is None else index


def predict(model, x, amp=False):
    """Logits (N, K) in the dtype of x; with amp, computed in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        return model(x).to(x.dtype)


def is_wrong(logits, y):
    """(N,) bool: misclassified, or not a number."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def is_fooled(model, logits, x, y, amp):
    """`is_wrong`, where bfloat16 logits are not believed: each success is confirmed by a forward in the dtype of x."""
    wrong = is_wrong(logits, y)
    if amp and wrong.any():
        with torch.no_grad():
            wrong[wrong.clone()] = is_wrong(predict(model, x[wrong]), y[wrong])
    return wrong


def widen(t):
    """(N,) -> (N, 1, 1, 1), to broadcast over images."""
    return t[:, None, None, None]


def logits_of(model, x, batch_size):
    """Logits (N, K) without a gradient, batch by batch."""
    with torch.no_grad():
        return torch.cat([predict(model, part) for part in x.split(batch_size)])


def targets_of(model, x, y, batch_size):
    """The classes other than y by clean logit, largest first, at most nine: (T, N)."""
    logits = logits_of(model, x, batch_size).scatter(1, y[:, None], -torch.inf)
    return logits.argsort(1, descending=True)[:, : min(9, logits.shape[1] - 1)].T


def select(state, mask):
    """The points of a batch's state (tensors with the same first dimension) where mask is true."""
    return SimpleNamespace(**{name: t[mask] for name, t in vars(state).items()})


def attack_pairs(attack, x, ranks, batch_size):
    """Run `attack(point, rank, record)` on all pairs of a point, as an index into x, and a rank of its target class.

    Batches are full, the likeliest targets come first, and a point leaves at its first success, which the attack
    reports by `record(point, wrong, images)`; that returns which pairs go on. Returns the images recorded, else x.
    """
    x_adv, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def record(point, wrong, images):
        pair = torch.arange(len(point), device=x.device).where(wrong, len(point))
        first = pair.new_full((len(x),), len(point)).scatter_reduce(0, point, pair, "amin")  # (N,): one image a point
        hit = first < len(point)
        x_adv[hit], fooled[hit] = images[first[hit]], True
        return ~fooled[point]  # a point's other targets stop with it

    points = torch.arange(len(x), device=x.device)
    point, rank = points.repeat(ranks), torch.arange(ranks, device=x.device).repeat_interleave(len(x))
    while len(point):
        attack(point[:batch_size], rank[:batch_size], record)
        point, rank = point[batch_size:], rank[batch_size:]
        point, rank = point[~fooled[point]], rank[~fooled[point]]
    return x_adv


# ---- APGD ----------------------------------------------------------------------------------------------------------


def dlr_loss(logits, y):
    """Difference of logits ratio, -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)), (N,). ValueError if K < 3."""
    if logits.shape[1] < 3:
        raise ValueError("the DLR loss needs at least 3 classes")
    z = logits.sort(1, descending=True).values
    return -pm(logits, y) / (z[:, 0] - z[:, 2] + 1e-12)


def dlr_targeted_loss(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), (N,). ValueError if K < 4."""
    if logits.shape[1] < 4:
        raise ValueError("the targeted DLR loss needs at least 4 classes")
    z = logits.sort(1, descending=True).values
    gap = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
    return -gap / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + 1e-12)


def apgd_checks(steps):
    """{iteration: window} where APGD reviews its step size: after 22% of the steps, then 3% less each, at least 6%."""
    checks, window, iteration = {}, max(int(0.22 * steps), 1), -1
    while (iteration := iteration + window) < steps:
        checks[iteration] = window
        window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return checks


def apgd(model, x, y, *, eps, steps=100, loss="ce", seed=0, index=None, batch_size=64, amp=False):
    """Auto-PGD (Croce & Hein 2020), one restart.

    x: (N, C, H, W) in [0, 1]. y: (N,). loss: "ce", "dlr" or "targeted", the DLR loss towards each of the nine likeliest
    other classes. index: (N,) numbers of the images, for their noise. batch_size: of the forward passes. amp: bfloat16.
    Returns (N, C, H, W): a point's first misclassified iterate, x where there is none. ValueError on another loss or
    too few classes for DLR.
    """
    if loss not in ("ce", "dlr", "targeted"):
        raise ValueError(f"unknown loss {loss!r}: use ce, dlr or targeted")
    index, checks = numbered(x, index), apgd_checks(steps)

    def loss_and_grad(x, y, target, differentiate=True):
        x = x.detach().requires_grad_()
        logits = predict(model, x, amp)
        if loss == "ce":
            value = F.cross_entropy(logits, y, reduction="none")
        else:
            value = dlr_loss(logits, y) if loss == "dlr" else dlr_targeted_loss(logits, y, target)
        grad = torch.autograd.grad(value.sum(), x)[0] if differentiate else torch.zeros_like(x)
        return value.detach(), grad, is_fooled(model, logits.detach(), x.detach(), y, amp)

    def attack(point, rank, record):
        t = 2 * noise(x.shape[1:], index[point.cpu()], seed, rank.cpu()).to(x) - 1
        # A point's state: x, value and grad of this iterate; `before`, `last` of the one before; `best*` so far;
        # `rises` of the value in this window; `checked_value`, the best at the last check, where the step was `halved`.
        s = SimpleNamespace(point=point, y=y[point], target=targets[rank, point])
        s.lower, s.upper = (x[point] - eps).clamp(min=0), (x[point] + eps).clamp(max=1)
        s.x = (x[point] + eps * t / (t.abs().amax((1, 2, 3), keepdim=True) + 1e-12)).clamp(0, 1)
        s.value, s.grad, wrong = loss_and_grad(s.x, s.y, s.target)
        s.before, s.best, s.best_grad, s.best_value, s.checked_value = s.x, s.x, s.grad, s.value, s.value
        s.rises = torch.zeros_like(s.value)
        s.last = torch.zeros_like(s.value)  # as published: the start's value is no part of the history
        s.step, s.halved = torch.full_like(s.value, 2 * eps), torch.ones_like(wrong)
        s = select(s, record(s.point, wrong, s.x))
        for i in range(steps):
            if not len(s.point):
                return
            ahead = (s.x + widen(s.step) * s.grad.sign()).clamp(s.lower, s.upper)
            a = 0.75 if i else 1.0
            moved = s.x + a * (ahead - s.x) + (1 - a) * (s.x - s.before)
            s.x, s.before = moved.clamp(s.lower, s.upper), s.x
            s.value, s.grad, wrong = loss_and_grad(s.x, s.y, s.target, differentiate=i < steps - 1)
            if wrong.any():
                s = select(s, record(s.point, wrong, s.x))
            better = s.value > s.best_value
            s.best = torch.where(widen(better), s.x, s.best)
            s.best_grad = torch.where(widen(better), s.grad, s.best_grad)
            s.best_value = torch.where(better, s.value, s.best_value)
            s.rises, s.last = s.rises + (s.value > s.last), s.value
            if i in checks:
                stuck = (s.rises <= 0.75 * checks[i]) | (~s.halved & (s.checked_value >= s.best_value))
                s.step = torch.where(stuck, s.step / 2, s.step)
                s.x = torch.where(widen(stuck), s.best, s.x)  # but not s.before: the next momentum is best - before
                s.grad = torch.where(widen(stuck), s.best_grad, s.grad)
                s.halved, s.checked_value, s.rises = stuck, s.best_value, torch.zeros_like(s.rises)

    with frozen(model), torch.enable_grad():
        targets = targets_of(model, x, y, batch_size) if loss == "targeted" else y[None]
        return attack_pairs(attack, x, len(targets), batch_size)


# ---- FAB -----------------------------------------------------------------------------------------------------------


def project(t, w, b):
    """The smallest L-infinity move d, (N, D), from t (N, D) in [0, 1] onto the hyperplane <w, t + d> = b inside [0, 1].

    w: (N, D), b: (N,). Where the box does not reach the plane, d ends in the corner nearest to it; where w = 0, d is 0.
    Each d_i is -sign(w_i) min(lambda, room_i); Newton's iteration from lambda = 0 rises to the solution in a few steps.
    """
    c = (w * t).sum(1) - b
    w, c = w * torch.where(c < 0, -1, 1)[:, None], c.abs()[:, None]
    room, slope = torch.where(w > 0, t, 1 - t), w.abs()
    reach, level = slope * room, torch.zeros_like(c)  # (N, D), (N, 1): lambda
    while True:
        free = room > level
        denominator = slope.where(free, 0).sum(1, keepdim=True)
        raised = (c - reach.where(~free, 0).sum(1, keepdim=True)) / denominator
        raised = raised.where(denominator > 0, torch.inf)
        if not (raised > level).any():
            return -w.sign() * torch.minimum(level, room)
        level = torch.maximum(level, raised)


def fab_t(model, x, y, *, eps, steps=100, seed=0, index=None, batch_size=64, amp=False):
    """Targeted FAB (Croce & Hein 2020b) towards each of the nine likeliest other classes; no randomness, no restarts.

    x: (N, C, H, W) in [0, 1]. y: (N,). seed and index are ignored. batch_size: of the forward passes. amp: bfloat16.
    Returns (N, C, H, W): a misclassified image inside the ball for each point, x where none was found. A point leaves
    at its first: FAB would go on to lessen its distance, which the verdict does not need.
    """

    def attack(point, rank, record):
        s = SimpleNamespace(point=point, y=y[point], target=targets[rank, point], clean=x[point], x=x[point])
        for _ in range(steps):
            inputs = s.x.detach().requires_grad_()
            logits = predict(model, inputs, amp)
            f = (logits.gather(1, s.target[:, None]) - logits.gather(1, s.y[:, None])).squeeze(1)  # (n,): z_t - z_y
            w = torch.autograd.grad(f.sum(), inputs)[0].flatten(1)
            now, clean = s.x.flatten(1), s.clean.flatten(1)  # (n, D)
            b = (w * now).sum(1) - f.detach()  # the boundary, seen from s.x, is <w, .> = b
            d1, d2 = project(torch.cat([now, clean]), torch.cat([w, w]), torch.cat([b, b])).chunk(2)
            a1, a2 = (d.abs().amax(1, keepdim=True).clamp(min=1e-8) for d in (d1, d2))
            alpha = (a1 / (a1 + a2)).clamp(max=0.1)
            moved = (now + 1.05 * d1) * (1 - alpha) + (clean + 1.05 * d2) * alpha
            s.x = moved.clamp(0, 1).view_as(s.x)
            with torch.no_grad():
                wrong = is_fooled(model, predict(model, s.x, amp), s.x, s.y, amp)
            near = (s.x - s.clean).abs().amax((1, 2, 3)) <= eps
            s.x = torch.where(widen(wrong & ~near), s.clean + 0.9 * (s.x - s.clean), s.x)  # from outside, back
            if (wrong & near).any():
                s = select(s, record(s.point, wrong & near, s.x))
                if not len(s.point):
                    return

    with frozen(model), torch.enable_grad():
        targets = targets_of(model, x, y, batch_size)
        return attack_pairs(attack, x, len(targets), batch_size)


# ---- Square --------------------------------------------------------------------------------------------------------


def square_side(query, height, width):
    """Side of Square's window at a query (0-based): 80% of the image's area, halved after queries 10, 50, 200, ..."""
    p = 0.8 / 2 ** sum(query > after for after in (10, 50, 200, 500, 1000, 2000, 4000))
    return min(max(round(math.sqrt(p * height * width)), 1), height, width)


def square(model, x, y, *, eps, queries=5000, seed=0, index=None, batch_size=64, amp=False):
    """Square attack (Andriushchenko et al. 2020), one restart: random search on the margin z_y - max_{j != y} z_j.

    x: (N, C, H, W) in [0, 1]. y: (N,). amp is ignored: gains are smaller than the spacing of bfloat16 logits.
    Returns (N, C, H, W): for each point an image whose margin is not positive, x where none was found.
    """
    index, (channels, height, width) = numbered(x, index), x.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    rand = torch.rand(queries, 2, generator=generator, dtype=torch.float64).tolist()
    signs = torch.rand(queries, channels, 1, 1, generator=generator).sub(0.5).sign().to(x)

    def attack(point, rank, record):
        s = SimpleNamespace(point=point, y=y[point])
        s.lower, s.upper = (x[point] - eps).clamp(min=0), (x[point] + eps).clamp(max=1)
        stripes = noise((channels, 1, width), index[point.cpu()], seed).sub(0.5).sign().to(x)
        s.x = (x[point] + eps * stripes).clamp(0, 1)
        s.margin = pm(predict(model, s.x), s.y)
        for q in range(queries):
            if (s.margin <= 0).any():
                s = select(s, record(s.point, s.margin <= 0, s.x))
            if not len(s.point):
                return
            side = square_side(q, height, width)
            top, left = (int((size - side) * r) for size, r in zip((height, width), rand[q], strict=True))
            window = (..., slice(top, top + side), slice(left, left + side))
            kept = s.x[window].clone()
            s.x[window] = (kept + 2 * eps * signs[q]).clamp(s.lower[window], s.upper[window])
            tried = pm(predict(model, s.x), s.y)
            accepted = tried < s.margin
            s.x[window] = torch.where(widen(accepted), s.x[window], kept)
            s.margin = torch.where(accepted, tried, s.margin)
        record(s.point, s.margin <= 0, s.x)

    with frozen(model), torch.no_grad():
        return attack_pairs(attack, x, 1, batch_size)


# ---- The attacks by name -------------------------------------------------------------------------------------------


def uniform_pgd(
    model, x, y, *, eps, steps, step_size=0.003, loss="ce", seed=0, index=None, batch_size=64, amp=False, start=None
):
    """PGD as in MAIL's evaluation: step 0.003, uniform start in the ball, or from `start`, an earlier call's result.

    Returns the last iterate, (N, C, H, W).
    """
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=amp)
    if start is None:
        start = x + eps * (2 * noise(x.shape[1:], numbered(x, index), seed).to(x) - 1)
    parts = zip(*(t.split(batch_size) for t in (x, y, start)), strict=True)
    options = {"eps": eps, "step_size": step_size, "steps": steps, "loss": loss, "autocast": autocast}
    return torch.cat([pgd(model, x_, y_, init=start_, **options) for x_, y_, start_ in parts])


def fgsm(model, x, y, *, eps, **options):
    """Fast gradient sign method (Eq. 1), one step of eps from x."""
    return uniform_pgd(model, x, y, eps=eps, step_size=eps, steps=1, start=x, **options)


STAGES = {"apgd": apgd, "apgd-t": partial(apgd, loss="targeted"), "fab-t": fab_t, "square": square}  # of AutoAttack


def autoattack(model, x, y, *, eps, seed=0, index=None, batch_size=64, amp=False):
    """Standard AutoAttack for L-infinity (Croce & Hein 2020): four attacks in turn on what is still robust.

    x: (N, C, H, W) in [0, 1]. y: (N,). index: (N,) numbers of the images, for their noise. With fewer than four classes
    targeted APGD, whose loss needs four, is left out. Returns (N, C, H, W): a misclassified image for each point, x
    where none was found or where x itself is misclassified. RuntimeError if one leaves the ball, which would be a bug.
    On CUDA set torch.backends.cudnn.allow_tf32 = False, as the command line does: or convolutions are not float32.
    """
    index, x_adv = numbered(x, index), x.clone()
    with frozen(model):
        logits = logits_of(model, x, batch_size)
    robust = (~is_wrong(logits, y)).nonzero().squeeze(1)  # (R,) of x
    for name in applicable(STAGES, logits.shape[1]):
        if len(robust):
            options = {"eps": eps, "seed": seed, "index": index[robust.cpu()], "batch_size": batch_size, "amp": amp}
            found = STAGES[name](model, x[robust], y[robust], **options)
            wrong = verdict(model, x[robust], y[robust], found, eps, batch_size)
            x_adv[robust[wrong]] = found[wrong]
            robust = robust[~wrong]
    return x_adv


ATTACKS = {
    "nat": lambda model, x, y, **_: x,
    "fgsm": fgsm,
    "pgd20": partial(uniform_pgd, steps=20),
    "pgd100": partial(uniform_pgd, steps=100),
    "cw": partial(uniform_pgd, steps=20, loss="cw"),  # PGD on CW's margin, as in MAIL's evaluation
    "apgd": apgd,
    "aa": autoattack,
}


# ---- Evaluation ----------------------------------------------------------------------------------------------------


def applicable(names, num_classes):
    """names without targeted APGD, and a warning, if there are too few classes for its loss."""
    if "apgd-t" in names and num_classes < 4:
        warnings.warn(f"{num_classes} classes are too few for targeted APGD: AutoAttack goes without", stacklevel=3)
    return [name for name in names if name != "apgd-t" or num_classes > 3]


def verdict(model, x, y, x_adv, eps, batch_size):
    """Which of x_adv (N, C, H, W) the model misclassifies, (N,), by a fresh forward. RuntimeError on bad images."""
    if not (x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1 and (x_adv - x).abs().max() <= eps + 1e-6):
        raise RuntimeError("an adversarial image is not finite, in [0, 1] and in the ball: a bug, please report it")
    with frozen(model):
        return is_wrong(logits_of(model, x_adv, batch_size), y)


def accelerate(model, x):
    """A copy of the model to attack: channels last, BatchNorm folded into convolutions, equal up to rounding.

    x: some images, to check that on: a model that folding would change is only copied.
    """
    with contextlib.suppress(Exception), frozen(model), torch.no_grad():  # folding may not fit another family's model
        fast = models.folded(model).to(memory_format=torch.channels_last)
        if torch.allclose(fast(x), model(x), rtol=1e-4, atol=1e-4):
            return fast
    return copy.deepcopy(model).eval().to(memory_format=torch.channels_last)


def chain(name):
    """The verdicts that an attack's column needs: AutoAttack and APGD-CE, its first stage, count on from NAT."""
    stages = ["nat", *STAGES]
    if name == "aa":
        return stages
    return stages[: stages.index(name) + 1] if name in STAGES else [name]


def survivors(verdicts, names, n):
    """Which of the first n images no attack in names fools, (n,)."""
    return torch.stack([verdicts[name][:n] == 0 for name in names if name in verdicts]).all(0)


def evaluate(model, x, y, attacks, *, n=None, eps, seed=0, batch_size=64, amp=False, verdicts=None, save=None):
    """Verdicts of `attacks`, names from ATTACKS, on the first n of uint8 images x (N, C, H, W) with labels y (N,).

    Returns {name: (N,) int8}: 1 misclassified, 0 not, -1 not asked. For AutoAttack these are its stages, each asked
    only of images that are still robust. verdicts: such a dict of an earlier call with the same settings, filled up in
    place. save(): called after every batch; under torchrun, where the processes share the images, after every attack.
    ValueError on an unknown attack.
    """
    if unknown := set(attacks) - ATTACKS.keys():
        raise ValueError(f"unknown attacks {', '.join(sorted(unknown))}: use {', '.join(ATTACKS)}")
    n = len(x) if n is None else n
    verdicts = {} if verdicts is None else verdicts
    fast = accelerate(model, x[:8].float() / 255)  # is attacked; the verdict is the model's own
    options = {"eps": eps, "seed": seed, "batch_size": batch_size, "amp": amp}
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def judge(name, index, x_adv):
        wrong = verdict(model, x[index].float() / 255, y[index], x_adv.contiguous(), eps, batch_size)
        verdicts[name][index] = wrong.to("cpu", torch.int8)

    with frozen(model), torch.no_grad():
        num_classes = model(x[:1].float() / 255).shape[1]
    wanted = {"nat", *attacks} | (set(STAGES) if "aa" in attacks else set())
    plan = [name for name in ("nat", "fgsm", "pgd100", "pgd20", "cw", *STAGES) if name in wanted]
    for name in applicable(plan, num_classes):
        columns = ("pgd20", "pgd100") if name == "pgd100" else (name,)
        for column in columns:
            verdicts.setdefault(column, torch.full((len(x),), -1, dtype=torch.int8))
        todo = verdicts[name][:n] < 0
        if name in STAGES:
            todo &= survivors(verdicts, chain(name)[:-1], n)
        todo, begun, done = todo.nonzero().squeeze(1)[rank::world], time.perf_counter(), 0
        for index in todo.split(batch_size) if len(todo) else ():
            images, labels = to_input(x[index]), y[index]
            if name == "pgd100":  # its first 20 steps are PGD-20
                first = ATTACKS["pgd20"](fast, images, labels, index=index, **options)
                judge("pgd20", index, first)
                x_adv = uniform_pgd(fast, images, labels, steps=80, start=first, **options)
            else:
                x_adv = (ATTACKS | STAGES)[name](fast, images, labels, index=index, **options)
            judge(name, index, x_adv)
            if name in STAGES:  # what fools the copy but not the model: attack the model itself
                again = (verdicts[name][index] == 0) & (x_adv != images).flatten(1).any(1).cpu()
                if again.any():
                    x_adv = STAGES[name](model, images[again], labels[again], index=index[again], **options)
                    judge(name, index[again], x_adv)
            done += len(index)
            if save and world == 1:
                save()
            if sys.stderr.isatty() and rank == 0:
                known = verdicts[name][:n]
                left = (time.perf_counter() - begun) / done * (len(todo) - done)
                line = f"{name}: {len(todo) - done} images left, {left:.0f} s, "
                line += f"{(known == 0).sum()} of {(known >= 0).sum()} robust\033[K"
                print(line, end="\r", file=sys.stderr)
        if world > 1:
            for column in columns:
                merged = verdicts[column].to(x.device)
                dist.all_reduce(merged, dist.ReduceOp.MAX)
                verdicts[column] = merged.cpu()
            if save and rank == 0:
                save()
    return verdicts


def doubts(model, x, y, figures):
    """Sentences on what makes `summarise`'s figures doubtful; x: uint8 images (N, C, H, W) with labels y (N,)."""
    found = []
    x, y = x[:64].float() / 255, y[:64]
    with frozen(model):
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), inputs)
        again = model(x)
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-4:
        found.append("the model seems to return probabilities: the attacks want logits")
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5):
        found.append("the model is random: two forwards of one batch differ, and these attacks do not average")
    if (share := 1 - (grad.flatten(1).abs() > 0).any(1).float().mean().item()) > 0.02:  # NaN is not > 0 either
        found.append(f"the gradient is zero or NaN at {share:.0%} of the images: white-box attacks are blind there")
    accuracy = {name: figure["accuracy"] for name, figure in figures.items()}
    if "aa" in figures and (gap := max(accuracy.get(name, 0) for name in ("pgd20", "pgd100")) - accuracy["aa"]) > 3:
        usual = "the paper's AT: 4 to 5, its MAIL-AT and CLIRAT: 11 to 15"
        found.append(f"AutoAttack is {gap:.1f} points under PGD, which overstates robustness ({usual})")
    if "aa" in figures and (gap := accuracy["fab-t"] - accuracy["square"]) > 0.2:
        found.append(f"Square takes {gap:.1f} points more than the white-box attacks: gradients are masked")
    return found


# ---- Output --------------------------------------------------------------------------------------------------------

PAPER_COLUMNS = ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]
PAPER = {  # Tables 1 and 2: accuracy (%), mean ± std; on how many images and seeds is not stated
    "resnet18": """
        at          85.64 ± 0.25, 52.08 ± 0.25, 49.33 ± 0.19, 51.94 ± 0.20, 48.53 ± 0.19, 46.87 ± 0.62
        trades      84.37 ± 0.13, 54.36 ± 0.20, 52.68 ± 0.28, 51.96 ± 0.61, 52.07 ± 0.59, 48.73 ± 0.49
        mart        82.24 ± 0.29, 55.40 ± 0.30, 53.36 ± 0.50, 51.35 ± 0.44, 53.07 ± 1.01, 47.50 ± 0.46
        mail-at     83.74 ± 0.43, 58.56 ± 0.25, 57.63 ± 0.20, 50.72 ± 0.22, 55.70 ± 0.43, 46.47 ± 0.46
        mail-trades 82.35 ± 0.20, 55.05 ± 0.11, 53.71 ± 0.11, 52.08 ± 0.15, 53.27 ± 0.52, 49.43 ± 0.65
        mail-mart   83.45 ± 0.26, 55.10 ± 0.29, 53.08 ± 0.34, 51.06 ± 0.13, 52.43 ± 1.47, 46.47 ± 0.90
        clirat      83.60 ± 0.26, 60.31 ± 0.16, 59.33 ± 0.17, 50.66 ± 0.20, 58.83 ± 1.02, 45.50 ± 0.90
        clir-trades 82.08 ± 0.17, 55.08 ± 0.27, 53.87 ± 0.34, 52.10 ± 0.17, 53.77 ± 0.66, 49.17 ± 0.50
        clir-mart   83.45 ± 0.11, 55.30 ± 0.53, 53.45 ± 0.37, 51.15 ± 0.26, 52.13 ± 1.10, 46.50 ± 0.70""",
    "wrn-32-10": """
        at          87.86 ± 0.01, 52.07 ± 0.07, 49.10 ± 0.10, 52.76 ± 0.20, 48.35 ± 0.75, 47.75 ± 0.65
        trades      87.06 ± 0.31, 55.25 ± 0.04, 52.63 ± 0.06, 54.97 ± 0.03, 52.75 ± 0.55, 51.25 ± 0.05
        mart        85.67 ± 0.15, 56.47 ± 0.12, 53.43 ± 0.14, 51.92 ± 0.16, 54.10 ± 0.60, 50.55 ± 0.65
        mail-at     86.22 ± 0.12, 61.38 ± 0.17, 60.47 ± 0.11, 54.14 ± 0.05, 60.40 ± 0.01, 50.20 ± 0.50
        mail-trades 85.91 ± 0.10, 56.39 ± 0.14, 54.61 ± 0.35, 55.01 ± 0.10, 52.95 ± 0.65, 51.00 ± 0.50
        mail-mart   85.91 ± 0.10, 56.39 ± 0.14, 53.88 ± 0.01, 53.39 ± 0.11, 53.65 ± 0.55, 49.45 ± 1.05
        clirat      86.36 ± 0.14, 63.67 ± 0.11, 62.00 ± 0.01, 54.03 ± 0.12, 62.45 ± 0.55, 50.04 ± 0.10
        clir-trades 85.47 ± 0.10, 56.39 ± 0.09, 54.53 ± 0.11, 54.86 ± 0.15, 53.50 ± 0.70, 51.35 ± 0.15
        clir-mart   85.97 ± 0.32, 56.02 ± 0.06, 53.24 ± 0.32, 53.25 ± 0.08, 52.90 ± 0.01, 48.30 ± 0.80""",
}
PAPER["wrn-34-10"] = PAPER["wrn-32-10"]  # the same network, counted differently


def wilson(k, n, z=1.96):
    """95% interval of a proportion k / n (Wilson 1927), as (low, high) in [0, 1]."""
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def print_row(label, n, eps, cells):
    print(f"| {label} | {n} | {255 * eps:.4g}/255 | {' | '.join(cells)} |", flush=True)


def paper_row(metadata, attacks):
    """The paper's cells for a method and architecture, or None."""
    for line in PAPER.get(metadata.get("arch"), "").strip().splitlines():
        method, cells = line.split(maxsplit=1)
        if method == metadata.get("method"):
            values = dict(zip(PAPER_COLUMNS, cells.split(", "), strict=True))
            return [values.get(name, "") for name in attacks]
    return None


def run_name(checkpoint):
    """Folder and file of a checkpoint, without a trailing -s<seed> of the folder: one name for all seeds of a run."""
    return f"{re.sub(r'-s[0-9]+$', '', checkpoint.resolve().parent.name)}/{checkpoint.name}"


def paired_cell(ours, theirs):
    """Difference in robust accuracy (points) of two methods' runs on the same images.

    ours, theirs: (S, n) bool, survivors of the runs of S seeds. Returns the mean, its std over the seeds if there are
    several, and the 95% interval over the images, as text.
    """
    difference = 100 * (ours.double() - theirs.double())
    spread = f" ± {difference.mean(1).std():.2f}" if len(ours) > 1 else ""
    mean, half = difference.mean(), 1.96 * difference.mean(0).std(correction=0) / difference.shape[1] ** 0.5
    return f"{mean:+.2f}{spread} [{mean - half:+.1f}, {mean + half:+.1f}]"


def draw_curves(runs, out):
    """Draw the log.csv of run folders: NAT and PGD-20 (Figs. 3, 5), misclassified training examples (Fig. 1A).

    Folders that differ in a trailing -s<seed> alone share a colour. ValueError without matplotlib, or on a bad log.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--curves needs matplotlib: pip install matplotlib") from None
    panels = {"nat": "NAT (%)", "pgd20": "PGD-20 (%)"}
    panels |= {"single_cl": "training examples with one confused label (%)", "multi_cl": "... with several (%)"}
    figure = Figure(figsize=(12, 8), layout="constrained")
    axes, colours = list(figure.subplots(2, 2).flat), {}
    for run in runs:
        name = run_name(run / "log.csv").removesuffix("/log.csv")
        first, colour = name not in colours, colours.setdefault(name, f"C{len(colours)}")
        with open(run / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        try:
            for axis, column in zip(axes, panels, strict=True):
                points = [(int(row["epoch"]), 100 * float(row[column])) for row in rows if row[column]]
                axis.plot(*zip(*points, strict=True), color=colour, label=name if first else None)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{run / 'log.csv'} is no log of clirat.py") from None
    for axis, title in zip(axes, panels.values(), strict=True):
        axis.set(xlabel="epoch", title=title)
        axis.grid(alpha=0.3)
    axes[2].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:] or "png", dpi=110)
    write(out, picture.getbuffer())


# ---- Command line --------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="eval_attacks.py", description="Robust accuracy of checkpoints, a row each of the paper's Tables 1 and 2."
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT", help="of clirat.py or of the TRADES/MART/MAIL family")
    add("--attacks", nargs="+", choices=ATTACKS, default=PAPER_COLUMNS, help="columns (default: the paper's six)")
    add("--arch", type=str, help="for a checkpoint that does not name its own: resnet18 or wrn-D-K")
    add("--data", type=str, default="data", help="CIFAR-10 folder, FILE.npz or toy (default: %(default)s)")
    add("--n", type=number(int, 1), help="on the first N test images (default: all)")
    add("--batch-size", type=number(int, 1), default=64, help="a GPU wants more (default: %(default)s)")
    add("--eps", type=number(float, 0, 1), default="8/255", help="L-infinity radius (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the attacks' noise (default: %(default)s)")
    add("--amp", action="store_true", help="attack in bfloat16; only float32 counts an image as fooled")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=str, default=default_device, help="such as cpu or cuda:1 (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add("--curves", nargs="+", type=Path, metavar="RUN", help="draw the log.csv of run folders, and evaluate nothing")
    add("--out", type=Path, metavar="FILE.png", help="where to draw --curves")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, without the usage
    args = parser.parse_args(argv)
    if bool(args.checkpoints) == bool(args.curves) or bool(args.curves) != bool(args.out):
        parser.error("give either checkpoints to evaluate, or --curves RUN [RUN ...] --out FILE.png")
    return parser, args


VERSION = 3  # of the attacks: verdicts of another version are not reused


def digest(*tensors):
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def open_verdicts(path, settings):
    """Verdicts kept beside a checkpoint for exactly these settings, and save() to keep them: (dict, function).

    The file maps `<key>/<attack or stage>` to (N,) int8, 1 misclassified, 0 not, -1 not asked, and `<key>/settings`
    to what the key stands for, as JSON. It holds verdicts of other settings too; nothing is mixed or lost.
    """
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    arrays = {}
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception as error:  # a damaged file can raise nearly anything
            raise ValueError(f"{path} is damaged ({error}): delete it to evaluate afresh") from None
    arrays[f"{key}/settings"] = np.array(json.dumps(settings))
    kept = {name.removeprefix(f"{key}/"): array for name, array in arrays.items() if name.startswith(f"{key}/")}
    del kept["settings"]
    verdicts = {name: torch.from_numpy(array) for name, array in kept.items()}

    def save():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays | {f"{key}/{name}": t.numpy() for name, t in verdicts.items()})
        write(path, buffer.getbuffer())

    return verdicts, save


def summarise(verdicts, attacks, n):
    """{name: {robust, accuracy (%), interval (%)}} for attacks and the stages of AutoAttack that were run."""
    figures = {}
    for name in [*attacks, *(stage for stage in STAGES if "aa" in attacks and stage in verdicts)]:
        k = survivors(verdicts, chain(name), n).sum().item()
        figures[name] = {"robust": k, "accuracy": 100 * k / n, "interval": [100 * end for end in wilson(k, n)]}
    return figures


def main(argv=None):
    parser, args = parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # verdicts are float32
    error = None
    try:
        if args.curves:
            return draw_curves(args.curves, args.out)
        args.device = join_processes(args.device)
        device = open_device(args.device)
        args.checkpoints = list({Path(path).resolve(): path for path in args.checkpoints}.values())
        networks = [models.load(path, args.arch) for path in args.checkpoints]
        x, y = (t.to(device) for t in load_data_once(args.data)[2:])
        n = args.n or len(x)
        if n > len(x):
            raise ValueError(f"--n {n} is more than the {len(x)} test images")
        if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
            raise ValueError(f"--json {args.json} is a folder, or in a folder that does not exist")
        common = {"data": digest(x, y), "eps": args.eps, "seed": args.seed, "amp": args.amp, "version": VERSION}
        stores, _locks = [], []  # verdicts; locks held until the process ends
        for path, (model, _) in zip(map(Path, args.checkpoints), networks, strict=True):
            classes = list(model.parameters())[-1].numel()  # the last layer's bias
            if y.max() >= classes:
                raise ValueError(f"{path} knows {classes} classes, {args.data} has labels up to {y.max()}")
            if is_lead():
                _locks.append(lock(path.with_name(f".{path.name}.eval.lock")))
            settings = common | {"weights": digest(*model.state_dict().values())}
            stores.append(open_verdicts(path.with_name(f"{path.name}.eval.npz"), settings))
    except (OSError, ValueError) as bad_input:
        error = f"{parser.prog}: error: {bad_input}"
    exit_if_any(error)

    results, runs = [], {}
    if is_lead():
        print(f"| checkpoint | n | eps | {' | '.join(map(str.upper, args.attacks))} |")
        print(f"|---{'|---' * (2 + len(args.attacks))}|", flush=True)
    try:
        for path, (model, metadata), (verdicts, save) in zip(args.checkpoints, networks, stores, strict=True):
            options = {"eps": args.eps, "seed": args.seed, "batch_size": args.batch_size, "amp": args.amp}
            model.to(device)
            evaluate(model, x, y, args.attacks, n=n, verdicts=verdicts, save=save, **options)
            if not is_lead():
                continue
            figures = summarise(verdicts, args.attacks, n)
            cell = "{accuracy:.2f} [{interval[0]:.1f}, {interval[1]:.1f}]"
            cells = [cell.format(**figures[name]) for name in args.attacks]
            print_row(path, n, args.eps, cells)
            if reference := paper_row(metadata, args.attacks):
                print_row(f"the paper's {metadata['method']}, {metadata['arch']}", "?", 8 / 255, reference)
            found = doubts(model, x[:n], y[:n], figures)
            for doubt in found:
                print(f"warning: {path}: {doubt}", file=sys.stderr)
            apart = {"seed", "init", "log", "best", "eval_every", "eval_size"}  # may differ between a method's seeds
            if "selected_by" in metadata:
                apart.add("epoch")
            same = {key: value for key, value in metadata.items() if key not in apart}
            if {"method", "arch", "seed"} <= metadata.keys():
                robust = [survivors(verdicts, chain(name), n) for name in args.attacks]
                _, seeds = runs.setdefault(json.dumps(same, default=str), (run_name(Path(path)), {}))
                seeds[metadata["seed"]] = torch.stack(robust)  # (A, n)
            about = {"checkpoint": path, "n": n, **common, "attacks": figures, "warnings": found}
            results.append(about | {"training": {key: value for key, value in metadata.items() if key != "log"}})
        groups = list(runs.values())
        for name, seeds in groups:
            if len(seeds) > 1:
                columns = 100 * torch.stack(list(seeds.values()), 1).double().mean(2)  # (A, S)
                cells = [f"{column.mean():.2f} ± {column.std():.2f}" for column in columns]
                print_row(f"{name}, mean ± std of {len(seeds)} seeds", n, args.eps, cells)
        for name, seeds in groups[1:]:
            first, base = groups[0]
            if both := seeds.keys() & base.keys():
                ours, theirs = (torch.stack([group[seed] for seed in both], 1) for group in (seeds, base))  # (A, S, n)
                cells = [paired_cell(*pair) for pair in zip(ours, theirs, strict=True)]
                print_row(f"{name} minus {first}, paired, seeds: {len(both)}", n, args.eps, cells)
        if args.json and is_lead():
            write(args.json, json.dumps(results, indent=2, default=str).encode() + b"\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped: the same command goes on from there\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: cannot write ({error}); the verdicts kept so far are whole\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
