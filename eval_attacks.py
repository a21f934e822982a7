"""Robust accuracy under the paper's attacks: NAT, PGD-20, PGD-100, CW, APGD-CE and AutoAttack.

    python eval_attacks.py runs/clirat-resnet18-s1/last.pt --attacks nat pgd20 pgd100 cw apgd aa

AutoAttack is the standard version for L-infinity (Croce & Hein 2020): APGD-CE, targeted APGD,
targeted FAB and Square, each on what is still robust. Every attack works on any function that maps
images (N, C, H, W) in [0, 1] to logits (N, K), and returns images in the ball around x. Noise
belongs to an image's number (`index`): batch size, order and the other images change a verdict by
rounding at most.

Options that the attacks share: seed of the noise; index (N,), the images' numbers, 0..N-1 by
default; batch_size of the forward passes; judge, the model whose verdict counts where `model` is
only a faster copy of it; tick(passes), called after each step with the number of images that went
through the model, a backward counted as a forward. ValueError or TypeError, in one line, on images
outside [0, 1], labels that are no classes, or a model that does not return logits.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch is being imported: no traceback
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import models
from clirat import (
    bad_input_ends_all,
    check_attack,
    frozen,
    graphed,
    is_lead,
    is_wrong,
    join_processes,
    load_data,
    make_parser,
    number,
    pgd,
    pm,
    rank_and_world,
    stop,
    write,
)

# ---- Common --------------------------------------------------------------------------------------


def checked(model, x, y, eps, index=None):
    """An attack's x, y, index and K; what it cannot take is a ValueError or TypeError."""
    check_attack(x, y, eps)
    with frozen(model), torch.no_grad():
        try:
            logits = model(x[:1])
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            found = f"{x.dtype} images {tuple(x.shape[1:])}"
            raise TypeError(f"the model does not take {found}: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        hint = "wrap it, such as lambda x: model(x)[0]"
        raise TypeError(f"the model must return logits (N, K), not {found}: {hint}")
    if y.max() >= logits.shape[1]:
        raise ValueError(f"want labels in 0..{logits.shape[1] - 1}, got {y.max()}")
    index = torch.arange(len(x)) if index is None else index.cpu()
    if index.shape != y.shape or index.min() < 0:
        raise ValueError(f"want index ({len(x)},), none negative, got {tuple(index.shape)}")
    return x.detach(), y.long(), index, logits.shape[1]


def noise(shape, index, *seeds):
    """Uniform [0, 1) noise (N, *shape), each point's drawn from its number in index and seeds."""
    generator, draws = torch.Generator(), []
    for i in index.tolist():
        seed = np.random.SeedSequence([i, *seeds]).generate_state(1)[0]
        draws.append(torch.rand(shape, generator=generator.manual_seed(int(seed))))
    return torch.stack(draws)


def in_batches(attack, x, batch_size, targets=1):
    """Run attack(points, k), for k = 0..targets-1 in turn, on batches of the points still robust.

    It takes indices into x and returns images and which of them are misclassified.
    Returns each point's first such image, x where there is none.
    """
    x_adv, robust = x.clone(), torch.ones(len(x), dtype=torch.bool, device=x.device)
    for k in range(targets):
        for points in robust.nonzero().squeeze(1).split(batch_size):
            if len(points):
                images, fooled = attack(points, k)
                x_adv[points[fooled]] = images[fooled]
                robust[points[fooled]] = False
    return x_adv


def graph_device(model):
    """Where to record CUDA graphs: nowhere (cpu) but for copies of networks that read no value."""
    if isinstance(model, models.Folded) and type(model.net) in (models.ResNet18, models.WideResNet):
        return next(model.parameters()).device
    return torch.device("cpu")


def on_active(function, model, batch_size, tick, passes):
    """function of rows -> the same with a mask before them: it sees, and gives, active rows alone.

    The other rows are 0. In a CUDA graph the rows are padded, to at most eight sizes. passes: how
    often a call takes a row through the model.
    """
    device = graph_device(model)
    run, eighth = graphed(function, device), math.ceil(batch_size / 8)

    def call(active, *rows):
        index = active.nonzero().squeeze(1)  # (n,)
        padded = F.pad(index, (0, -len(index) % eighth)) if device.type == "cuda" else index
        results = []
        for output in run(*(t[padded] for t in rows)):
            zeros = output.new_zeros(len(active), *output.shape[1:])
            results.append(zeros.index_copy_(0, index, output[: len(index)]))
        if tick:
            tick(passes * len(index))
        return results

    return call


def confirmed(judge, wrong, x, y):
    """wrong (N,) where the judge, if there is one, agrees."""
    if judge is not None and wrong.any():
        with frozen(judge), torch.no_grad():
            wrong = wrong.masked_scatter(wrong, is_wrong(judge(x[wrong]), y[wrong]))
    return wrong


def logits_of(model, x, batch_size):
    """Logits (N, K) without a gradient, batch by batch."""
    with torch.no_grad():
        return torch.cat([model(part) for part in x.split(batch_size)])


def targets_of(model, x, y, batch_size):
    """The classes other than y by clean logit, largest first, at most nine: (T, N)."""
    logits = logits_of(model, x, batch_size).scatter(1, y[:, None], -torch.inf)
    return logits.argsort(1, descending=True)[:, : min(9, logits.shape[1] - 1)].T


def widen(t):
    """(N,) -> (N, 1, 1, 1), to broadcast over images."""
    return t[:, None, None, None]


# ---- APGD ----------------------------------------------------------------------------------------


def dlr_loss(logits, y):
    """Difference of logits ratio, -(z_y - max_{j != y} z_j) / (z_(1) - z_(3)), (N,). K >= 3."""
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
    """{iteration: window} where APGD reviews its step size.

    After 22% of the steps, then 3% less each time, at least 6%.
    """
    checks, window, iteration = {}, max(int(0.22 * steps), 1), -1
    while (iteration := iteration + window) < steps:
        checks[iteration] = window
        window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return checks


def apgd(
    model, x, y, *, eps, steps=100, loss="ce", seed=0, index=None, batch_size=64, judge=None,
    tick=None,
):  # fmt: skip
    """Auto-PGD (Croce & Hein 2020, Algorithm 1), one restart.

    x: (N, C, H, W) in [0, 1]. y: (N,). loss: "ce", "dlr" or "targeted", the DLR loss towards each
    of the nine likeliest other classes in turn. Other options: see the top of the file.
    Returns (N, C, H, W): a point's first misclassified iterate, x where there is none.
    ValueError on another loss or too few classes for it.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    if loss not in ("ce", "dlr", "targeted"):
        raise ValueError(f"unknown loss {loss!r}: use ce, dlr or targeted")
    checks = apgd_checks(steps)

    def loss_and_grad(x, y, target):
        x = x.detach().requires_grad_()
        logits = model(x)
        if loss == "ce":
            value = F.cross_entropy(logits, y, reduction="none")
        else:
            value = dlr_loss(logits, y) if loss == "dlr" else dlr_targeted_loss(logits, y, target)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad, logits.detach()

    look = on_active(loss_and_grad, model, batch_size, tick, 2)

    def attack(points, k):
        clean, labels, target = x[points], y[points], targets[k, points]
        lower, upper = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        t = 2 * noise(x.shape[1:], index[points.cpu()], seed, k).to(x) - 1
        now = clean + eps * t / (t.abs().amax((1, 2, 3), keepdim=True) + 1e-12)
        now = before = now.clamp(0, 1)
        active = torch.ones_like(labels, dtype=torch.bool)
        value, grad, logits = look(active, now, labels, target)
        best, best_grad, best_value, checked_value = now, grad, value, value
        rises, last = torch.zeros_like(value), torch.zeros_like(value)  # published: not the start's
        step, halved = torch.full_like(value, 2 * eps), torch.ones_like(active)
        found = now
        for i in range(steps + 1):
            wrong = confirmed(judge, active & is_wrong(logits, labels), now, labels)
            found = torch.where(widen(wrong), now, found)
            active = active & ~wrong
            if i == steps or not active.any():
                return found, ~active
            if i - 1 in checks:
                few = rises <= 0.75 * checks[i - 1]
                stuck = few | (~halved & (checked_value >= best_value))
                step = torch.where(stuck, step / 2, step)
                # back to the best, but not `before`: the next momentum is best - before
                now = torch.where(widen(stuck), best, now)
                grad = torch.where(widen(stuck), best_grad, grad)
                halved, checked_value, rises = stuck, best_value, torch.zeros_like(rises)
            ahead = (now + widen(step) * grad.sign()).clamp(lower, upper)
            a = 0.75 if i else 1.0
            moved = now + a * (ahead - now) + (1 - a) * (now - before)
            now, before = moved.clamp(lower, upper), now
            value, grad, logits = look(active, now, labels, target)
            better = value > best_value
            best = torch.where(widen(better), now, best)
            best_grad = torch.where(widen(better), grad, best_grad)
            best_value = torch.where(better, value, best_value)
            rises, last = rises + (value > last), value

    with frozen(model), torch.enable_grad():
        targets = targets_of(model, x, y, batch_size) if loss == "targeted" else y[None]
        return in_batches(attack, x, batch_size, len(targets))


# ---- FAB -----------------------------------------------------------------------------------------


def project(t, w, b):
    """The smallest L-infinity move d from t in [0, 1] onto <w, t + d> = b inside [0, 1].

    t, w, d: (N, D), b: (N,). Where the box does not reach the plane, d ends in the corner nearest
    to it; where w = 0, d is 0. Each d_i is -sign(w_i) min(lambda, room_i); Newton's iteration from
    lambda = 0 rises to the solution in a few steps.
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


def fab_t(model, x, y, *, eps, steps=100, seed=0, index=None, batch_size=64, judge=None, tick=None):
    """Targeted FAB (Croce & Hein 2020b) towards each of the nine likeliest other classes in turn.

    x: (N, C, H, W) in [0, 1]. y: (N,). No randomness: seed and index are ignored. Other options:
    see the top of the file. Returns (N, C, H, W): a misclassified image inside the ball for each
    point, x where none was found. A point leaves at its first: FAB would go on to lessen its
    distance, which the verdict does not need.
    """
    x, y, _, _ = checked(model, x, y, eps)

    def boundary(x, y, target):  # of the linearised classifier: <w, .> = b
        x = x.detach().requires_grad_()
        logits = model(x)
        f = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (w,) = torch.autograd.grad(f.sum(), x)
        return w, (w * x.detach()).sum((1, 2, 3)) - f.detach()

    def forward(x):
        with torch.no_grad():
            return (model(x),)

    look = on_active(boundary, model, batch_size, tick, 2)
    classify = on_active(forward, model, batch_size, tick, 1)

    def attack(points, k):
        clean, labels, target = x[points], y[points], targets[k, points]
        now, found, active = clean, clean, torch.ones_like(labels, dtype=torch.bool)
        for _ in range(steps):
            w, b = look(active, now, labels, target)
            t1, t2, w = now.flatten(1), clean.flatten(1), w.flatten(1)  # (n, D)
            d1, d2 = project(torch.cat([t1, t2]), torch.cat([w, w]), torch.cat([b, b])).chunk(2)
            a1, a2 = (d.abs().amax(1, keepdim=True).clamp(min=1e-8) for d in (d1, d2))
            alpha = (a1 / (a1 + a2)).clamp(max=0.1)
            moved = (t1 + 1.05 * d1) * (1 - alpha) + (t2 + 1.05 * d2) * alpha
            now = moved.clamp(0, 1).view_as(now)
            wrong = active & is_wrong(classify(active, now)[0], labels)
            near = (now - clean).abs().amax((1, 2, 3)) <= eps
            fooled = confirmed(judge, wrong & near, now, labels)
            found = torch.where(widen(fooled), now, found)
            active = active & ~fooled
            if not active.any():
                break
            now = torch.where(widen(wrong & ~near), clean + 0.9 * (now - clean), now)
        return found, ~active

    with frozen(model), torch.enable_grad():
        targets = targets_of(model, x, y, batch_size)
        return in_batches(attack, x, batch_size, len(targets))


# ---- Square --------------------------------------------------------------------------------------


def square_side(query, height, width):
    """Side of Square's window at a query (0-based).

    80% of the image's area, halved after queries 10, 50, 200, ...
    """
    p = 0.8 / 2 ** sum(query > after for after in (10, 50, 200, 500, 1000, 2000, 4000))
    return min(max(round(math.sqrt(p * height * width)), 1), height, width)


def square(
    model, x, y, *, eps, queries=5000, seed=0, index=None, batch_size=64, judge=None, tick=None
):
    """Square attack (Andriushchenko et al. 2020, Algorithm 1), one restart.

    Random search on the margin z_y - max_{j != y} z_j. x: (N, C, H, W) in [0, 1]. y: (N,). Wants a
    model in float32: gains are smaller than the spacing of bfloat16 logits. Other options: see the
    top of the file. Returns (N, C, H, W): for each point an image whose margin is not positive, x
    where none was found.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    channels, height, width = x.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(queries, 2, generator=generator, dtype=torch.float64).tolist()
    signs = torch.rand(queries, channels, 1, 1, generator=generator).sub(0.5).sign().to(x)

    def margin_of(x, y):
        with torch.no_grad():
            return (pm(model(x), y),)

    look = on_active(margin_of, model, batch_size, tick, 1)

    def attack(points, _):
        clean, labels = x[points], y[points]
        lower, upper = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        stripes = noise((channels, 1, width), index[points.cpu()], seed).sub(0.5).sign().to(x)
        best = (clean + eps * stripes).clamp(0, 1)
        active = torch.ones_like(labels, dtype=torch.bool)
        (margin,) = look(active, best, labels)
        for query in range(queries + 1):
            active = active & ~confirmed(judge, active & (margin <= 0), best, labels)
            if query == queries or not active.any():
                return best, ~active
            side = square_side(query, height, width)
            down, right = places[query]
            top, left = int((height - side) * down), int((width - side) * right)
            window = (..., slice(top, top + side), slice(left, left + side))
            kept, moved = best[window].clone(), best[window] + 2 * eps * signs[query]
            best[window] = moved.clamp(lower[window], upper[window])
            (tried,) = look(active, best, labels)
            accepted = active & (tried < margin)
            best[window] = torch.where(widen(accepted), best[window], kept)
            margin = torch.where(accepted, tried, margin)

    with frozen(model):
        return in_batches(attack, x, batch_size)


# ---- The attacks by name -------------------------------------------------------------------------


def uniform_pgd(
    model, x, y, *, eps, steps, step_size=0.003, loss="ce", seed=0, index=None, batch_size=64,
    judge=None, tick=None,
):  # fmt: skip
    """PGD as in MAIL's evaluation: uniform start in the ball, step 0.003.

    Returns the last iterate (N, C, H, W), whatever happened on the way: judge is ignored.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    start = x + eps * (2 * noise(x.shape[1:], index, seed).to(x) - 1)
    found = []
    for x_, y_, now in zip(*(t.split(batch_size) for t in (x, y, start)), strict=True):
        for few in [5] * (steps // 5) + [steps % 5]:  # the same iterates, with a tick between
            options = {"eps": eps, "step_size": step_size, "steps": few, "loss": loss}
            now = pgd(model, x_, y_, init=now, **options)
            if tick:
                tick(2 * few * len(x_))
        found.append(now)
    return torch.cat(found)


def fgsm(model, x, y, *, eps, batch_size=64, **_):
    """Fast gradient sign method (Eq. 1): one step of eps from x."""
    x, y, _, _ = checked(model, x, y, eps)
    parts = zip(x.split(batch_size), y.split(batch_size), strict=True)
    options = {"eps": eps, "step_size": eps, "steps": 1, "init": "none"}
    return torch.cat([pgd(model, *part, **options) for part in parts])


# of AutoAttack, in its order
STAGES = {"apgd": apgd, "apgd-t": partial(apgd, loss="targeted"), "fab-t": fab_t, "square": square}


def autoattack(model, x, y, *, eps, seed=0, index=None, batch_size=64, judge=None, tick=None):
    """Standard AutoAttack for L-infinity (Croce & Hein 2020): four attacks on what is robust.

    x: (N, C, H, W) in [0, 1]. y: (N,). With fewer than four classes targeted APGD, whose loss needs
    four, is left out. Returns (N, C, H, W): a misclassified image for each point, x where none was
    found or where x itself is misclassified. Warns where the model makes the result doubtful. What
    is attacked is a folded copy of the model where that is the same function. On CUDA set
    torch.backends.cudnn.allow_tf32 = False before: convolutions are not float32 else.
    """
    x, y, index, classes = checked(model, x, y, eps, index)
    for doubt in doubts(model, x, y):
        warnings.warn(doubt, stacklevel=2)
    if judge is None:
        judge, model = model, stand_in(model, x[:8])
    options = {"eps": eps, "seed": seed, "batch_size": batch_size, "judge": judge, "tick": tick}
    names = ["nat", *applicable(STAGES, classes)]

    def attack(points, k):
        x_, y_, own = x[points], y[points], index[points.cpu()]
        found = (ATTACKS | STAGES)[names[k]](model, x_, y_, index=own, **options)
        return found, verdict(judge, x_, y_, found, eps, batch_size)

    return in_batches(attack, x, len(x), len(names))


ATTACKS = {
    "nat": lambda model, x, y, **_: x.detach(),
    "fgsm": fgsm,
    "pgd20": partial(uniform_pgd, steps=20),
    "pgd100": partial(uniform_pgd, steps=100),
    "cw": partial(uniform_pgd, steps=20, loss="cw"),  # PGD on CW's margin, as in MAIL's evaluation
    "apgd": apgd,
    "aa": autoattack,
}
PASSES = {  # of an image through the model at most, a backward counted as a forward
    "nat": 1, "fgsm": 2, "pgd20": 40, "pgd100": 200, "cw": 40,
    "apgd": 202, "apgd-t": 9 * 202, "fab-t": 9 * 300, "square": 5001,
}  # fmt: skip
PAPER_COLUMNS = ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]


# ---- Evaluation ----------------------------------------------------------------------------------


def applicable(names, classes):
    """names without targeted APGD, and a warning, if there are too few classes for its loss."""
    if "apgd-t" in names and classes < 4:
        warnings.warn(f"AutoAttack goes without targeted APGD: {classes} classes", stacklevel=3)
    return [name for name in names if name != "apgd-t" or classes > 3]


def verdict(model, x, y, x_adv, eps, batch_size):
    """Which of x_adv (N, C, H, W) the model misclassifies, (N,), by a fresh forward.

    RuntimeError on images outside the ball or [0, 1].
    """
    low, high = x_adv.aminmax()
    if not (0 <= low <= high <= 1 and (x_adv - x).abs().max() <= eps + 1e-6):
        raise RuntimeError("an attack left the ball or [0, 1]")
    with frozen(model):
        return is_wrong(logits_of(model, x_adv, batch_size), y)


def layout(device):
    """The faster memory format for float32; on CUDA that is the other one, without TF32."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def stand_in(model, x, dtype=None):
    """A faster copy of the model to attack, or the model itself if x tells it from that copy."""
    for part in getattr(model, "modules", list)():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return model  # a copy would run the original's forward, or not run its hooks
    with contextlib.suppress(Exception), frozen(model), torch.no_grad():
        copy = models.Folded(model)
        if torch.allclose(copy(x), model(x), rtol=1e-4, atol=1e-4):
            return copy.to(dtype, memory_format=torch.channels_last) if dtype else copy
    return model


NOT_ASKED, FOOLED_BEFORE = -1, 2  # in place of a verdict; 1: misclassified, 0: not


def robust_in(verdicts, name):
    """Which images an attack did not fool, (n,) bool: for `aa` those that Square's turn left."""
    return verdicts["square" if name == "aa" else name] == 0


def evaluate(
    model, x, y, attacks, *, eps, seed=0, batch_size=64, amp=False, verdicts=None, save=None
):
    """Verdicts of `attacks`, names from ATTACKS, on uint8 images x (N, C, H, W).

    y: (N,). amp: attack a copy in bfloat16; only the model itself counts a success.
    Returns {name: (N,) int8}: 1 misclassified, 0 not, -1 not asked yet. For AutoAttack these are
    its stages, each asked only of images that are still robust, 2 at the others: 0 after the last
    one, `square`, is robust. verdicts: such a dict of an earlier call with the same settings,
    filled up in place. save(verdicts): called as they come in; under torchrun, where the processes
    share the images, after every attack.
    ValueError on an unknown attack, TypeError on images that are not uint8.
    """
    if unknown := set(attacks) - ATTACKS.keys():
        raise ValueError(f"unknown attacks {', '.join(sorted(unknown))}: use {', '.join(ATTACKS)}")
    if x.dtype != torch.uint8:
        raise TypeError(f"want uint8 images, got {x.dtype}: multiply those in [0, 1] by 255, round")
    rank, world = rank_and_world()
    verdicts = {} if verdicts is None else verdicts
    *_, classes = checked(model, x[:8] / 255, y[:8], eps)
    if len(y) != len(x) or not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"want {len(x)} labels in 0..{classes - 1}, got {len(y)} up to {y.max()}")
    fast = stand_in(model, x[:8] / 255)
    half = stand_in(model, x[:8] / 255, torch.bfloat16) if amp else fast
    if amp and half is model:
        warnings.warn("amp does nothing: there is no copy of this model to attack", stacklevel=2)

    stages = applicable(STAGES, classes) if "aa" in attacks else []
    plan = dict.fromkeys(["nat", *(name for name in attacks if name != "aa"), *stages])
    for name in plan:
        verdicts.setdefault(name, torch.full((len(x),), NOT_ASKED, dtype=torch.int8))

    def spare():  # what one of AutoAttack's attacks fooled, the later ones leave alone
        fooled = torch.zeros(len(x), dtype=torch.bool)
        for name in ("nat", *(name for name in STAGES if name in plan)):
            verdicts[name][fooled] = FOOLED_BEFORE
            fooled |= verdicts[name] > 0

    terminal, begun = sys.stderr.isatty() and is_lead(), time.perf_counter()
    done, goal, shown = 0, 0, 0.0

    def tick(passes):  # on a terminal: where it is, and how long all that is planned can take
        nonlocal done, shown
        done, now = done + passes, time.perf_counter()
        if terminal and now - shown > 0.5:
            left, shown = "estimating", now
            if done:
                seconds = max(goal - done, 0) / done * (now - begun)
                left = f"at most {datetime.timedelta(seconds=round(seconds))} left in all"
            print(f"\r{where}, {left}\033[K", end="", file=sys.stderr, flush=True)

    for name in plan:
        spare()
        todo = (verdicts[name] == NOT_ASKED).nonzero().squeeze(1)[rank::world]
        chunk = batch_size if x.device.type == "cpu" else 4 * batch_size  # recorded for each anew
        batches = todo.split(chunk) if len(todo) else []
        for i, index in enumerate(batches, 1):
            where = f"{name}, batch {i}/{len(batches)}"
            ahead = {k: (verdicts[k] == NOT_ASKED).sum().item() // world for k in plan}
            goal = done + sum(PASSES.get(k, 1) * n for k, n in ahead.items())
            tick(0)
            images, labels = x[index].to(memory_format=layout(x.device)) / 255, y[index]
            options = {"eps": eps, "seed": seed, "index": index, "batch_size": batch_size}
            attack = (STAGES | ATTACKS)[name]
            attacked = fast if name == "square" else half
            x_adv = attack(attacked, images, labels, judge=model, tick=tick, **options)
            wrong = verdict(model, images, labels, x_adv, eps, batch_size)
            tick(len(index))
            verdicts[name][index] = wrong.to("cpu", torch.int8)
            spare()
            if save and world == 1:
                save(verdicts)
        if world > 1:
            merged = verdicts[name].to(x.device)
            dist.all_reduce(merged, dist.ReduceOp.MAX)
            verdicts[name] = merged.cpu()
            spare()
            if save and rank == 0:
                save(verdicts)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return verdicts


def doubts(model, x, y):
    """Sentences on what makes attacks on the model doubtful; x (N, C, H, W) in [0, 1], y (N,)."""
    found = []
    x, y = x[:64].detach(), y[:64].long()
    with frozen(model), torch.enable_grad():
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), inputs)
        again = model(x)
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-4:
        found.append("the model seems to return probabilities: the attacks want logits")
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5):
        found.append("the model is random: two forwards of one batch differ")
    blind = 1 - (grad.flatten(1).abs() > 0).any(1).float().mean().item()  # NaN is not > 0 either
    if blind > 0.02:
        found.append(f"the gradient is zero or NaN at {blind:.0%} of the images")
    return found


def masking(figures):
    """Sentences on figures of `summarise` that look like gradient masking."""
    found = []
    accuracy = {name: figure["accuracy"] for name, figure in figures.items()}
    under_pgd = max(accuracy.get(name, 0) for name in ("pgd20", "pgd100")) - accuracy.get("aa", 100)
    if under_pgd > 3:
        usual = "the paper's AT: 4 to 5, its MAIL-AT and CLIRAT: 11 to 15"
        found.append(f"AutoAttack is {under_pgd:.1f} points under PGD ({usual})")
    if "square" in figures and (gap := accuracy["fab-t"] - accuracy["square"]) > 0.2:
        found.append(f"Square takes {gap:.1f} points more than the white-box attacks")
    return found


# ---- Output --------------------------------------------------------------------------------------

PAPER = {  # Tables 1 and 2: accuracy (%), mean ± std; on how many images and seeds is not stated
    "resnet18": """
    at 85.64 ± 0.25, 52.08 ± 0.25, 49.33 ± 0.19, 51.94 ± 0.20, 48.53 ± 0.19, 46.87 ± 0.62
    trades 84.37 ± 0.13, 54.36 ± 0.20, 52.68 ± 0.28, 51.96 ± 0.61, 52.07 ± 0.59, 48.73 ± 0.49
    mart 82.24 ± 0.29, 55.40 ± 0.30, 53.36 ± 0.50, 51.35 ± 0.44, 53.07 ± 1.01, 47.50 ± 0.46
    mail-at 83.74 ± 0.43, 58.56 ± 0.25, 57.63 ± 0.20, 50.72 ± 0.22, 55.70 ± 0.43, 46.47 ± 0.46
    mail-trades 82.35 ± 0.20, 55.05 ± 0.11, 53.71 ± 0.11, 52.08 ± 0.15, 53.27 ± 0.52, 49.43 ± 0.65
    mail-mart 83.45 ± 0.26, 55.10 ± 0.29, 53.08 ± 0.34, 51.06 ± 0.13, 52.43 ± 1.47, 46.47 ± 0.90
    clirat 83.60 ± 0.26, 60.31 ± 0.16, 59.33 ± 0.17, 50.66 ± 0.20, 58.83 ± 1.02, 45.50 ± 0.90
    clir-trades 82.08 ± 0.17, 55.08 ± 0.27, 53.87 ± 0.34, 52.10 ± 0.17, 53.77 ± 0.66, 49.17 ± 0.50
    clir-mart 83.45 ± 0.11, 55.30 ± 0.53, 53.45 ± 0.37, 51.15 ± 0.26, 52.13 ± 1.10, 46.50 ± 0.70""",
    "wrn-32-10": """
    at 87.86 ± 0.01, 52.07 ± 0.07, 49.10 ± 0.10, 52.76 ± 0.20, 48.35 ± 0.75, 47.75 ± 0.65
    trades 87.06 ± 0.31, 55.25 ± 0.04, 52.63 ± 0.06, 54.97 ± 0.03, 52.75 ± 0.55, 51.25 ± 0.05
    mart 85.67 ± 0.15, 56.47 ± 0.12, 53.43 ± 0.14, 51.92 ± 0.16, 54.10 ± 0.60, 50.55 ± 0.65
    mail-at 86.22 ± 0.12, 61.38 ± 0.17, 60.47 ± 0.11, 54.14 ± 0.05, 60.40 ± 0.01, 50.20 ± 0.50
    mail-trades 85.91 ± 0.10, 56.39 ± 0.14, 54.61 ± 0.35, 55.01 ± 0.10, 52.95 ± 0.65, 51.00 ± 0.50
    mail-mart 85.91 ± 0.10, 56.39 ± 0.14, 53.88 ± 0.01, 53.39 ± 0.11, 53.65 ± 0.55, 49.45 ± 1.05
    clirat 86.36 ± 0.14, 63.67 ± 0.11, 62.00 ± 0.01, 54.03 ± 0.12, 62.45 ± 0.55, 50.04 ± 0.10
    clir-trades 85.47 ± 0.10, 56.39 ± 0.09, 54.53 ± 0.11, 54.86 ± 0.15, 53.50 ± 0.70, 51.35 ± 0.15
    clir-mart 85.97 ± 0.32, 56.02 ± 0.06, 53.24 ± 0.32, 53.25 ± 0.08, 52.90 ± 0.01, 48.30 ± 0.80""",
}
PAPER["wrn-34-10"] = PAPER["wrn-32-10"]  # the same network, counted differently


def wilson(k, n, z=1.96):
    """95% interval of a proportion k / n (Wilson 1927), as (low, high) in [0, 1]."""
    centre, spread = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def summarise(verdicts, attacks):
    """{name: {robust, accuracy (%), interval (%)}} for attacks and AutoAttack's stages."""
    figures, n = {}, len(verdicts["nat"])
    stages = [stage for stage in STAGES if "aa" in attacks and stage in verdicts]
    for name in dict.fromkeys([*attacks, *stages]):
        k = robust_in(verdicts, name).sum().item()
        interval = [100 * end for end in wilson(k, n)]
        figures[name] = {"robust": k, "accuracy": 100 * k / n, "interval": interval}
    return figures


def print_row(label, n, eps, cells):
    print(f"| {label} | {n} | {255 * eps:.4g}/255 | {' | '.join(cells)} |", flush=True)


def paper_row(settings, attacks):
    """The paper's cells for what `settings` of a verdict file say, or None if it has none."""
    training = settings["training"]
    if settings["dataset"] != "CIFAR-10" or abs(settings["eps"] - 8 / 255) > 1e-9:
        return None
    for line in PAPER.get(training.get("arch"), "").strip().splitlines():
        method, cells = line.split(maxsplit=1)
        if method == training.get("method"):
            values = dict(zip(PAPER_COLUMNS, cells.split(", "), strict=True))
            return [values.get(name, "") for name in attacks]
    return None


# ---- Verdict files -------------------------------------------------------------------------------

SETTINGS = "n", "eps", "seed", "amp", "version", "data", "weights"  # make a verdict file's key
VERSION = 5  # of the attacks and the files: verdicts of another version are not reused
CIFAR10 = 21_590_746_922_745  # the CRCs of its 10,000 test images (3, 32, 32), added up


def digest(*tensors):
    sha = hashlib.sha256()
    for t in tensors:
        sha.update(t.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def dataset(x, spec):
    """CIFAR-10 where x holds its test images, in any order; else the name of the file, or `toy`."""
    if sum(map(zlib.crc32, x.cpu().numpy())) == CIFAR10:
        return "CIFAR-10"
    return Path(spec).name


def read_verdicts(path):
    """({name: (n,) int8}, settings) of a verdict file. OSError or ValueError if it is none.

    The verdicts are those of `evaluate`; settings: n, eps, seed, amp, version, dataset, digests of
    the test set and the weights, and the training's settings.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(str(file["settings"]))
            _ = [settings[name] for name in (*SETTINGS, "dataset")], {**settings["training"]}
            names = [name for name in file.files if name != "settings"]
            return {name: torch.from_numpy(file[name]) for name in names}, settings
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        what = f"{path} is no file of verdicts, or is damaged ({error})"
        raise ValueError(f"{what}: move it away to evaluate afresh") from None


@contextlib.contextmanager
def locked(folder):
    """Hold others that do the same off, where a folder can be locked (not on Windows)."""
    held = None
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        held = os.open(folder, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)  # ends with the process
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def keep(path, settings, verdicts):
    """Write verdicts to their file, and take over what another process put there meanwhile."""
    with locked(path.parent):
        there = read_verdicts(path)[0] if path.exists() else {}
        for name in there.keys() | verdicts.keys():
            both = [v[name] for v in (there, verdicts) if name in v]
            verdicts[name] = both[0].maximum(both[-1])  # whatever was asked is above NOT_ASKED
        buffer = io.BytesIO()
        arrays = {name: verdict.numpy() for name, verdict in verdicts.items()}
        np.savez_compressed(buffer, settings=np.array(json.dumps(settings)), **arrays)
        write(path, buffer.getbuffer())


# ---- Command line --------------------------------------------------------------------------------


def attack_name(text):
    if text not in ATTACKS:
        known = ", ".join(ATTACKS)
        raise argparse.ArgumentTypeError(f"no attack {text!r} in {known}; checkpoints come first")
    return text


def parse_args(argv):
    about = "Robust accuracy of checkpoints, a row each of the paper's Tables 1 and 2."
    parser, add = make_parser("eval_attacks.py", about)
    add("checkpoints", "of clirat.py or another state dict of these networks",
        nargs="+", metavar="CKPT")  # fmt: skip
    add("--attacks", f"columns, of {', '.join(ATTACKS)} (default: the paper's six)",
        nargs="+", type=attack_name, metavar="NAME")  # fmt: skip
    add("--arch", "resnet18 or wrn-D-K (default: what a checkpoint says or shows)", type=str)
    add("--data", "folder of CIFAR-10, FILE.npz or toy", "data", type=str)
    add("--n", "on the first N test images (default: all)", type=number(int, 1))
    add("--batch-size", "of a forward (default: 64; CUDA: 128, --amp 512)", type=number(int, 1))
    add("--eps", "L-infinity radius", "8/255", type=number(float, 0, 1))
    add("--seed", "of the attacks' noise", 0, type=number(int, 0, 2**31))
    add("--amp", "attack in bfloat16; only float32 counts an image as fooled", action="store_true")
    add("--device", "cpu, cuda, cuda:1", "cuda" if torch.cuda.is_available() else "cpu", type=str)
    add("--json", "write the figures there as well", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.attacks = list(dict.fromkeys(args.attacks or PAPER_COLUMNS))
    on_cuda = 512 if args.amp else 128
    args.batch_size = args.batch_size or (on_cuda if args.device.startswith("cuda") else 64)
    unique = {Path(path).resolve(): Path(path) for path in args.checkpoints}
    args.checkpoints = list(unique.values())
    exists = args.json and args.json.exists()
    if args.json and not (args.json.is_file() if exists else args.json.parent.is_dir()):
        parser.error(f"--json {args.json} is no file, or in a folder that does not exist")
    return args


def verdict_file(args, path, model, metadata, x, y):
    """The file for a checkpoint's verdicts under these settings, beside it, and the settings."""
    settings = {"n": args.n, "eps": args.eps, "seed": args.seed, "amp": args.amp}
    settings |= {"version": VERSION, "data": digest(x, y)}
    settings |= {"weights": digest(*model.state_dict().values())}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    settings |= {"dataset": dataset(x, args.data), "training": metadata}
    return path.with_name(f"{path.name}.{key}.npz"), settings


def evaluate_one(args, path, model, kept, settings, x, y):
    """Evaluate a checkpoint, its verdicts kept in a file. Returns what --json says of it."""
    verdicts, notes = read_verdicts(kept)[0] if kept.exists() else {}, []

    def save(verdicts):
        try:
            keep(kept, settings, verdicts)
        except (OSError, ValueError) as error:
            if not notes:
                print(f"note: verdicts are not kept: {error}", file=sys.stderr)
            notes.append(error)

    options = {"eps": args.eps, "seed": args.seed, "batch_size": args.batch_size, "amp": args.amp}
    evaluate(model, x, y, args.attacks, verdicts=verdicts, save=save, **options)
    figures = summarise(verdicts, args.attacks)
    warned = doubts(model, x / 255, y) + masking(figures)
    trained_on = settings["training"].get("data")
    if trained_on and (trained_on == "toy") != (args.data == "toy"):
        warned.append(f"trained on {trained_on}, evaluated on {args.data}")
    return {"checkpoint": str(path)} | settings | {"attacks": figures, "warnings": warned}


def main(argv=None):
    args, program = parse_args(argv), "eval_attacks.py"
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 verdicts
    torch.backends.cudnn.allow_tf32 = False
    with contextlib.suppress(AttributeError):  # what a terminal can't show becomes ?
        sys.stdout.reconfigure(errors="replace")
    with bad_input_ends_all(program):
        device = join_processes(args.device, args.amp)
        networks = [models.load(path, args.arch) for path in args.checkpoints]
    with bad_input_ends_all(program):
        data = load_data(args.data, ["test"]) if is_lead() else None  # first, it may download
    with bad_input_ends_all(program):
        x, y = (t.to(device) for t in data or load_data(args.data, ["test"]))
        args.n = args.n or len(x)
        if args.n > len(x):
            raise ValueError(f"--n {args.n} is more than the {len(x)} test images")
        kept = []  # (file, settings) of each checkpoint
        for path, (model, metadata) in zip(args.checkpoints, networks, strict=True):
            classes = list(model.parameters())[-1].numel()  # the last layer's bias
            ten = not args.data.endswith(".npz")  # CIFAR-10 and toy; a test set may lack the last
            if y.max() >= classes or (ten and classes != 10):
                raise ValueError(f"{path} knows {classes} classes, {args.data} has {y.max() + 1}")
            kept.append(verdict_file(args, path, model, metadata, x, y))
            if kept[-1][0].exists():
                read_verdicts(kept[-1][0])

    results, status, message = [], 0, None
    if is_lead():
        images = f"{args.n} of {len(x)} test images {tuple(x.shape[1:])}, {y.max() + 1} classes"
        print(f"{args.data}: {images}, on {device}\n")
        print(f"| checkpoint | n | eps | {' | '.join(map(str.upper, args.attacks))} |")
        print(f"|---{'|---' * (2 + len(args.attacks))}|", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for path, (model, _), (file, settings) in zip(
            args.checkpoints, networks, kept, strict=True
        ):
            model.to(device, memory_format=layout(device))
            result = evaluate_one(args, path, model, file, settings, x[: args.n], y[: args.n])
            if not is_lead():
                continue
            results.append(result)
            cell = "{accuracy:.2f} [{interval[0]:.1f}, {interval[1]:.1f}]"
            cells = [cell.format(**result["attacks"][name]) for name in args.attacks]
            print_row(path, args.n, args.eps, cells)
            if reference := paper_row(settings, args.attacks):
                name = "the paper's {method}, {arch}".format(**settings["training"])
                print_row(name, "?", args.eps, reference)  # it does not state its n
            if args.json:
                write(args.json, json.dumps(results, indent=2).encode() + b"\n")
            for doubt in result["warnings"]:
                print(f"warning: {path}: {doubt}", file=sys.stderr)
    except KeyboardInterrupt:
        status, message = 130, f"\n{program}: stopped: the same command goes on from there"
    except OSError as error:
        status = 1
        message = f"{program}: cannot write ({error}); the verdicts kept so far are whole"
    stop(status, message)


if __name__ == "__main__":
    main()
