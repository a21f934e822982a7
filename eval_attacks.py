"""Robust accuracy under the paper's attacks: NAT, PGD-20, PGD-100, CW, APGD-CE and AutoAttack.

    python eval_attacks.py runs/clirat-resnet18-s1/last.pt --attacks nat pgd20 pgd100 cw apgd aa

AutoAttack is the standard version for L-infinity (Croce & Hein 2020): APGD-CE, targeted APGD,
targeted FAB and Square, each on what is still robust. Every attack works on any function that maps
images (N, C, H, W) in [0, 1] to logits (N, K), and returns images in the ball around x. Noise
belongs to an image's number: batch size, order and other images move a verdict by rounding at most.

Options that the attacks share: seed of the noise; index (N,), the images' numbers, 0..N-1 by
default; batch_size of the forward passes; judge, the model whose verdict counts where `model` is
only a faster copy of it. ValueError or TypeError on images outside [0, 1], labels that are no
classes, or a model that does not return logits.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import sys
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
from clirat import check_attack, eval_mode, is_lead, is_wrong, number, pgd, pm, progress


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
    index = torch.arange(len(x), device="cpu") if index is None else index.cpu()
    if index.shape != y.shape or index.min() < 0:
        raise ValueError(f"want index ({len(x)},), none negative, got {tuple(index.shape)}")
    return x.detach(), y.long(), index, logits.shape[1]


def noise(shape, index, *seeds):
    """Uniform [0, 1) noise (N, *shape), each point's drawn from its number in index and seeds."""
    generator = torch.Generator("cpu")
    options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    draws = []
    for i in index.tolist():
        seed = np.random.SeedSequence([i, *seeds]).generate_state(1)[0]
        generator.manual_seed(int(seed))
        draws.append(torch.rand(shape, **options))
    return torch.stack(draws)


def in_batches(attack, x, y, batch_size, targets=1, *, judge=None):
    """Each point's first misclassified image (N, C, H, W), x where there is none.

    attack(points, k, active), for k = 0..targets-1 in turn on batches of what is still robust,
    yields images for these indices into x, and which are misclassified. active: which are left;
    while `attack` is suspended at a yield, those that were fooled are taken out of it in place.
    """
    x_adv, robust = x.clone(), torch.ones_like(y, dtype=torch.bool)
    for k in range(targets):
        for points in robust.nonzero().squeeze(1).split(batch_size):
            active, found = robust[points], x_adv[points]
            for images, wrong in attack(points, k, active) if len(points) else []:
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

    The results of the others are 0. For CUDA graphs row 0 is repeated up to one of eight sizes.
    """
    device = graph_device(model)
    run, eighth = models.graphed(function, device), math.ceil(batch_size / 8)

    def call(active, *rows):
        index = active.nonzero().squeeze(1)  # (n,)
        # index 0 is repeated: a CUDA graph is recorded for each size
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
    with eval_mode(model):
        logits = logits_of(model, x, batch_size)
    logits = logits.scatter(1, y[:, None], -torch.inf)
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


APGD_LOSSES = {  # how many classes it needs, and a function of logits (N, K), y and target (N,)
    "ce": (2, lambda logits, y, target: F.cross_entropy(logits, y, reduction="none")),
    "dlr": (3, lambda logits, y, target: dlr_loss(logits, y)),
    "targeted": (4, dlr_targeted_loss),
}


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
    if loss not in APGD_LOSSES:
        raise ValueError(f"unknown loss {loss!r}: use {', '.join(APGD_LOSSES)}")
    needed, objective = APGD_LOSSES[loss]
    if classes < needed:
        warnings.warn(f"no APGD: loss {loss} needs {needed} classes, not {classes}", stacklevel=2)
        return x
    checks = apgd_checks(steps)
    targets = targets_of(model, x, y, batch_size) if loss == "targeted" else y[None]

    @partial(on_active_rows, model=model, batch_size=batch_size)
    def loss_and_grad(x, y, target):
        x = x.detach().requires_grad_()
        logits = model(x)
        value = objective(logits, y, target)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad, logits.detach()

    def attack(points, k, active):
        clean, labels, target = x[points], y[points], targets[k, points]
        lower, upper = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        t = 2 * noise(x.shape[1:], index[points.cpu()], seed, k).to(x) - 1
        start = clean + eps * t / (t.abs().amax((1, 2, 3), keepdim=True) + 1e-12)
        now = before = start.clamp(0, 1)
        value, grad, logits = loss_and_grad(active, now, labels, target)
        best, best_grad, best_value = now, grad, value
        reviewed_value = value  # the best at the last review
        step = torch.full_like(value, 2 * eps)
        halved = torch.ones_like(active)
        # iterations since the review in which the loss rose: first over 0, as in the published code
        rises, last = torch.zeros_like(value), torch.zeros_like(value)
        yield now, is_wrong(logits, labels)  # `active` can shrink at a yield
        for i in range(steps):
            if i - 1 in checks:  # a review of the iterations up to the one before this
                few = rises <= 0.75 * checks[i - 1]
                stuck = few | (~halved & (reviewed_value >= best_value))
                step = torch.where(stuck, step / 2, step)
                # back to the best, but not `before`: the next momentum is best - before
                now = torch.where(widen(stuck), best, now)
                grad = torch.where(widen(stuck), best_grad, grad)
                halved, reviewed_value, rises = stuck, best_value, torch.zeros_like(rises)
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
        return in_batches(attack, x, y, batch_size, len(targets), **shared)


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
    targets = targets_of(model, x, y, batch_size)

    @partial(on_active_rows, model=model, batch_size=batch_size)
    def boundary(x, y, target):  # of the linearised classifier: <w, .> = b
        x = x.detach().requires_grad_()
        logits = model(x)
        f = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (w,) = torch.autograd.grad(f.sum(), x)
        return w, (w * x.detach()).sum((1, 2, 3)) - f.detach()

    @partial(on_active_rows, model=model, batch_size=batch_size)
    def classify(x):
        with torch.no_grad():
            return (model(x),)

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
            yield now, wrong & near  # `active` can shrink here
            now = torch.where(widen(wrong & ~near), clean + 0.9 * (now - clean), now)

    with eval_mode(model), torch.enable_grad():
        return in_batches(attack, x, y, batch_size, len(targets), **shared)


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
    draw = partial(torch.rand, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    places = draw(queries, 2, dtype=torch.float64).tolist()
    signs = draw(queries, channels, 1, 1, dtype=torch.float32).sub(0.5).sign().to(x)

    @partial(on_active_rows, model=model, batch_size=batch_size)
    def judged(x, y):
        with torch.no_grad():
            logits = model(x)
        return pm(logits, y), is_wrong(logits, y)

    def attack(points, _, active):
        clean, labels = x[points], y[points]
        lower, upper = (clean - eps).clamp(min=0), (clean + eps).clamp(max=1)
        stripes = noise((channels, 1, width), index[points.cpu()], seed).sub(0.5).sign().to(x)
        best = (clean + eps * stripes).clamp(0, 1)
        margin, wrong = judged(active, best, labels)
        yield best, wrong  # `active` can shrink at a yield
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
        return in_batches(attack, x, y, batch_size, **shared)


# ---- The attacks by name -------------------------------------------------------------------------
def last_pgd(
    model, x, y, *, eps, steps=20, step_size=0.003, loss="ce", noisy=True, seed=0, index=None,
    batch_size=64, judge=None,
):  # fmt: skip
    """PGD as in MAIL's evaluation: uniform start in the ball, step 0.003; x itself if not noisy.

    Returns the last iterate (N, C, H, W), whatever happened on the way: judge is ignored.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    start = x + eps * (2 * noise(x.shape[1:], index, seed).to(x) - 1) if noisy else x
    options = {"eps": eps, "step_size": step_size, "steps": steps, "loss": loss}
    batches = zip(*(t.split(batch_size) for t in (x, y, start)), strict=True)
    return torch.cat([pgd(model, x_, y_, init=at, **options) for x_, y_, at in batches])


ATTACKS = {
    "nat": lambda model, x, y, **_: x.detach(),
    "fgsm": partial(last_pgd, steps=1, step_size=1, noisy=False),  # Eq. 1: one step, cut to eps
    "pgd20": last_pgd,
    "pgd100": partial(last_pgd, steps=100),
    "cw": partial(last_pgd, loss="cw"),  # PGD on CW's margin, as in MAIL's evaluation
    "apgd": apgd,
    "apgd-t": partial(apgd, loss="targeted"),
    "fab-t": fab_t,
    "square": square,
}
STAGES = ["apgd", "apgd-t", "fab-t", "square"]  # of AutoAttack, in its order
COLUMNS = ["nat", "fgsm", "pgd20", "pgd100", "cw", "apgd", "aa"]  # what the command takes
PAPER_COLUMNS = ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]


def attack_and_judge(name, model, x, y, *, judge, eps, batch_size, **options):
    """Images (N, C, H, W) of an attack on model, and which the judge misclassifies, (N,).

    RuntimeError on images outside the ball or [0, 1].
    """
    x_adv = ATTACKS[name](model, x, y, eps=eps, batch_size=batch_size, judge=judge, **options)
    low, high = x_adv.aminmax()
    if not (0 <= low <= high <= 1 and (x_adv - x).abs().max() <= eps + 1e-6):
        raise RuntimeError("an attack left the ball or [0, 1]")
    with eval_mode(judge):
        return x_adv, is_wrong(logits_of(judge, x_adv, batch_size), y)  # by a fresh forward


def autoattack(model, x, y, *, eps, seed=0, index=None, batch_size=64):
    """Standard AutoAttack for L-infinity (Croce & Hein 2020): four attacks on what is robust.

    x: (N, C, H, W) in [0, 1]. y: (N,). Returns (N, C, H, W): a misclassified image for each point,
    x where none was found or x itself is misclassified. Warns where the model makes the result
    doubtful. What is attacked is a folded copy where that is the same function. On CUDA set
    torch.backends.cudnn.allow_tf32 = False before: convolutions are not float32 else.
    """
    x, y, index, _ = checked(model, x, y, eps, index)
    for doubt in doubts(model, x, y):
        warnings.warn(doubt, stacklevel=2)
    options = {"judge": model, "eps": eps, "seed": seed, "batch_size": batch_size}
    attacked = stand_in(model, x[:8])
    x_adv, robust = x.clone(), torch.ones_like(y, dtype=torch.bool)
    for name in ["nat", *STAGES]:
        points = robust.nonzero().squeeze(1)
        if len(points):
            case = attacked, x[points], y[points]
            found, wrong = attack_and_judge(name, *case, index=index[points.cpu()], **options)
            x_adv[points[wrong]], robust[points] = found[wrong], ~wrong
    return x_adv


# ---- Evaluation ----------------------------------------------------------------------------------
def stand_in(model, x, dtype=None):
    """A faster copy of the model to attack, or the model itself if images x show there is none."""
    if not isinstance(model, torch.nn.Module):
        return model
    for part in model.modules():
        if "forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks:
            return model  # a copy would run the original's forward, or not run its hooks
    with contextlib.suppress(Exception), eval_mode(model), torch.no_grad():
        copy = models.Folded(model)
        if torch.allclose(copy(x), model(x), rtol=1e-4, atol=1e-4):
            copy = copy.to(dtype, memory_format=torch.channels_last) if dtype else copy
            if copy(x).isfinite().all():  # a forward can fail in another dtype
                return copy
    return model


NOT_ASKED = -1  # in place of a verdict: 1 misclassified, 0 not (older files: 2 where spared)


def plan(attacks):
    """The names in ATTACKS that are run for these, in order: for aa its stages."""
    stages = STAGES if "aa" in attacks else []
    return list(dict.fromkeys(["nat", *(name for name in attacks if name != "aa"), *stages]))


def to_ask(verdicts, name):
    """Which images an attack is still to be run on, (n,) bool.

    AutoAttack's stages spare what is misclassified without an attack, or by one before them.
    """
    before = ["nat", *STAGES[: STAGES.index(name)]] if name in STAGES else []
    left = verdicts[name] == NOT_ASKED
    for earlier in (verdicts[stage] for stage in before if stage in verdicts):
        left = left & (earlier != 1)
    return left


def robust_in(verdicts, name):
    """Which images an attack did not fool, (n,) bool: for aa, none of its stages."""
    parts = plan(["aa"]) if name == "aa" else [name]
    return torch.stack([verdicts[part] for part in parts]).amax(0) == 0


def evaluate(
    model, x, y, attacks, *, eps, seed=0, batch_size=64, amp=False, verdicts=None, save=None,
    share=(0, 1),
):  # fmt: skip
    """Verdicts of `attacks`, names in ATTACKS or aa, on uint8 images x (N, C, H, W).

    y: (N,). amp: attack a copy in bfloat16; only the model itself counts a success. Returns {name:
    (N,) int8}: 1 misclassified, 0 not, -1 not asked. For AutoAttack these are its stages, each
    asked only of images that are still robust: where `square` has 0, all failed. verdicts: such a
    dict of an earlier call with the same settings, filled up in place. save: is called with them
    as they come in. share: (i, k) for images i, i + k, ... alone. ValueError on an unknown attack,
    TypeError on images that are not uint8. The model gets them in float32.
    """
    if unknown := {*attacks} - {*ATTACKS, "aa"}:
        found = f"{', '.join(sorted(unknown))}: use {', '.join(ATTACKS)} or aa"
        raise ValueError(f"unknown attacks {found}")
    if x.dtype != torch.uint8:
        raise TypeError(f"want uint8 images, got {x.dtype}: multiply those in [0, 1] by 255, round")
    some = x[:8].float() / 255
    *_, classes = checked(model, some, y[:8], eps)
    if len(y) != len(x) or not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"want {len(x)} labels in 0..{classes - 1}, got {len(y)} up to {y.max()}")
    if not 0 <= share[0] < share[1]:
        raise ValueError(f"want share (i, k) with 0 <= i < k, not {share}")
    fast = stand_in(model, some)
    half = stand_in(model, some, torch.bfloat16) if amp else fast
    if amp and half is model:
        warnings.warn("amp does nothing: this model has no copy in bfloat16", stacklevel=2)

    verdicts = {} if verdicts is None else verdicts
    for name in plan(attacks):
        empty = torch.full((len(x),), NOT_ASKED, dtype=torch.int8, device="cpu")
        verdicts.setdefault(name, empty)
    mine = torch.arange(len(x), device="cpu") % share[1] == share[0]
    # on CUDA each call of an attack records its graphs anew: fewer calls there
    chunk = batch_size if x.device.type == "cpu" else 4 * batch_size
    options = {"judge": model, "eps": eps, "seed": seed, "batch_size": batch_size}
    for name in plan(attacks):
        attacked = fast if name == "square" else half
        todo = (to_ask(verdicts, name) & mine).nonzero().squeeze(1)
        for index in progress(todo.split(chunk) if len(todo) else [], name):
            case = attacked, x[index].float() / 255, y[index]
            _, wrong = attack_and_judge(name, *case, index=index, **options)
            verdicts[name][index] = wrong.to("cpu", torch.int8)
            if save:
                save(verdicts)
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
    found, under, aa = [], [], figures.get("aa")
    for name in ("pgd20", "pgd100") if aa else []:
        figure = figures.get(name, aa)
        gap = figure["accuracy"] - aa["accuracy"]
        if gap > 3 and figure["interval"][0] > aa["interval"][1]:
            under.append(f"{gap:.1f} points under {name.upper()}")
    if under:
        usual = "the paper's AT: 4 to 5, its MAIL-AT and CLIRAT: 11 to 15"
        found.append(f"AutoAttack is {', '.join(under)} ({usual})")
    gap = figures["fab-t"]["accuracy"] - figures["square"]["accuracy"] if aa else 0
    if gap > 0.2:
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
    for name in dict.fromkeys([*attacks, *(STAGES if "aa" in attacks else [])]):
        k = robust_in(verdicts, name).sum().item()
        interval = [100 * end for end in wilson(k, n)]
        figures[name] = {"robust": k, "accuracy": 100 * k / n, "interval": interval}
    return figures


# ---- Verdict files -------------------------------------------------------------------------------

SETTINGS = "n", "eps", "seed", "amp", "version", "data", "weights"  # make a verdict file's key
VERSION = 5  # of the attacks and the files: verdicts of another version are not reused
CIFAR10 = 21_590_746_922_745  # the CRCs of its 10,000 test images, in any order, added up


def read_verdicts(path):
    """(verdicts of `evaluate`, settings) from a file of `keep`. ValueError if it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(str(file["settings"]))
            # a KeyError if one is missing
            _ = [settings[name] for name in (*SETTINGS, "dataset")], {**settings["training"]}
            verdicts = {k: torch.from_numpy(file[k]) for k in file.files if k != "settings"}
            if any(len(verdict) != settings["n"] for verdict in verdicts.values()):
                raise ValueError(f"not all are of {settings['n']} images")
            return verdicts, settings
    except Exception as error:  # a damaged file can raise nearly anything
        what = f"{path} is no file of verdicts, or is damaged ({error})"
        raise ValueError(f"{what}: without one, all is evaluated afresh") from None


def keep(path, settings, verdicts):
    """Write verdicts to their file, and take over what another process put there meanwhile."""
    with clirat.locked(path.with_name(".verdicts.lock")):
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
    add("--attacks", nargs="+", choices=COLUMNS, default=PAPER_COLUMNS, metavar="NAME",
        help=f"columns, of {', '.join(COLUMNS)} (default: the paper's six)")  # fmt: skip
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
    options["share"] = clirat.rank_and_world()
    evaluate(model, x, y, args.attacks, verdicts=verdicts, save=save, **options)
    if dist.is_initialized():
        for name in plan(args.attacks):
            merged = verdicts[name].to(x.device)
            dist.all_reduce(merged, dist.ReduceOp.MAX)  # whatever was asked is above NOT_ASKED
            verdicts[name] = merged.cpu()
        if is_lead():
            save(verdicts)
    figures, training = summarise(verdicts, args.attacks), settings["training"]
    warned = doubts(model, x[:64].float() / 255, y[:64]) + masking(figures)
    if "data" in training and (training["data"] == "toy") != (args.data == "toy"):
        warned.append(f"trained on {training['data']}, evaluated on {args.data}")
    if "state_dict" in training:
        warned.append(f"of the state dicts in the file this is {training['state_dict']}")
    return {"checkpoint": str(path)} | settings | {"attacks": figures, "warnings": warned}


def main(argv=None):
    args, results = parse_args(argv), []
    torch.set_float32_matmul_precision("highest")  # float32 verdicts
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
        print(f"| {' | '.join(map(str, cells))} |", flush=True)

    eps = f"{255 * args.eps:.4g}/255"
    try:
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
