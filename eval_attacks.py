"""Robust accuracy under the paper's attacks: NAT, PGD-20, PGD-100, CW, APGD-CE and AutoAttack.

    python eval_attacks.py runs/clirat-resnet18-s1/last.pt --attacks nat pgd20 pgd100 cw apgd aa

AutoAttack is the standard version for L-infinity (Croce & Hein 2020): APGD-CE, targeted APGD,
targeted FAB and Square, each on what is still robust. Every attack works on any function that maps
images (N, C, H, W) in [0, 1] to logits (N, K), and returns images in the ball around x. Noise
belongs to an image's number: batch size, order and other images move a verdict by rounding at most.

Options that the attacks share: seed of the noise; index (N,), the images' numbers, 0..N-1 by
default; batch_size of the forward passes; judge, the model whose verdict counts where `model` is
only a faster copy of it; tick(passes), called after each step with the number of images that went
through the model, a backward counted as a forward. ValueError or TypeError on images outside
[0, 1], labels that are no classes, or a model that does not return logits.
"""

import argparse
import contextlib
import csv
import datetime
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import clirat
import models
from clirat import check_attack, eval_mode, is_lead, is_wrong, number, pgd, pm, rank_and_world

# ---- Common --------------------------------------------------------------------------------------


def checked(model, x, y, eps, index=None):
    """An attack's x, y, index and K; what it cannot take is a ValueError or TypeError."""
    check_attack(x, y, eps)
    try:
        with eval_mode(model), torch.no_grad():
            logits = model(x[:1])
    except RuntimeError as error:
        raise TypeError(f"the model does not take {x.dtype} {tuple(x.shape[1:])}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or logits.shape[1] < 2:
        hint = "wrap it, such as lambda x: model(x)[0]"
        raise TypeError(f"the model returns no logits (N, K) but a {type(logits).__name__}: {hint}")
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


def in_batches(attack, x, y, batch_size, targets=1, *, passes, judge=None, tick=None):
    """Each point's first misclassified image (N, C, H, W), x where there is none.

    attack(points, k, active), for k = 0..targets-1 in turn on batches of what is still robust,
    yields images for these indices into x, and which are misclassified; active: which are left.
    passes: of an image through the model between two yields.
    """
    x_adv, robust = x.clone(), torch.ones_like(y, dtype=torch.bool)
    for k in range(targets):
        for points in robust.nonzero().squeeze(1).split(batch_size):
            active, found = robust[points], x_adv[points]
            for images, wrong in attack(points, k, active) if len(points) else []:
                if tick:
                    tick(passes * active.sum().item())
                wrong = wrong & active
                if not wrong.any():
                    continue
                if judge is not None:
                    with eval_mode(judge), torch.no_grad():
                        agreed = is_wrong(judge(images[wrong]), y[points[wrong]])
                    wrong = wrong.masked_scatter(wrong, agreed)
                found = torch.where(widen(wrong), images, found)
                active &= ~wrong
                if not active.any():
                    break
            x_adv[points], robust[points] = found, active
    return x_adv


def graph_device(model):
    """Where to record CUDA graphs: nowhere (cpu) but for copies of networks that read no value."""
    if isinstance(model, models.Folded) and type(model.net) in (models.ResNet18, models.WideResNet):
        return next(model.parameters()).device
    return torch.device("cpu")


def on_active_rows(function, model, batch_size):
    """A function of tensors (N, ...) as one of a mask (N,) and these: it runs on those rows alone.

    The results of the others are 0. In a CUDA graph the rows are padded, to at most eight sizes.
    """
    device = graph_device(model)
    run, eighth = models.graphed(function, device), math.ceil(batch_size / 8)

    def call(active, *rows):
        index = active.nonzero().squeeze(1)  # (n,)
        padded = F.pad(index, (0, -len(index) % eighth)) if device.type == "cuda" else index
        results = []
        for output in run(*(t[padded] for t in rows)):
            zeros = output.new_zeros(len(active), *output.shape[1:])
            results.append(zeros.index_copy_(0, index, output[: len(index)]))
        return results

    return call


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
    z = logits.sort(1, descending=True).values
    return -pm(logits, y) / (z[:, 0] - z[:, 2] + 1e-12)


def dlr_targeted_loss(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), (N,). K >= 4."""
    z = logits.sort(1, descending=True).values
    gap = (logits.gather(1, y[:, None]) - logits.gather(1, target[:, None])).squeeze(1)
    return -gap / (z[:, 0] - (z[:, 2] + z[:, 3]) / 2 + 1e-12)


def apgd_checks(steps):
    """{iteration: window} of APGD's reviews: after 22% of the steps, then 3% less, at least 6%."""
    checks, window, iteration = {}, max(int(0.22 * steps), 1), -1
    while (iteration := iteration + window) < steps:
        checks[iteration] = window
        window = max(window - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return checks


def apgd(model, x, y, *, eps, steps=100, loss="ce", seed=0, index=None, batch_size=64, **shared):
    """Auto-PGD (Croce & Hein 2020, Algorithm 1), one restart.

    x: (N, C, H, W) in [0, 1]. y: (N,). loss: "ce", "dlr" or "targeted", the DLR loss towards each
    of the nine likeliest other classes in turn. Returns (N, C, H, W): a point's first misclassified
    iterate, x where there is none. ValueError on another loss.
    """
    x, y, index, classes = checked(model, x, y, eps, index)
    if loss not in ("ce", "dlr", "targeted"):
        raise ValueError(f"unknown loss {loss!r}: use ce, dlr or targeted")
    if loss == "targeted" and classes < 4:
        warnings.warn(f"no targeted APGD: its loss needs 4 classes, not {classes}", stacklevel=2)
        return x
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

    loss_and_grad = on_active_rows(loss_and_grad, model, batch_size)

    def attack(points, k, active):
        clean, labels, target = x[points], y[points], targets[k, points]
        lower, upper = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        t = 2 * noise(x.shape[1:], index[points.cpu()], seed, k).to(x) - 1
        now = clean + eps * t / (t.abs().amax((1, 2, 3), keepdim=True) + 1e-12)
        now = before = now.clamp(0, 1)
        value, grad, logits = loss_and_grad(active, now, labels, target)
        best, best_grad, best_value, checked_value = now, grad, value, value
        rises, last = torch.zeros_like(value), torch.zeros_like(value)  # published: not the start's
        step, halved = torch.full_like(value, 2 * eps), torch.ones_like(active)
        yield now, is_wrong(logits, labels)
        for i in range(steps):
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
            value, grad, logits = loss_and_grad(active, now, labels, target)
            better = value > best_value
            best = torch.where(widen(better), now, best)
            best_grad = torch.where(widen(better), grad, best_grad)
            best_value = torch.where(better, value, best_value)
            rises, last = rises + (value > last), value
            yield now, is_wrong(logits, labels)

    with eval_mode(model), torch.enable_grad():
        targets = targets_of(model, x, y, batch_size) if loss == "targeted" else y[None]
        return in_batches(attack, x, y, batch_size, len(targets), passes=2, **shared)


# ---- FAB -----------------------------------------------------------------------------------------


def project(t, w, b):
    """The smallest L-infinity move d (N, D) from t in [0, 1] onto <w, t + d> = b inside [0, 1].

    Where the box does not reach the plane, d ends in the corner nearest to it; where w = 0, d is 0.
    Each d_i is -sign(w_i) min(lambda, room_i); Newton's iteration from lambda = 0 rises to it.
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


def fab_t(model, x, y, *, eps, steps=100, seed=0, index=None, batch_size=64, **shared):
    """Targeted FAB (Croce & Hein 2020b) towards each of the nine likeliest other classes in turn.

    x: (N, C, H, W) in [0, 1]. y: (N,). No randomness: seed and index are ignored. Returns (N, C, H,
    W): a misclassified image inside the ball for each point, x where none was found. A point leaves
    at its first: FAB would go on to lessen its distance, which the verdict does not need.
    """
    x, y, _, _ = checked(model, x, y, eps)

    def boundary(x, y, target):  # of the linearised classifier: <w, .> = b
        x = x.detach().requires_grad_()
        logits = model(x)
        f = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (w,) = torch.autograd.grad(f.sum(), x)
        return w, (w * x.detach()).sum((1, 2, 3)) - f.detach()

    def classify(x):
        with torch.no_grad():
            return (model(x),)

    boundary = on_active_rows(boundary, model, batch_size)
    classify = on_active_rows(classify, model, batch_size)

    def attack(points, k, active):
        clean, labels, target = x[points], y[points], targets[k, points]
        now = clean
        for _ in range(steps):
            w, b = boundary(active, now, labels, target)
            t1, t2, w = now.flatten(1), clean.flatten(1), w.flatten(1)  # (n, D)
            d1, d2 = project(torch.cat([t1, t2]), torch.cat([w, w]), torch.cat([b, b])).chunk(2)
            a1, a2 = (d.abs().amax(1, keepdim=True).clamp(min=1e-8) for d in (d1, d2))
            alpha = (a1 / (a1 + a2)).clamp(max=0.1)
            moved = (t1 + 1.05 * d1) * (1 - alpha) + (t2 + 1.05 * d2) * alpha
            now = moved.clamp(0, 1).view_as(now)
            wrong = is_wrong(classify(active, now)[0], labels)
            near = (now - clean).abs().amax((1, 2, 3)) <= eps
            yield now, wrong & near
            now = torch.where(widen(wrong & ~near), clean + 0.9 * (now - clean), now)

    with eval_mode(model), torch.enable_grad():
        targets = targets_of(model, x, y, batch_size)
        return in_batches(attack, x, y, batch_size, len(targets), passes=3, **shared)


# ---- Square --------------------------------------------------------------------------------------


def square_side(query, height, width):
    """Side of Square's window at a query (0-based): 80% of the area, halved after 10, 50, ..."""
    p = 0.8 / 2 ** sum(query > after for after in (10, 50, 200, 500, 1000, 2000, 4000))
    return min(max(round(math.sqrt(p * height * width)), 1), height, width)


def square(model, x, y, *, eps, queries=5000, seed=0, index=None, batch_size=64, **shared):
    """Square attack (Andriushchenko et al. 2020, Algorithm 1), one restart.

    Random search on the margin z_y - max_{j != y} z_j. x: (N, C, H, W) in [0, 1]. y: (N,). Wants a
    model in float32: gains are smaller than the spacing of bfloat16 logits. Returns (N, C, H, W): a
    point's first misclassified image, x where there is none. A tie is what argmax makes of it.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    channels, height, width = x.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(queries, 2, generator=generator, dtype=torch.float64).tolist()
    signs = torch.rand(queries, channels, 1, 1, generator=generator).sub(0.5).sign().to(x)

    def judged(x, y):
        with torch.no_grad():
            logits = model(x)
        return pm(logits, y), is_wrong(logits, y)

    judged = on_active_rows(judged, model, batch_size)

    def attack(points, _, active):
        clean, labels = x[points], y[points]
        lower, upper = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        stripes = noise((channels, 1, width), index[points.cpu()], seed).sub(0.5).sign().to(x)
        best = (clean + eps * stripes).clamp(0, 1)
        margin, wrong = judged(active, best, labels)
        yield best, wrong
        for query in range(queries):
            side = square_side(query, height, width)
            down, right = places[query]
            top, left = int((height - side) * down), int((width - side) * right)
            window = (..., slice(top, top + side), slice(left, left + side))
            kept, moved = best[window].clone(), best[window] + 2 * eps * signs[query]
            best[window] = moved.clamp(lower[window], upper[window])
            tried, wrong = judged(active, best, labels)
            accepted = active & ((tried < margin) | wrong)
            best[window] = torch.where(widen(accepted), best[window], kept)
            margin = torch.where(accepted, tried, margin)
            yield best, wrong

    with eval_mode(model):
        return in_batches(attack, x, y, batch_size, passes=1, **shared)


# ---- The attacks by name -------------------------------------------------------------------------


def last_pgd(
    model, x, y, *, eps, steps=20, step_size=0.003, loss="ce", noisy=True, seed=0, index=None,
    batch_size=64, judge=None, tick=None,
):  # fmt: skip
    """PGD as in MAIL's evaluation: uniform start in the ball, step 0.003; x itself if not noisy.

    Returns the last iterate (N, C, H, W), whatever happened on the way: judge is ignored.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    start = x + eps * (2 * noise(x.shape[1:], index, seed).to(x) - 1) if noisy else x
    options, found = {"eps": eps, "step_size": step_size, "loss": loss}, []
    for x_, y_, now in zip(*(t.split(batch_size) for t in (x, y, start)), strict=True):
        for part in [5] * (steps // 5) + [steps % 5]:  # the same iterates, with a tick between
            now = pgd(model, x_, y_, init=now, steps=part, **options)
            if tick:
                tick(2 * part * len(x_))
        found.append(now)
    return torch.cat(found)


# of AutoAttack, in its order
STAGES = {"apgd": apgd, "apgd-t": partial(apgd, loss="targeted"), "fab-t": fab_t, "square": square}


def autoattack(model, x, y, *, eps, seed=0, index=None, batch_size=64, judge=None, tick=None):
    """Standard AutoAttack for L-infinity (Croce & Hein 2020): four attacks on what is robust.

    x: (N, C, H, W) in [0, 1]. y: (N,). Returns (N, C, H, W): a misclassified image for each point,
    x where none was found or x itself is misclassified. Warns where the model makes the result
    doubtful. What is attacked is a folded copy where that is the same function. On CUDA set
    torch.backends.cudnn.allow_tf32 = False before: convolutions are not float32 else.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    for doubt in doubts(model, x, y):
        warnings.warn(doubt, stacklevel=2)
    if judge is None:
        judge, model = model, stand_in(model, x[:8])
    options = {"eps": eps, "seed": seed, "batch_size": batch_size, "judge": judge, "tick": tick}
    x_adv, robust = x.clone(), torch.ones_like(y, dtype=torch.bool)
    for name in ["nat", *STAGES]:
        points = robust.nonzero().squeeze(1)
        if len(points):
            x_, y_, own = x[points], y[points], index[points.cpu()]
            found = (ATTACKS | STAGES)[name](model, x_, y_, index=own, **options)
            fooled = verdict(judge, x_, y_, found, eps, batch_size)
            x_adv[points[fooled]], robust[points] = found[fooled], ~fooled
    return x_adv


ATTACKS = {
    "nat": lambda model, x, y, **_: x.detach(),
    "fgsm": partial(last_pgd, steps=1, step_size=1, noisy=False),  # Eq. 1: one step, cut to eps
    "pgd20": last_pgd,
    "pgd100": partial(last_pgd, steps=100),
    "cw": partial(last_pgd, loss="cw"),  # PGD on CW's margin, as in MAIL's evaluation
    "apgd": apgd,
    "aa": autoattack,
}
PASSES = {  # of an image through the model at most, a backward counted as a forward
    "nat": 1, "fgsm": 2, "pgd20": 40, "pgd100": 200, "cw": 40,
    "apgd": 202, "apgd-t": 9 * 202, "fab-t": 9 * 300, "square": 5001,
}  # fmt: skip
PAPER_COLUMNS = ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]


# ---- Evaluation ----------------------------------------------------------------------------------


def verdict(model, x, y, x_adv, eps, batch_size):
    """Which of x_adv (N, C, H, W) the model misclassifies, (N,), by a fresh forward.

    RuntimeError on images outside the ball or [0, 1].
    """
    low, high = x_adv.aminmax()
    if not (0 <= low <= high <= 1 and (x_adv - x).abs().max() <= eps + 1e-6):
        raise RuntimeError("an attack left the ball or [0, 1]")
    with eval_mode(model):
        return is_wrong(logits_of(model, x_adv, batch_size), y)


def stand_in(model, x, dtype=None):
    """A faster copy of the model to attack, or the model itself if x tells it from that copy."""
    for part in getattr(model, "modules", list)():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return model  # a copy would run the original's forward, or not run its hooks
    with contextlib.suppress(Exception), eval_mode(model), torch.no_grad():
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

    y: (N,). amp: attack a copy in bfloat16; only the model itself counts a success. Returns {name:
    (N,) int8}: 1 misclassified, 0 not, -1 not asked yet. For AutoAttack these are its stages, each
    asked only of images that are still robust, 2 at the others: 0 after `square` is robust.
    verdicts: such a dict of an earlier call with the same settings, filled up in place. save: is
    called with them as they come in; under torchrun, where processes share the images, after every
    attack. ValueError on an unknown attack, TypeError on images that are not uint8.
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

    stages = STAGES if "aa" in attacks else []
    plan = dict.fromkeys(["nat", *(name for name in attacks if name != "aa"), *stages])
    for name in plan:
        verdicts.setdefault(name, torch.full((len(x),), NOT_ASKED, dtype=torch.int8))

    def spare():  # what one of AutoAttack's stages fooled, the later ones leave alone
        fooled = torch.zeros(len(x), dtype=torch.bool)
        for name in ("nat", *(name for name in STAGES if name in plan)):
            verdicts[name][fooled] = FOOLED_BEFORE
            fooled |= verdicts[name] > 0

    terminal = is_lead() and getattr(sys.stderr, "isatty", bool)()  # stderr may be closed: None
    begun, done, goal = time.perf_counter(), 0, 0

    def tick(passes):  # on a terminal: where it is, and how long all that is planned can take
        nonlocal done
        done += passes
        if terminal:
            seconds = round(max(goal - done, 0) / max(done, 1) * (time.perf_counter() - begun))
            left = f"at most {datetime.timedelta(seconds=seconds)} left in all"
            line = f"\r{where}, {left if done else 'estimating'}\033[K"
            print(line, end="", file=sys.stderr, flush=True)

    def share(name):  # each process then has the verdicts of all, and they divide the same images
        if world > 1:
            merged = verdicts[name].to(x.device)
            dist.all_reduce(merged, dist.ReduceOp.MAX)
            verdicts[name] = merged.cpu()

    for name in plan:
        share(name)  # one can have read what another evaluation wrote meanwhile
        spare()
        todo = (verdicts[name] == NOT_ASKED).nonzero().squeeze(1)[rank::world]
        chunk = batch_size if x.device.type == "cpu" else 4 * batch_size  # recorded for each anew
        batches = todo.split(chunk) if len(todo) else []
        for i, index in enumerate(batches, 1):
            where = f"{name}, batch {i}/{len(batches)}"
            ahead = {k: (verdicts[k] == NOT_ASKED).sum().item() // world for k in plan}
            goal = done + sum(PASSES.get(k, 1) * n for k, n in ahead.items())
            tick(0)
            images, labels = x[index] / 255, y[index]
            options = {"eps": eps, "seed": seed, "index": index, "batch_size": batch_size}
            options |= {"judge": model, "tick": tick if terminal else None}
            attacked = fast if name == "square" else half
            x_adv = (ATTACKS | STAGES)[name](attacked, images, labels, **options)
            wrong = verdict(model, images, labels, x_adv, eps, batch_size)
            tick(len(index))
            verdicts[name][index] = wrong.to("cpu", torch.int8)
            spare()
            if save and world == 1:
                save(verdicts)
        if world > 1:
            share(name)
            spare()
            if save and rank == 0:
                save(verdicts)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return verdicts


def doubts(model, x, y):
    """Sentences on what makes attacks on the model doubtful; x (N, C, H, W) in [0, 1], y (N,)."""
    x, y = x[:64].detach().clone().requires_grad_(), y[:64].long()
    with eval_mode(model), torch.enable_grad():
        logits, again = model(x), model(x)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    found, sums = [], logits.sum(1)
    if (logits >= 0).all() and (sums - 1).abs().max() < 1e-4:
        found.append("the model seems to return probabilities: the attacks want logits")
    if not torch.allclose(logits, again, rtol=1e-4, atol=1e-5):
        found.append("the model is random: two forwards of one batch differ")
    blind = 1 - (grad.flatten(1).abs() > 0).any(1).float().mean().item()  # NaN is not > 0 either
    if blind > 0.02:
        found.append(f"the gradient is zero or NaN at {blind:.0%} of the images")
    return found


def masking(figures):
    """Sentences on figures of `summarise` that look like gradient masking."""
    accuracy = {name: figure["accuracy"] for name, figure in figures.items()}
    found, under_pgd = [], max(accuracy.get(name, 0) for name in ("pgd20", "pgd100"))
    if (gap := under_pgd - accuracy.get("aa", 100)) > 3:
        usual = "the paper's AT: 4 to 5, its MAIL-AT and CLIRAT: 11 to 15"
        found.append(f"AutoAttack is {gap:.1f} points under PGD ({usual})")
    if (gap := accuracy.get("fab-t", 0) - accuracy.get("square", 100)) > 0.2:
        found.append(f"Square takes {gap:.1f} points more than the white-box attacks")
    return found


# ---- Output --------------------------------------------------------------------------------------


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


def paper_row(settings, attacks):
    """The paper's cells (Tables 1, 2) for `settings` of a verdict file, None where it has none."""
    training, file = settings["training"], Path(__file__).with_name(".figures") / "paper.csv"
    arch = str(training.get("arch")).replace("wrn-34-10", "wrn-32-10")  # the same network
    usual = settings["dataset"] == "CIFAR-10" and abs(settings["eps"] - 8 / 255) < 1e-9
    if usual and file.exists():
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
            if (row["arch"], row["method"]) == (arch, training.get("method")):
                return [row.get(name, "") for name in attacks]


# ---- Verdict files -------------------------------------------------------------------------------

SETTINGS = "n", "eps", "seed", "amp", "version", "data", "weights"  # make a verdict file's key
VERSION = 5  # of the attacks and the files: verdicts of another version are not reused
CIFAR10 = 21_590_746_922_745  # the CRCs of its 10,000 test images, in any order, added up


def read_verdicts(path):
    """(verdicts of `evaluate`, settings) from a file of `keep`. ValueError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(str(file["settings"]))
            _ = [settings[name] for name in (*SETTINGS, "dataset")], {**settings["training"]}
            names = [name for name in file.files if name != "settings"]
            return {name: torch.from_numpy(file[name]) for name in names}, settings
    except Exception as error:  # a damaged file can raise nearly anything
        what = f"{path} is no file of verdicts, or is damaged ({error})"
        raise ValueError(f"{what}: move it away to evaluate afresh") from None


def keep(path, settings, verdicts):
    """Write verdicts to their file, and take over what another process put there meanwhile."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # not on Windows, nor on every file system
            import fcntl

            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)  # ends the lock
            fcntl.flock(folder, fcntl.LOCK_EX)
        there = read_verdicts(path)[0] if path.exists() else {}
        for name in there.keys() | verdicts.keys():
            both = [v[name] for v in (there, verdicts) if name in v]
            verdicts[name] = both[0].maximum(both[-1])  # whatever was asked is above NOT_ASKED
        buffer = io.BytesIO()
        arrays = {name: verdict.numpy() for name, verdict in verdicts.items()}
        np.savez_compressed(buffer, settings=json.dumps(settings), **arrays)
        clirat.write(path, buffer.getbuffer())


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    about = "Robust accuracy of checkpoints, a row each of the paper's Tables 1 and 2."
    parser = argparse.ArgumentParser("eval_attacks.py", "%(prog)s CKPT [CKPT ...] [options]", about)
    add, cuda = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("checkpoints", nargs="+", type=Path, metavar="CKPT", help="state dicts, such as last.pt")
    add("--attacks", nargs="+", choices=ATTACKS, default=PAPER_COLUMNS, metavar="NAME",
        help=f"columns, of {', '.join(ATTACKS)} (default: the paper's six)")  # fmt: skip
    add("--arch", help="resnet18 or wrn-D-K (default: what a checkpoint says or shows)")
    add("--data", default="data", help="folder of CIFAR-10, FILE.npz or toy (default: data)")
    add("--n", type=number(int, 1), help="on the first N test images (default: all)")
    add("--batch-size", type=number(int, 1), help="(default: 64; CUDA: 128, --amp 512)")
    add("--eps", type=number(float, 0, 1), default="8/255", help="L-infinity (default: 8/255)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of the attacks' noise (default: 0)")
    add("--amp", action="store_true", help="attack in bfloat16; float32 alone counts successes")
    add("--device", default=cuda, help=f"such as cpu, cuda, cuda:1 (default: {cuda})")
    add("--json", type=Path, metavar="FILE.json", help="write the figures there as well")
    args = parser.parse_args(argv)
    on_cuda = 512 if args.amp else 128
    args.batch_size = args.batch_size or (on_cuda if args.device.startswith("cuda") else 64)
    if args.json and not (args.json.suffix == ".json" and args.json.resolve().parent.is_dir()):
        parser.error(f"--json {args.json} is no .json in a folder that exists")
    return args


def verdict_file(args, path, model, metadata, x, y):
    """The file for a checkpoint's verdicts under these settings, beside it, and the settings."""
    settings = {"n": args.n, "eps": args.eps, "seed": args.seed, "amp": args.amp}
    settings |= {"version": VERSION, "data": clirat.digest(x, y)}
    settings |= {"weights": clirat.digest(*model.state_dict().values())}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    cifar10 = sum(map(zlib.crc32, x.cpu().numpy())) == CIFAR10
    settings |= {"dataset": "CIFAR-10" if cifar10 else Path(args.data).name, "training": metadata}
    return path.with_name(f"{path.name}.{key}.npz"), settings


def evaluate_one(args, path, model, kept, settings, x, y):
    """Evaluate a checkpoint, its verdicts kept in a file. Returns what --json says of it."""

    def save(verdicts):
        try:
            keep(kept, settings, verdicts)
        except (OSError, ValueError) as error:
            warnings.warn(f"verdicts are not kept: {error}", stacklevel=2)  # said once

    verdicts = read_verdicts(kept)[0] if kept.exists() else {}
    options = {"eps": args.eps, "seed": args.seed, "batch_size": args.batch_size, "amp": args.amp}
    evaluate(model, x, y, args.attacks, verdicts=verdicts, save=save, **options)
    figures, training = summarise(verdicts, args.attacks), settings["training"]
    warned = doubts(model, x / 255, y) + masking(figures)
    if "data" in training and (training["data"] == "toy") != (args.data == "toy"):
        warned.append(f"trained on {training['data']}, evaluated on {args.data}")
    if "state_dict" in training:
        warned.append(f"of the state dicts in the file this is {training['state_dict']}")
    return {"checkpoint": str(path)} | settings | {"attacks": figures, "warnings": warned}


def main(argv=None):
    args, results = parse_args(argv), []
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 verdicts
    torch.backends.cudnn.allow_tf32 = False
    try:
        device = clirat.join_processes(args.device, args.amp)
        networks = [models.load(path, args.arch) for path in args.checkpoints]
        x, y = (t.to(device) for t in clirat.load_data(args.data, ["test"]))
        n = args.n = args.n or len(x)
        if n > len(x):
            raise ValueError(f"--n {n} is more than the {len(x)} test images")
        present, runs = len(y[:n].unique()), []
        for path, (model, metadata) in zip(args.checkpoints, networks, strict=True):
            classes = len(list(model.parameters())[-1])  # the last layer's bias
            if y.max() >= classes:
                raise ValueError(f"{path} knows {classes} classes, {args.data} has {y.max() + 1}")
            if present < classes and is_lead():
                said = f"{path} knows {classes} classes, the {n} images are of {present}"
                print(f"note: {said}", file=sys.stderr)
            runs.append((path, model, *verdict_file(args, path, model, metadata, x, y)))
            if runs[-1][2].exists():
                read_verdicts(runs[-1][2])
    except (OSError, ValueError, RuntimeError) as error:
        print(f"eval_attacks.py: error: {error}", file=sys.stderr)
        sys.exit(2)

    def print_row(*cells):
        if is_lead():
            print(f"| {' | '.join(map(str, cells))} |", flush=True)

    eps = f"{255 * args.eps:.4g}/255"
    try:
        if is_lead():
            print(f"{args.data}: {n} of {len(x)} test images {tuple(x.shape[1:])}, on {device}\n")
        print_row("checkpoint", "n", "eps", *map(str.upper, args.attacks))
        print_row(*["---"] * (3 + len(args.attacks)))
        for path, model, file, settings in runs:
            if device.type == "cpu":  # the faster layout there; on CUDA not, without TF32
                model.to(memory_format=torch.channels_last)
            model.to(device)
            result = evaluate_one(args, path, model, file, settings, x[:n], y[:n])
            cell = "{accuracy:.2f} [{interval[0]:.1f}, {interval[1]:.1f}]"
            cells = [cell.format(**result["attacks"][name]) for name in args.attacks]
            print_row(path, n, eps, *cells)
            if reference := paper_row(settings, args.attacks):
                name = "the paper's {method}, {arch}".format(**settings["training"])
                print_row(name, "?", eps, *reference)  # it does not state its n
            results.append(result)
            if args.json and is_lead():
                clirat.write(args.json, json.dumps(results, indent=2).encode() + b"\n")
            for doubt in result["warnings"] if is_lead() else []:
                print(f"warning: {path}: {doubt}", file=sys.stderr)
    except (KeyboardInterrupt, OSError) as error:
        why = f"{str(error) or 'Ctrl-C'}; the same command goes on from there"
        print(f"\neval_attacks.py: stopped: {why}", file=sys.stderr)
        sys.stdout = None if isinstance(error, BrokenPipeError) else sys.stdout  # no second try
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
