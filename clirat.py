"""CLIRAT: Confused-Label Instance-Reweighted Adversarial Training in one file.

    python clirat.py --arch resnet18 --gamma 10 --beta -0.5

Equations and Algorithm 1 are those of "Instance Reweighting Adversarial Training Based on Confused Label" (Qiu, Wang,
Ma, Hou, Li & Li, Intelligent Automation & Soft Computing 37(2), 2023, doi:10.32604/iasc.2023.038241); where the paper
is silent, the README's table says what is done here and why.
Throughout: N images in a batch, K classes, images (N, C, H, W) in [0, 1], logits and probabilities (N, K), labels (N,).
"""

import argparse
import atexit
import contextlib
import csv
import ctypes
import datetime
import io
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import models

# ---- Margins and weights -------------------------------------------------------------------------------------------


def pm(probs, labels):
    """Probability margin (Eq. 5): p_y minus the largest other probability.

    probs: (N, K) rows of probabilities, K >= 2, any float dtype. labels: (N,) int64 in 0..K-1.
    Returns (N,) in [-1, 1], negative where the example is misclassified. ValueError on a wrong shape.
    """
    if probs.ndim != 2 or probs.shape[1] < 2 or labels.shape != probs.shape[:1]:
        raise ValueError(f"want probs (N, K >= 2) and labels (N,), got {tuple(probs.shape)} and {tuple(labels.shape)}")
    y = labels[:, None]  # (N, 1)
    return probs.gather(1, y).squeeze(1) - probs.scatter(1, y, -torch.inf).amax(1)


def cl_pm(probs, labels):
    """Confused-label probability margin, CL-PM (Eq. 7).

    A confused label (CL) is a class j with p_j > p_y. CL-PM is PM (Eq. 5) for an example without CLs, otherwise the sum
    of p_y - p_j over its CLs.

    probs: (N, K) rows of probabilities, K >= 2, any float dtype. labels: (N,) int64 in 0..K-1.
    Returns (N,) in [-1, 1]: PM where there is at most one CL, less than PM where there are several, 0 on a tie.
    ValueError on a wrong shape.
    """
    if probs.ndim != 2 or probs.shape[1] < 2 or labels.shape != probs.shape[:1]:
        raise ValueError(f"want probs (N, K >= 2) and labels (N,), got {tuple(probs.shape)} and {tuple(labels.shape)}")
    y = labels[:, None]  # (N, 1)
    gaps = probs.gather(1, y) - probs  # (N, K): p_y - p_j, negative at the CLs and 0 at j = y
    margin = gaps.scatter(1, y, torch.inf).amin(1)  # (N,): Eq. 5
    return torch.where(margin < 0, gaps.clamp(max=0).sum(1), margin)


def instance_weights(margins, gamma, beta, norm="batch"):
    """Weights of a batch from its margins (Eq. 6, Algorithm 1 l.9 and l.14); they carry no gradient.

    margins: (N,) of `pm`, `cl_pm` or another measure that falls with vulnerability. gamma >= 0: slope. beta: bias.
    norm: "batch" scales the weights to mean 1 (l.14 prints M, the number of batches, but needs the batch size);
    "mail" multiplies them by 3 instead, as MAIL's released code does.
    Returns (N,), non-negative and finite for any gamma. ValueError on another norm.
    """
    scores = (gamma * (beta - margins.detach())).nan_to_num()  # finite where a huge gamma overflows
    if norm == "batch":  # m w / sum(w) in log space: no 0 / 0 where every w underflows
        return len(margins) * F.logsigmoid(scores).softmax(0)
    if norm == "mail":
        return 3 * scores.sigmoid()
    raise ValueError(f"unknown norm {norm!r}: use batch or mail")


# ---- Losses: tensors in, tensors out -------------------------------------------------------------------------------


def weighted_mean(losses, weights):  # Algorithm 1 l.15, as a mean
    return losses.mean() if weights is None else (weights * losses).mean()


def kl(logits_nat, logits_adv):
    """KL(p(x) || p(x_adv)) of each example, (N,). Both sides in log space: no NaN gradient where softmax underflows."""
    return F.kl_div(logits_adv.log_softmax(1), logits_nat.log_softmax(1), reduction="none", log_target=True).sum(1)


def at_loss(logits_adv, labels, weights=None):
    """Adversarial training: mean of w CE(f(x_adv), y). logits (N, K), labels and weights (N,); a scalar >= 0."""
    return weighted_mean(F.cross_entropy(logits_adv, labels, reduction="none"), weights)


def trades_loss(logits_nat, logits_adv, labels, trade_off, weights=None):
    """TRADES (Eq. 3), its robust term weighted: mean CE(f(x), y) + trade_off * mean w KL(p(x) || p(x_adv)); a scalar.

    trade_off: Eq. 3's beta, which is not the beta of Eq. 6.
    """
    return F.cross_entropy(logits_nat, labels) + trade_off * weighted_mean(kl(logits_nat, logits_adv), weights)


def mart_loss(logits_nat, logits_adv, labels, trade_off, weights=None):
    """MART (Eq. 4), its adversarial term weighted; a scalar.

    mean w BCE(p(x_adv), y) + trade_off * mean KL(p(x) || p(x_adv)) (1 - p_y(x)),
    BCE = -log p_y - log(1.0001 - max_{k != y} p_k), where 1.0001 is the stabiliser of MART's published code.
    """
    y = labels[:, None]  # (N, 1)
    runner_up = logits_adv.softmax(1).scatter(1, y, 0).amax(1)  # (N,)
    bce = F.cross_entropy(logits_adv, labels, reduction="none") - torch.log(1.0001 - runner_up)
    p_y = logits_nat.softmax(1).gather(1, y).squeeze(1)
    return weighted_mean(bce, weights) + trade_off * (kl(logits_nat, logits_adv) * (1 - p_y)).mean()


class Method(NamedTuple):
    loss: str  # at, trades or mart
    margin: str | None = None  # pm (Eq. 5), cl-pm (Eq. 7), lps (GAIRAT's least PGD steps) or None: all weights 1
    gamma: float | None = None
    beta: float | None = None
    trade_off: float | None = None


METHODS = {
    "at": Method("at"),
    "trades": Method("trades", trade_off=5.0),
    "mart": Method("mart", trade_off=6.0),
    "mail-at": Method("at", "pm", 10.0, -0.5),
    "mail-trades": Method("trades", "pm", 2.0, 0.0, 5.0),
    "mail-mart": Method("mart", "pm", 2.0, 0.0, 6.0),
    "clirat": Method("at", "cl-pm", 10.0, -0.5),
    "clir-trades": Method("trades", "cl-pm", 2.0, 0.0, 5.0),
    "clir-mart": Method("mart", "cl-pm", 2.0, 0.0, 6.0),
    # GAIRAT's (1 + tanh(-1 + 5 (1 - 2 kappa / steps))) / 2 is Eq. 6 with kappa / steps for the margin and these two:
    "gairat": Method("at", "lps", 20.0, 0.4),
    "fat": Method("at"),
}


# ---- PGD -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(model):
    """Hold a model in eval mode with constant parameters, then restore what was found, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def pgd(model, x, y, *, eps, step_size, steps, loss="ce", init="normal", tau=None, autocast=None, return_kappa=False):
    """Projected gradient ascent in the L-infinity ball (Eq. 2; Algorithm 1 l.5-8, whose l.7 prints theta for x).

    x: (N, C, H, W) in [0, 1]. y: (N,). eps, step_size: in units of x. steps >= 0.
    loss: "ce" cross-entropy, "kl" KL(p(x) || p(x_adv)), "cw" max_{k != y} z_k - z_y.
    init: "normal" x + 0.001 N(0, I), "uniform" in the ball, "none" x itself (l.5 as printed), or a tensor like x.
    tau: an example stops once more than tau of its iterates, the start included, were misclassified (FAT); None: never.
    autocast: a context for the model's forward passes; everything else stays in the dtype of x.

    Returns x_adv like x, inside the ball and [0, 1]; with return_kappa also kappa (N,), at how many of the iterates
    0..steps-1 (0: the start) the example was classified correctly (GAIRAT). Runs in eval mode and restores the mode it
    found; gradients and BatchNorm statistics stay untouched. ValueError on an unknown loss or init.
    """
    if loss not in ("ce", "kl", "cw"):
        raise ValueError(f"unknown loss {loss!r}: use ce, kl or cw")
    if isinstance(init, torch.Tensor):
        x_adv = init.detach()
    elif init == "normal":
        x_adv = x + 0.001 * torch.randn_like(x)
    elif init == "uniform":
        x_adv = x + torch.empty_like(x).uniform_(-eps, eps)
    elif init == "none":
        x_adv = x
    else:
        raise ValueError(f"unknown init {init!r}: use normal, uniform, none or a tensor")
    autocast = autocast or contextlib.nullcontext()
    x = x.detach()
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = x_adv.detach().clamp(lower, upper)
    kappa = torch.zeros_like(y)

    with frozen(model), torch.enable_grad():
        if loss == "kl":  # the natural branch is constant: one forward, not one a step
            with torch.no_grad(), autocast:
                logits_nat = model(x).to(x.dtype)
        for t in range(steps):
            x_adv.requires_grad_()
            with autocast:
                logits = model(x_adv).to(x.dtype)
            if loss == "ce":
                objective = F.cross_entropy(logits, y, reduction="sum")
            elif loss == "kl":
                objective = kl(logits_nat, logits).sum()
            else:
                objective = -pm(logits, y).sum()  # Eq. 5 on logits
            (grad,) = torch.autograd.grad(objective, x_adv)
            kappa += logits.argmax(1) == y
            direction = grad.sign()  # not in place: a sum's gradient is one number, expanded
            if tau is not None:
                direction *= (t + 1 - kappa <= tau).view(-1, *[1] * (x.ndim - 1))
            x_adv = x_adv.detach().add(direction, alpha=step_size).clamp_(lower, upper)
    return (x_adv, kappa) if return_kappa else x_adv


# ---- Algorithm 1 ---------------------------------------------------------------------------------------------------


def scaled(epochs, *paper_epochs):
    """Epochs of the paper's 120-epoch schedule, scaled to a run of `epochs`."""
    return [round(epochs * epoch / 120) for epoch in paper_epochs]


def learning_rate(epoch, lr, milestones):
    """Learning rate of an epoch (1-based): lr, divided by 10 after each milestone."""
    return lr / 10 ** sum(epoch > milestone for milestone in milestones)


def is_lead():
    """Whether this process writes the files: rank 0 under torchrun."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(t):
    """(n, ...) of each process -> (N, ...) of the global batch, in rank order; without torchrun, t itself."""
    if not dist.is_initialized():
        return t
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t)
    return torch.cat(parts)


def shard(t):
    """(N, ...) of the global batch -> this process's (n, ...): the inverse of `gather`."""
    return t.tensor_split(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else t


def batch_weights(args, probs, y, kappa, num_cl):
    """Algorithm 1 l.9 and l.14 over the global batch; examples dropped by `--exclude` get weight 0. Returns (n,)."""
    margin = METHODS[args.method].margin
    margins = kappa / args.steps if margin == "lps" else pm(probs, y) if margin == "pm" else cl_pm(probs, y)
    margins, num_cl = gather(margins), gather(num_cl)  # (N,) each
    keep = {None: num_cl >= 0, "single": num_cl != 1, "multi": num_cl < 2}[args.exclude]
    weights = torch.zeros_like(margins)
    weights[keep] = len(keep) / keep.sum()  # mean 1
    if margin:
        weights[keep] *= instance_weights(margins[keep], args.gamma, args.beta, args.weight_norm)
    return shard(weights)


def train_step(args, epoch, net, model, optimizer, x, y, start):
    """Algorithm 1 l.4-15 on one mini-batch, or on this process's part of it.

    net: the network, to attack. model: the same for the training forward, in DistributedDataParallel under torchrun.
    x, start: (n, C, H, W), images and PGD's start points. y: (n,). Returns sums over the examples, (8,): loss; examples
    with no, one and several confused labels; the weights of these three groups; squared weights.
    FloatingPointError on a non-finite loss, before it reaches the parameters.
    """
    method = METHODS[args.method]
    autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp)
    tau = sum(epoch > e for e in scaled(args.epochs, 50, 90)) if args.method == "fat" else None
    inner_loss = "kl" if method.loss == "trades" else "ce"

    attacked = net
    if x.device.type == "cpu" and not args.compile:  # saves a tenth of the attack
        attacked = models.folded(net, torch.bfloat16 if args.amp else torch.float32)
    x_adv, kappa = pgd(  # Alg. 1 l.4-8
        attacked, x, y, eps=args.eps, step_size=args.step_size, steps=args.steps, loss=inner_loss, init=start, tau=tau,
        autocast=autocast, return_kappa=True,
    )  # fmt: skip
    with autocast:
        logits_nat = None if method.loss == "at" else model(x).float()  # (n, K)
        logits_adv = model(x_adv).float()  # (n, K)

    with torch.no_grad():
        probs = logits_adv.softmax(1)
        num_cl = (probs > probs.gather(1, y[:, None])).sum(1)  # (n,)
        weights = torch.ones_like(probs[:, 0])  # l.12
        if epoch > args.burn_in and (method.margin or args.exclude):  # l.11
            weights = batch_weights(args, probs, y, kappa, num_cl)  # l.9, l.14

    if method.loss == "at":
        loss = at_loss(logits_adv, y, weights)
    elif method.loss == "trades":
        loss = trades_loss(logits_nat, logits_adv, y, args.trade_off, weights)
    else:
        loss = mart_loss(logits_nat, logits_adv, y, args.trade_off, weights)
    if not gather(loss.detach()[None]).isfinite().all():  # on every process, so that all stop
        raise FloatingPointError("the loss is not finite")
    if method.loss != "at" or not args.exclude or gather(weights).any():  # without examples AT has nothing to learn
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # l.15

    groups = F.one_hot(num_cl.clamp(max=2), 3).float()  # (n, 3)
    total_loss, squares = (loss.detach() * len(x))[None], weights.square().sum()[None]
    return torch.cat([total_loss, groups.sum(0), weights @ groups, squares])


def evaluate(net, x, y, *, eps, batch_size):
    """NAT and PGD-20 accuracy in [0, 1] on uint8 images x (N, C, H, W), without autocast.

    PGD-20 as in MAIL's evaluation: uniform start, step 0.003, verdict on the last iterate.
    """
    correct, attacked = torch.zeros(2, device=x.device), models.folded(net)
    for images, labels in zip(shard(x).split(batch_size), shard(y).split(batch_size), strict=True):
        images = to_input(images)
        x_adv = pgd(attacked, images, labels, eps=eps, step_size=0.003, steps=20, init="uniform")
        with frozen(net), torch.no_grad():
            correct += torch.stack([(net(inputs).argmax(1) == labels).sum() for inputs in (images, x_adv)])
    if dist.is_initialized():
        dist.all_reduce(correct)
    return (correct / len(x)).tolist()


def mini_batches(x, y, batch_size):
    """Shuffled, augmented (images, labels, PGD start points) of one epoch; under torchrun, this process's part of each.

    Everything random is drawn for the global batch from a state that all processes share, so that their number does not
    change the training data. A last batch of one image a process is dropped: BatchNorm cannot train on it.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    for batch in torch.randperm(len(x), device=x.device).split(batch_size):
        batch = batch[: len(batch) // world * world]  # equal parts: the last batch can lose a few
        if len(batch) < 2 * world:
            return
        images = augment(x[batch])
        noise = torch.randn(images.shape, device=x.device)
        images = to_input(shard(images))
        yield images, shard(y[batch]), images + 0.001 * shard(noise)  # README: start off x, where TRADES' KL is flat


def report_progress(device, done, steps, step_seconds):
    """Progress and time left on a terminal; on a CPU, one early word about a run that will take more than a day."""
    left = datetime.timedelta(seconds=round(step_seconds * (steps - done)))
    if sys.stderr.isatty():
        print(f"\rstep {done}/{steps}, {left} left \r", end="", file=sys.stderr, flush=True)
    if done == 3 and device.type == "cpu" and left > datetime.timedelta(days=1):
        small = "python clirat.py --data toy --arch wrn-10-1 --epochs 12"
        print(f"This run will take about {left} on this CPU. A CPU-sized one: {small}", file=sys.stderr, flush=True)


def train(args, data, net, fast, model, optimizer, state):
    """Algorithm 1 from the epoch after state["epoch"]; each epoch ends with a row of log.csv and a checkpoint."""
    x_train, y_train, x_test, y_test = data
    batches = math.ceil(len(x_train) / args.batch_size)
    done, steps, begun = 0, batches * (args.epochs - state["epoch"]), time.perf_counter()
    if is_lead() and state["log"]:  # a kill can come between last.pt and log.csv
        save_log(Path(args.out, "log.csv"), state["log"])
    for epoch in range(state["epoch"] + 1, args.epochs + 1):  # Alg. 1 l.1
        torch.manual_seed(args.seed * 10_007 + epoch)  # of (seed, epoch) alone: a resumed run needs no random state
        lr = learning_rate(epoch, args.lr, args.lr_milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr
        net.train()
        sums, epoch_begun = torch.zeros(8, device=x_train.device), time.perf_counter()
        for batch, (x, y, start) in enumerate(mini_batches(x_train, y_train, args.batch_size), 1):  # l.2-3
            try:
                sums += train_step(args, epoch, fast, model, optimizer, x, y, start)  # l.4-15
            except FloatingPointError as error:
                raise FloatingPointError(f"epoch {epoch}, batch {batch}: {error}") from None
            done += 1
            if is_lead():
                report_progress(x.device, done, steps, (time.perf_counter() - begun) / done)
        if dist.is_initialized():
            dist.all_reduce(sums)
            for buffer in net.buffers():  # without SyncBatchNorm the statistics differ: all take those of rank 0
                dist.broadcast(buffer, 0)
        if not all(parameter.isfinite().all() for parameter in net.parameters()):
            raise FloatingPointError(f"epoch {epoch}, batch {batches}: the weights are not finite")

        row = log_row(epoch, lr, sums.tolist(), time.perf_counter() - epoch_begun)
        if args.eval_every and epoch % args.eval_every == 0:
            images, labels = x_test[: args.eval_size], y_test[: args.eval_size]
            row["nat"], row["pgd20"] = evaluate(net, images, labels, eps=args.eps, batch_size=args.batch_size)
        if is_lead():
            save_epoch(args, net, optimizer, state, row)
            print(describe(row, args.epochs), flush=True)

    torch.manual_seed(args.seed)
    nat, pgd20 = evaluate(net, x_test, y_test, eps=args.eps, batch_size=args.batch_size)
    if is_lead():
        print(f"NAT {100 * nat:.2f}  PGD-20 {100 * pgd20:.2f}  (%, last epoch, all {len(x_test)} test images)")
        print(f"Evaluate it: python eval_attacks.py {Path(args.out, 'last.pt')} --data {args.data}")


def bench(args, data, net, fast, model, optimizer):
    """Time `--bench` training steps after the burn-in and print one JSON line; writes nothing."""
    from torch.utils.flop_counter import FlopCounterMode  # 76 MB that nothing else needs

    x_train, y_train, *_ = data
    net.train()
    batches = itertools.chain.from_iterable(mini_batches(x_train, y_train, args.batch_size) for _ in itertools.count())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(to_input(x_train[:2]))
    flop = counter.get_total_flops() / 2 * args.batch_size  # of a forward pass
    loss = METHODS[args.method].loss  # a backward costs as much as a forward for x and as much again for the weights
    forwards = 2 * args.steps + {"at": 3, "trades": 7, "mart": 6}[loss]
    seconds = []
    for _ in range(2 + args.bench):  # two for warm-up and compilation
        begun = time.perf_counter()
        train_step(args, args.burn_in + 1, fast, model, optimizer, *next(batches)).tolist()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    step = statistics.median(seconds[2:])
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if x_train.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(x_train.device) / 2**20
    else:
        import resource  # Unix only

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    figures = {
        **{key: getattr(args, key) for key in ("method", "arch", "batch_size", "amp", "compile")},
        "device": str(x_train.device),
        "processes": processes,
        "ms_per_step": round(1000 * step, 1),
        "images_per_s": round(args.batch_size / step, 1),
        "peak_mem_mb": round(peak),
        "gflop_per_s": round(flop * forwards / step / 1e9, 1),
        "full_run_hours": round(step * math.ceil(len(x_train) / args.batch_size) * args.epochs / 3600, 2),
    }
    if is_lead():
        print(json.dumps(figures))


# ---- Data ----------------------------------------------------------------------------------------------------------


def augment(x):
    """Random crop after 4 pixels of zero padding, then random horizontal flip. (N, C, H, W) -> the same, any dtype."""
    n, _, h, w = x.shape
    top, left = torch.randint(9, (2, n), device=x.device)
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 9, 9, H, W), a view
    x = crops[torch.arange(n, device=x.device), :, top, left]  # (N, C, H, W)
    return torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def to_input(x):
    """uint8 images -> float in [0, 1], channels last, which is the faster layout for convolutions."""
    return x.to(memory_format=torch.channels_last).float() / 255


def toy_data(n_train=2000, n_test=500, size=16):
    """Ten classes of small synthetic images, always the same: noise around a colour, the ten colours close together."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n_train + n_test) % 10)
    angle = np.arange(10) * np.pi * (3 - 5**0.5)  # ten directions spread over a sphere
    z = (np.arange(10) + 0.5) / 5 - 1
    colours = np.stack([np.sqrt(1 - z**2) * np.cos(angle), np.sqrt(1 - z**2) * np.sin(angle), z], 1)  # (10, 3)
    shade = 127.5 + 34 * colours[labels] + rng.normal(0, 8, (len(labels), 3))  # (N, 3)
    images = shade[:, :, None, None] + rng.normal(0, 30, (len(labels), 3, size, size))
    images, labels = torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def load_npz(path):
    names = ["x_train", "y_train", "x_test", "y_test"]
    try:
        with np.load(path, allow_pickle=False) as file:
            x_train, y_train, x_test, y_test = (file[name] for name in names)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: no .npz with the arrays {', '.join(names)} ({error})") from None
    for x, y, part in (x_train, y_train, "train"), (x_test, y_test, "test"):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape:
            raise ValueError(f"{path}: x_{part} must be uint8 (N, H, W, 3), N > 0, not {x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(f"{path}: y_{part} must be {len(x)} integers, not {y.dtype} {y.shape}")
        if y.min() < 0 or y.max() > y_train.max():
            raise ValueError(f"{path}: y_{part} must be in 0..{y_train.max()} as in y_train, not {y.min()}..{y.max()}")
        if not 1 <= y_train.max() < len(y_train):
            raise ValueError(f"{path}: y_train must be classes 0..K-1, K > 1, not up to {y_train.max()}")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"{path}: train and test images differ in size: {x_train.shape[1:]} and {x_test.shape[1:]}")
    return x_train, y_train, x_test, y_test


def load_data(spec):
    """(x_train, y_train, x_test, y_test): uint8 images (N, 3, H, W), int64 labels (N,) in 0..K-1.

    spec: `toy`, an .npz file with arrays of these names (uint8 images (N, H, W, 3), integer labels), or the folder of
    torchvision's CIFAR-10, downloaded on first use. ValueError or OSError, in one line, on anything else.
    """
    if spec == "toy":
        return toy_data()
    if spec.endswith(".npz"):
        arrays = load_npz(spec)
    else:
        try:
            from torchvision.datasets import CIFAR10  # slow to import, and only needed here

            train, test = (CIFAR10(spec, train=part, download=True) for part in (True, False))
        except (ImportError, OSError, RuntimeError) as error:
            raise OSError(f"no CIFAR-10 in {spec!r} and no download ({error}): use --data FILE.npz or toy") from None
        arrays = train.data, np.array(train.targets), test.data, np.array(test.targets)
    x_train, x_test = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in arrays[::2])
    y_train, y_test = (torch.from_numpy(y.astype(np.int64)) for y in arrays[1::2])
    return x_train, y_train, x_test, y_test


# ---- Run folder ----------------------------------------------------------------------------------------------------


def write(path, data):
    """Write bytes under a temporary name, then rename: at any moment the file is whole, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(path, checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer())


LOG = ["epoch", "lr", "loss", "adv_correct", "single_cl", "multi_cl"]
LOG += ["weight_correct", "weight_single_cl", "weight_multi_cl", "ess", "seconds", "images_per_s", "nat", "pgd20"]


def log_row(epoch, lr, sums, seconds):
    """A row of log.csv from the epoch's sums of `train_step`: fractions of the examples, shares of the weights.

    ess is the effective sample size of the weights, (sum w)^2 / sum w^2, over the number of examples.
    """
    loss, counts, weights, squares = sums[0], sums[1:4], sums[4:7], sums[7]
    n, total = sum(counts), sum(weights)
    shares = [w / total for w in weights] if total else [0.0] * 3
    values = [epoch, lr, loss / n, *(c / n for c in counts), *shares, total**2 / (n * squares) if squares else 0.0]
    return dict(zip(LOG, [*values, seconds, n / seconds], strict=False))


def settings(args):
    """What makes a run: all arguments but where and how it is executed. Plain values."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "compile", "bench")}


def describe(row, epochs):
    """A row of log.csv as one line for people."""
    line = "epoch {epoch}/{} lr {lr:g} loss {loss:.3f} correct {adv_correct:.1%} one CL {single_cl:.1%}"
    line += " several {multi_cl:.1%} ess {ess:.2f} {seconds:.1f} s"
    return (line + (" NAT {nat:.1%} PGD-20 {pgd20:.1%}" if "nat" in row else "")).format(epochs, **row)


def save_epoch(args, net, optimizer, state, row):
    """Add an epoch to the run: best.pt or burnin.pt where it is one, last.pt, and log.csv, which last.pt holds too."""
    out, score = Path(args.out), row.get("pgd20", -1.0)
    now = {"epoch": row["epoch"], "best": max(score, state["best"]), "log": [*state["log"], row]}
    checkpoint = now | {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "args": settings(args)}
    if score > state["best"]:
        save_checkpoint(out / "best.pt", checkpoint | {"selected_by": "PGD-20 on test images"})
    if row["epoch"] == args.burn_in:
        save_checkpoint(out / "burnin.pt", checkpoint)
    save_checkpoint(out / "last.pt", checkpoint)
    state.update(now)
    save_log(out / "log.csv", state["log"])


def save_log(path, rows):
    file = io.StringIO()
    table = csv.DictWriter(file, LOG, lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write(path, file.getvalue().encode())


def lock(path):
    """Hold an exclusive lock while the returned file is referenced. ValueError if another process holds it."""
    file = open(path, "w")  # noqa: SIM115 - open as long as the process
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {path.parent}") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def claim(out, wanted, resume):
    """Lock the run folder and check its settings against `wanted`, or write them there. Returns the lock."""
    kept = out / "args.json"
    if resume and not kept.exists():
        raise ValueError(f"{out} holds no run to resume: leave out --resume to start one")
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out / ".lock")
    if not resume:
        if kept.exists() or any(out.glob("*.pt")):
            raise ValueError(f"{out} already holds a run: add --resume to continue it, or choose another --out")
        write(kept, json.dumps(wanted, indent=2).encode() + b"\n")
        return held
    try:
        before = dict(json.loads(kept.read_text()))
    except (TypeError, ValueError):
        raise ValueError(f"{kept} is damaged") from None
    if changed := differences(before, wanted, ["init"] if (out / "last.pt").exists() else []):
        raise ValueError(f"{out} was started with other settings: {changed}")
    return held


def differences(before, now, but):
    """What of two runs' settings differs, other than the names in `but`, as text."""
    return "; ".join(f"{k} was {before.get(k)}, not {v}" for k, v in now.items() if before.get(k) != v and k not in but)


def restore(path, args, net, optimizer):
    """Load a training checkpoint, as `save_epoch` wrote it, into net and optimizer. Returns its other entries.

    FileNotFoundError or ValueError, in one line, if it is none or does not fit.
    """
    checkpoint = models.read(path)
    try:
        arch, method, epoch = checkpoint["args"]["arch"], checkpoint["args"]["method"], checkpoint["epoch"]
        if arch != args.arch:
            raise ValueError(f"{path} holds a {arch}, not a {args.arch}: give the same --arch")
        # FAT differs from the first epoch on
        own = [name if name == "fat" else METHODS[name].loss for name in (method, args.method)]
        if own[0] != own[1]:
            raise ValueError(f"{path} is from {method}, whose burn-in is not that of {args.method}")
        if epoch > args.epochs:
            raise ValueError(f"{path} is from epoch {epoch}, later than --epochs {args.epochs}")
        models.load_weights(net, checkpoint["model"], path)
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["weight_decay"] = args.weight_decay
        return {key: checkpoint[key] for key in ("epoch", "best", "log", "args")}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path} is no training checkpoint of clirat.py: use a run's burnin.pt or last.pt") from None


# ---- Command line --------------------------------------------------------------------------------------------------


def number(kind, low, high=math.inf, above=False):
    """argparse type: a finite number in [low, high], or (low, high] with `above`. Fractions such as 8/255 will do."""

    def parse(text):
        try:
            value = int(text) if kind is int else float(Fraction(text))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite {kind.__name__}") from None
        if not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if above else '['}{low}, {high}]")
        return value

    return parse


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="clirat.py", description="CLIRAT and its companions: instance-reweighted adversarial training."
    )

    def add(flag, text, default=None, **kwargs):
        if default is not None:
            text, kwargs["default"] = f"{text} (default: %(default)s)", default
        parser.add_argument(flag, help=text, **kwargs)

    add("--method", "a name in the README's table of methods", "clirat", choices=METHODS)
    add("--arch", "resnet18 or wrn-D-K, such as wrn-32-10", "resnet18", type=str)
    add("--gamma", "slope of the weights, Eq. 6 (default: the method's)", type=number(float, 0))
    add("--beta", "bias of the weights, Eq. 6 (default: the method's)", type=number(float, -math.inf))
    add("--trade-off", "TRADES' beta in Eq. 3, MART's lambda in Eq. 4 (default: the method's)", type=number(float, 0))
    add("--data", "folder for CIFAR-10, downloaded on first use; or FILE.npz; or toy", "data", type=str)
    add("--train-size", "train on the first N images (default: all)", type=number(int, 1), metavar="N")
    add("--epochs", "length of the run; the schedule scales with it", 120, type=number(int, 1))
    add("--burn-in", "last epoch with all weights 1 (default: epochs * 75/120)", type=number(int, 0), metavar="EPOCH")
    add("--lr-milestones", "last epochs before lr / 10 (default: epochs * 75/120 and 90/120)",
        type=number(int, 0), nargs="*", metavar="EPOCH")  # fmt: skip
    add("--batch-size", "over all processes", 128, type=number(int, 2))
    add("--lr", "learning rate (default: 0.01 for resnet18, 0.1 for wrn)", type=number(float, 0, above=True))
    add("--weight-decay", "(default: 3.5e-3 for resnet18, 7e-4 for wrn)", type=number(float, 0))
    add("--eps", "L-infinity radius", "8/255", type=number(float, 0, 1))
    add("--step-size", "step of the training PGD", "2/255", type=number(float, 0))
    add("--steps", "steps of the training PGD", 10, type=number(int, 1))
    add("--seed", "(default: 1, or that of --init)", type=number(int, 0, 400_000))  # x 10,007 has 32 bits: see train
    add("--out", "run folder (default: runs/<method>-<arch>-s<seed>)", type=str)
    add("--resume", "continue the run in --out", action="store_true")
    add("--init", "start from another run's burnin.pt or last.pt: weights, optimiser, epoch, seed",
        type=str, metavar="CKPT")  # fmt: skip
    add("--exclude", "drop the examples with one or with several confused labels after the burn-in (Fig. 1B)",
        choices=["single", "multi"])  # fmt: skip
    add("--weight-norm", "weights of mean 1, or MAIL's factor 3", "batch", choices=["batch", "mail"])
    add("--amp", "bfloat16 autocast of the forward passes", action="store_true")
    add("--compile", "torch.compile the network", action="store_true")
    add("--device", "such as cpu, cuda or cuda:1", "cuda" if torch.cuda.is_available() else "cpu", type=str)
    add("--eval-every", "NAT and PGD-20 every N epochs; 0: only at the end", 1, type=number(int, 0), metavar="N")
    add("--eval-size", "... on the first N test images", 1000, type=number(int, 1), metavar="N")
    add("--bench", "time N training steps after the burn-in, print one JSON line, write nothing",
        type=number(int, 1), metavar="N")  # fmt: skip
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # one line, without the usage
    args = parser.parse_args(argv)

    burn_in, second = scaled(args.epochs, 75, 90)
    lr, weight_decay = (0.01, 3.5e-3) if args.arch == "resnet18" else (0.1, 7e-4)
    defaults = {"burn_in": burn_in, "lr_milestones": [burn_in, second], "lr": lr, "weight_decay": weight_decay}
    defaults |= {name: getattr(METHODS[args.method], name) for name in ("gamma", "beta", "trade_off")}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif value is None:
            parser.error(f"--{name.replace('_', '-')} does nothing with --method {args.method}")
    return parser, args


def join_processes(device):
    """Join the process group if torchrun started this process. Returns the device to use, one GPU a process.

    ValueError if there are fewer GPUs than processes.
    """
    if "LOCAL_RANK" in os.environ:
        if device.startswith("cuda") and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise ValueError(f"more processes than the {torch.cuda.device_count()} GPUs here")
        patience = datetime.timedelta(days=1)  # a rank can be done with an attack long before another
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience)
        if device.startswith("cuda"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
    return device


def open_device(name):
    """torch.device of a name. ValueError if this machine does not have it."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).partition(chr(10))[0]}") from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def keep_freed_memory():
    """Tell glibc to keep what a pass frees for the next one, which else pays a page fault for every 4 kB of it."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        atexit.register(libc.malloc_trim, 0)  # else the 125 MB of PyTorch's teardown come on top


def load_data_once(spec):
    """`load_data`, on rank 0 first under torchrun, so that one process downloads and the others find the files."""
    if not is_lead():
        exit_if_any(None)  # waits; another process may be here with an error
    try:
        return load_data(spec)
    finally:
        if is_lead():
            exit_if_any(None)


def exit_if_any(error):
    """End all processes with status 2 if one of them comes with an error message, which rank 0 prints."""
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if message := next(filter(None, errors), None):
        if is_lead():
            print(message, file=sys.stderr)
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(2)


def setup(args):
    """Data, network, optimiser, state and lock of the run. ValueError or OSError before anything is overwritten."""
    device = open_device(args.device)
    with torch.device("meta"):
        models.build(args.arch)  # a wrong name is known before the data are loaded
    world = dist.get_world_size() if dist.is_initialized() else 1

    x_train, y_train, x_test, y_test = load_data_once(args.data)
    num_classes = int(y_train.max()) + 1
    if args.train_size and args.train_size > len(x_train):
        raise ValueError(f"--train-size {args.train_size} is more than the {len(x_train)} training images")
    x_train, y_train = x_train[: args.train_size], y_train[: args.train_size]
    if args.batch_size > len(x_train):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(x_train)} training images")
    if args.batch_size % world or args.batch_size < 2 * world:
        raise ValueError(f"--batch-size {args.batch_size} is not two or more images for each of {world} processes")
    data = [t.to(device) for t in (x_train, y_train, x_test, y_test)]

    torch.manual_seed(1 if args.seed is None else args.seed)
    net = models.build(args.arch, num_classes).to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    state = {"epoch": 0, "best": -1.0, "log": [], "args": {"seed": 1}}
    last = Path(args.out or "", "last.pt")
    if args.resume and args.out and last.exists():
        state = restore(last, args, net, optimizer)  # knows its seed; with --out it no longer needs --init
    elif args.init:
        state = restore(args.init, args, net, optimizer) | {"best": -1.0}
        if state["epoch"] == args.epochs:
            raise ValueError(f"{args.init} is from epoch {args.epochs}, the last: nothing is left to train")
        own = ["method", "gamma", "beta", "exclude", "weight_norm", "seed", "init", "eval_every", "eval_size"]
        if (changed := differences(state["args"], settings(args), own)) and is_lead():
            print(f"note: {args.init} was trained with other settings: {changed}", file=sys.stderr)
    args.seed = state["args"]["seed"] if args.seed is None else args.seed
    args.out = args.out or f"runs/{args.method}-{args.arch}-s{args.seed}"
    lock = None if args.bench or not is_lead() else claim(Path(args.out), settings(args), args.resume)
    if args.resume and Path(args.out, "last.pt").exists():
        state = restore(Path(args.out, "last.pt"), args, net, optimizer)
    return data, net, optimizer, state, lock


def main(argv=None):
    parser, args = parse_args(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, where convolutions have it by default
    torch.backends.cudnn.benchmark = True
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    error = None

    def stop(status, message):  # one process says why
        parser.exit(status, message if is_lead() else None)

    try:
        args.device = join_processes(args.device)
        data, net, optimizer, state, _lock = setup(args)
    except (OSError, ValueError) as bad_input:
        error = f"{parser.prog}: error: {bad_input}"
    except KeyboardInterrupt:
        stop(130, "stopped before training\n")
    exit_if_any(error)

    if args.amp and args.device == "cpu" and is_lead() and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        print("note: this CPU has no fast bfloat16, --amp will be very slow on it", file=sys.stderr)
    fast = torch.compile(net) if args.compile else net  # the same parameters and mode
    model = DistributedDataParallel(fast, broadcast_buffers=False) if dist.is_initialized() else fast
    try:
        if args.bench:
            bench(args, data, net, fast, model, optimizer)
        else:
            train(args, data, net, fast, model, optimizer, state)
    except KeyboardInterrupt:
        stop(130, f"\nstopped: the same command with --resume goes on after epoch {state['epoch']}\n")
    except FloatingPointError as error:
        stop(1, f"{parser.prog}: stopped at {error}; last.pt is from epoch {state['epoch']}\n")
    except OSError as error:
        stop(1, f"{parser.prog}: cannot write to {args.out} ({error}); what is there is whole\n")
    if dist.is_initialized():
        del model  # first: it holds the group, whose threads would abort the process
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
