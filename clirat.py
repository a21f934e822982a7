"""CLIRAT: Confused-Label Instance-Reweighted Adversarial Training in one file.

    python clirat.py --arch resnet18 --gamma 10 --beta -0.5

Equations and Algorithm 1 are those of "Instance Reweighting Adversarial Training Based on Confused
Label" (Qiu et al. 2023, doi:10.32604/iasc.2023.038241); where the paper is silent, the README's
table says what is done here and why. Throughout: N images in a batch, K classes, images
(N, C, H, W) in [0, 1], logits and probabilities (N, K), labels (N,).
To the end of Algorithm 1: the paper. Below: evaluation, processes, data, run folder, command line.
"""

import argparse
import contextlib
import datetime
import gc
import hashlib
import io
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import models
from models import Folded  # an ImportError, with its path, if another module named models is first


# ---- Margins, weights, losses: tensors in, tensors out -------------------------------------------
def pm(probs, labels):
    """Probability margin (Eq. 5): p_y minus the largest other probability.

    probs: (N, K) rows of probabilities, K >= 2, any float dtype. labels: (N,) integers in 0..K-1.
    Returns (N,) in [-1, 1], negative where misclassified. ValueError on a wrong shape.
    """
    if labels.ndim != 1 or labels.shape != probs.shape[:-1] or probs.shape[-1] < 2:
        raise ValueError(f"want probs (N, K >= 2), labels (N,), not {probs.shape}, {labels.shape}")
    y = labels[:, None].long()  # (N, 1)
    p_y = probs.gather(1, y).squeeze(1)  # (N,)
    return p_y - probs.scatter(1, y, -torch.inf).amax(1)


def cl_pm(probs, labels):
    """Confused-label probability margin, CL-PM (Eq. 7).

    A confused label (CL) is a class j with p_j > p_y. CL-PM is PM (Eq. 5) for an example without
    CLs, otherwise the sum of p_y - p_j over its CLs.
    probs: (N, K) rows of probabilities, K >= 2, any float dtype. labels: (N,) integers in 0..K-1.
    Returns (N,) in [-1, 1] up to rounding: PM with at most one CL, less than PM with several,
    0 on a tie. ValueError on a wrong shape.
    """
    if labels.ndim != 1 or labels.shape != probs.shape[:-1] or probs.shape[-1] < 2:
        raise ValueError(f"want probs (N, K >= 2), labels (N,), not {probs.shape}, {labels.shape}")
    y = labels[:, None].long()  # (N, 1)
    gaps = probs.gather(1, y) - probs  # (N, K): p_y - p_j, negative at the CLs and 0 at j = y
    margin = gaps.scatter(1, y, torch.inf).amin(1)  # (N,): Eq. 5
    return torch.where(margin < 0, gaps.clamp(max=0).sum(1), margin)


def instance_weights(margins, gamma, beta, norm="batch"):
    """Weights of a batch from its margins (Eq. 6; Algorithm 1 l.9, l.14); they carry no gradient.

    margins: (N,) of `pm`, `cl_pm` or another measure that falls with vulnerability. gamma >= 0:
    slope. beta: bias. norm: "batch" scales the weights to mean 1 (l.14 prints M, the number of
    batches, but needs the batch size); "mail" multiplies them by 3 instead, as MAIL's code does.
    Returns (N,), non-negative, finite where gamma (beta - margin) is finite in the margins' dtype.
    ValueError on another shape or norm, a negative gamma, gamma or beta that is not finite.
    """
    finite = 0 <= gamma < torch.inf and abs(beta) < torch.inf
    if margins.ndim != 1 or not finite or norm not in ("batch", "mail"):
        found = f"{tuple(margins.shape)}, {gamma}, {beta}, {norm!r}"
        raise ValueError(f"want margins (N,), gamma >= 0, beta, norm batch or mail, not {found}")
    scores = (gamma * (beta - margins)).detach()  # (N,)
    if norm == "mail":
        return 3 * scores.sigmoid()
    # N w / sum(w) in log space: no 0 / 0 where every w underflows
    return len(margins) * F.logsigmoid(scores).softmax(0)


def weighted_mean(losses, weights):
    """Algorithm 1 l.15 as a mean over the batch. losses, weights: (N,); weights None: all 1."""
    if weights is not None and weights.shape != losses.shape:
        raise ValueError(f"want weights {tuple(losses.shape)}, got {tuple(weights.shape)}")
    return (losses if weights is None else weights * losses).mean()


def at_loss(logits_adv, labels, weights=None):
    """Adversarial training: mean of w CE(f(x_adv), y). logits (N, K), labels and weights (N,).

    Returns a scalar. ValueError on a wrong shape; a label outside 0..K-1 is PyTorch's own error.
    """
    if labels.shape != logits_adv.shape[:1] or labels.is_floating_point():
        raise ValueError(f"want {len(logits_adv)} integer labels: {labels.dtype} {labels.shape}")
    # gather, since F.cross_entropy would ignore the label -100
    log_p_y = logits_adv.log_softmax(1).gather(1, labels[:, None].long()).squeeze(1)  # (N,)
    return weighted_mean(-log_p_y, weights)


def kl(logits_nat, logits_adv):
    """KL(p(x) || p(x_adv)), (N,), in log space: no NaN gradient where softmax underflows."""
    if logits_nat.shape != logits_adv.shape:
        raise ValueError(f"want logits of one shape, not {logits_nat.shape}, {logits_adv.shape}")
    log_p, log_q = logits_nat.log_softmax(1), logits_adv.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def trades_loss(logits_nat, logits_adv, labels, trade_off, weights=None):
    """TRADES (Eq. 3): mean CE(f(x), y) + trade_off * mean w KL(p(x) || p(x_adv)), a scalar.

    Its robust term alone is weighted. trade_off: Eq. 3's beta, which is not the beta of Eq. 6.
    """
    robust = weighted_mean(kl(logits_nat, logits_adv), weights)
    return at_loss(logits_nat, labels) + trade_off * robust


def mart_loss(logits_nat, logits_adv, labels, trade_off, weights=None):
    """MART (Eq. 4): mean w BCE(p(x_adv), y) + trade_off * mean KL(p(x) || p(x_adv)) (1 - p_y(x)).

    BCE = -log p_y - log(1.0001 - max_{k != y} p_k), 1.0001 the stabiliser of MART's published code.
    """
    cross_entropy = at_loss(logits_adv, labels, weights)
    y = labels[:, None].long()  # (N, 1)
    runner_up = logits_adv.softmax(1).scatter(1, y, 0).amax(1)  # (N,)
    bce = cross_entropy + weighted_mean(-torch.log(1.0001 - runner_up), weights)
    divergence = kl(logits_nat, logits_adv)  # (N,)
    p_y = logits_nat.softmax(1).gather(1, y).squeeze(1)
    return bce + trade_off * (divergence * (1 - p_y)).mean()


# of logits (N, K) at x and at x_adv, labels (N,), the trade-off and weights (N,)
LOSSES = {"at": lambda _, z, y, __, w: at_loss(z, y, w), "trades": trades_loss, "mart": mart_loss}
MARGINS = {"pm": pm, "cl-pm": cl_pm}  # of probabilities (N, K) at x_adv and labels (N,)
# margin: one of these, lps (least PGD steps: kappa / steps, GAIRAT) or None: all weights 1
Method = namedtuple("Method", "loss margin gamma beta trade_off", defaults=[None] * 4)
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
    # its (1 + tanh(-1 + 5 (1 - 2 kappa / steps))) / 2 is Eq. 6 on kappa / steps with these two:
    "gairat": Method("at", "lps", 20.0, 0.4),
    "fat": Method("at"),
}


# ---- PGD -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def eval_mode(model):
    """Hold a model in eval mode, then restore the modes found. Other callables are left alone."""
    modes = {m: m.training for m in model.modules()} if isinstance(model, torch.nn.Module) else {}
    if modes:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_attack(x, y, eps):
    """ValueError on images, labels or eps that no attack can take, and in inference mode."""
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks take gradients: call them outside torch.inference_mode()")
    images = x.ndim == 4 and len(x) and x.dtype in (torch.float32, torch.float64)
    if not images or y.shape != x.shape[:1] or y.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}, {y.dtype} {tuple(y.shape)}"
        raise ValueError(f"want float32/64 images (N > 0, C, H, W), integer labels (N,): {found}")
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # no value can be looked at; the warm-up before did
    low, high = (value.item() for value in x.aminmax())
    if not (0 <= low <= high <= 1 and eps >= 0 and y.min() >= 0):
        found = f"{low:.3g} to {high:.3g}, {eps} and {y.min()}: divide images by 255, or normalise"
        wanted = "want images in [0, 1], eps >= 0 and labels in 0..K-1"
        raise ValueError(f"{wanted}, not {found} in the model's first layer")


def pgd_start(x, init, eps):
    """Where PGD starts (l.5): "normal" x + 0.001 N(0, I), "uniform" in the ball, "none" at x."""
    # not randn_like nor empty_like: noise would be in the order of the memory, channels last or not
    if init == "normal":  # as the base codes: at x itself TRADES' KL has no gradient
        return x + 0.001 * torch.randn(x.shape, device=x.device, dtype=x.dtype)
    if init == "uniform":
        return x + torch.empty(x.shape, device=x.device, dtype=x.dtype).uniform_(-eps, eps)
    if init == "none":
        return x
    found = getattr(init, "shape", repr(init))
    raise ValueError(f"want init normal, uniform, none or a tensor like x, not {found}")


def pgd(model, x, y, *, eps, step_size, steps, loss="ce", init="normal", tau=None,
        return_kappa=False):  # fmt: skip
    """Projected gradient ascent in the L-infinity ball (Eq. 2; Algorithm 1 l.5-8).

    model: maps images to logits. x: (N, C, H, W) in [0, 1]. y: (N,) integers. eps, step_size: in
    units of x. steps >= 0. loss: "ce" cross-entropy, "kl" KL(p(x) || p(x_adv)), "cw"
    max_{k != y} z_k - z_y. init: see `pgd_start`, or a tensor like x. tau: an example stops once
    more than tau of its iterates, the start included, were misclassified (FAT); None: never.
    Returns x_adv like x, inside the ball and [0, 1]; with return_kappa also kappa (N,), at how many
    of the iterates 0..steps-1 (0: the start) the example was classified correctly (GAIRAT). Runs in
    eval mode; modes, gradients and BatchNorm statistics stay as found. ValueError on another loss
    or init, and on what `check_attack` names.
    """
    check_attack(x, y, eps)
    if steps < 0 or loss not in ("ce", "kl", "cw"):
        raise ValueError(f"want steps >= 0 and loss ce, kl or cw, not {steps} and {loss!r}")
    x, y, kappa = x.detach(), y.long(), torch.zeros_like(y, dtype=torch.int64)
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    given = isinstance(init, torch.Tensor) and init.shape == x.shape
    x_adv = (init.detach() if given else pgd_start(x, init, eps)).clamp(lower, upper)
    with eval_mode(model), torch.enable_grad():
        if loss == "kl":  # the natural branch is constant: one forward, not one a step
            with torch.no_grad():
                logits_nat = model(x)
        for t in range(steps):
            x_adv.requires_grad_()
            logits = model(x_adv)
            if loss == "ce":
                objective = F.cross_entropy(logits, y, reduction="sum")
            elif loss == "kl":
                objective = kl(logits_nat, logits).sum()
            else:
                objective = -pm(logits, y).sum()  # Eq. 5 on logits
            (grad,) = torch.autograd.grad(objective, x_adv)  # l.7 prints theta for x
            kappa += logits.argmax(1) == y
            direction = grad.sign()
            if tau is not None:
                wrong = t + 1 - kappa  # (N,): of the iterates so far
                direction = direction * (wrong <= tau)[:, None, None, None]
            x_adv = x_adv.detach().add(direction, alpha=step_size).clamp_(lower, upper)
    return (x_adv, kappa) if return_kappa else x_adv


def fast_pgd(net, dtype=None, compiled=False, **options):
    """`pgd` on a faster copy of net that follows it: a function of x, y, start and tau."""
    copy = Folded(net, dtype)
    model = torch.compile(copy, dynamic=False) if compiled else copy

    def attack(x, y, start, tau=None):
        copy.refresh(net)
        return pgd(model, x, y, init=start, tau=tau, return_kappa=True, **options)

    return models.graphed(attack, next(net.parameters()).device)


# ---- Algorithm 1 ---------------------------------------------------------------------------------
def augment(x):
    """Random crop after 4 pixels of zero padding, random flip: uint8 (N, C, H, W) -> [0, 1]."""
    n, _, h, w = x.shape
    top, left = torch.randint(9, (2, n), device=x.device)
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 9, 9, H, W), a view
    x = crops[torch.arange(n, device=x.device), :, top, left]  # (N, C, H, W)
    x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return x.to(memory_format=torch.channels_last) / 255  # the faster layout for convolutions


def shuffled(n, batch_size, device):
    """Indices into n images, batch by batch; under torchrun this process's share of each batch."""
    rank, world = rank_and_world()
    order = torch.randperm(n, device=device)  # the same in all processes, which were seeded alike
    if rank:  # but crops, flips and PGD's start are each one's own
        torch.manual_seed(torch.randint(2**31, (rank,), device="cpu")[-1])
    batches = order[: n // world * world].split(batch_size)
    # a lone image is left out: BatchNorm cannot train on its feature maps where they are 1 x 1
    return [batch[rank::world] for batch in batches if len(batch) > world]


def inner_attack(args, net):
    """Algorithm 1 l.5-8, a function of x, y and epoch: (x_adv, kappa) of `pgd` on net's copy."""
    options = {"eps": args.eps, "step_size": args.step_size, "steps": args.steps}
    options["loss"] = "kl" if METHODS[args.method].loss == "trades" else "ce"
    run = fast_pgd(net, torch.bfloat16 if args.amp else None, args.compile, **options)

    def attack(x, y, epoch):
        tau = args.steps  # no example stops early
        if args.method == "fat":  # tau 0, after epoch 50 (of 120) 1, after epoch 90 2
            tau = sum(epoch > round(args.epochs * e / 120) for e in (50, 90))
        # start and tau are inputs: a CUDA graph would repeat those that it was recorded with
        return run(x, y, pgd_start(x, "normal", args.eps), torch.full((), tau, device=x.device))

    return attack


def train_step(args, epoch, model, attack, optimizer, x, y):
    """Algorithm 1 l.5-15 on a batch: images x (n, C, H, W) in [0, 1], labels y (n,).

    model: the network in train mode. attack: an `inner_attack`. Returns the loss () and, (n,) each,
    the weights and the numbers of confused labels.
    """
    method, reweighted = METHODS[args.method], epoch > args.burn_in
    x_adv, kappa = attack(x, y, epoch)  # l.5-8
    with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
        logits_nat = None if method.loss == "at" else model(x).to(x.dtype)  # (n, K)
        logits_adv = model(x_adv).to(x.dtype)  # (n, K)
    probs = logits_adv.detach().softmax(1)  # (n, K)
    num_cl = (probs > probs.gather(1, y[:, None])).sum(1)  # (n,)
    weights = torch.ones_like(probs[:, 0])  # (n,) l.12
    if reweighted and method.margin:  # l.11, then l.9 and l.14
        lps = method.margin == "lps"
        margins = kappa / args.steps if lps else MARGINS[method.margin](probs, y)  # (n,)
        weights = over_batch(instance_weights, margins, args.gamma, args.beta, args.weight_norm)
    if reweighted and args.exclude:  # Fig. 1B
        weights = weights * (num_cl != 1 if args.exclude == "single" else num_cl <= 1)
        if args.weight_norm == "batch":  # mean 1 again; all stay 0 if none is left
            weights = over_batch(lambda w: w / w.mean().clamp(min=1e-30), weights)

    loss = LOSSES[method.loss](logits_nat, logits_adv, y, args.trade_off, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # l.15
    return loss.detach(), weights, num_cl


def train_epoch(args, epoch, model, attack, optimizer, x_train, y_train):
    """Algorithm 1 l.2-15: an epoch over uint8 images (N, C, H, W), labels (N,); a row of log.csv.

    model: the network, under torchrun in DistributedDataParallel. attack: an `inner_attack`.
    FloatingPointError if the loss or the network is not finite.
    """
    batches, examples = shuffled(len(x_train), args.batch_size, x_train.device), []
    model.train()
    for batch in progress(batches, f"epoch {epoch}/{args.epochs}", args.epochs - epoch + 1):  # l.2
        x, y = augment(x_train[batch]), y_train[batch]  # l.3
        loss, weights, num_cl = train_step(args, epoch, model, attack, optimizer, x, y)  # l.5-15
        examples.append(torch.stack([loss.expand(len(y)), weights, num_cl.to(weights)], 1))
    row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
    row |= statistics(*gather(torch.cat(examples)).double().cpu().T)
    finite = all(t.isfinite().all() for t in model.state_dict().values())
    if not (finite and math.isfinite(row["loss"])):
        raise FloatingPointError(f"epoch {epoch}: the loss or the network is not finite")
    return row


def statistics(losses, weights, num_cl):
    """What log.csv says of an epoch's examples (see the README). (N,) each."""
    groups = {"adv_correct": num_cl == 0, "single_cl": num_cl == 1, "multi_cl": num_cl > 1}
    total = weights.sum().clamp(min=1e-30)
    row = {"loss": losses.mean()} | {name: g.double().mean() for name, g in groups.items()}
    row |= {f"weight_{name}": weights[group].sum() / total for name, group in groups.items()}
    row["ess"] = total**2 / weights.square().sum().clamp(min=1e-30) / len(weights)
    return {name: value.item() for name, value in row.items()}


def train(args, data, net, optimizer, state):
    """Algorithm 1 from the epoch after state["epoch"] on. data: of `load_data`, on the device."""
    x_train, y_train, x_test, y_test = data
    model = net
    if dist.is_initialized():
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)  # since torch 2.13
        model = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    attack = inner_attack(args, net)
    attack_20 = fast_pgd(net, steps=20, step_size=0.003, eps=args.eps)
    for epoch in range(state["epoch"] + 1, args.epochs + 1):  # l.1
        begun = time.perf_counter()
        torch.manual_seed(args.seed * 10_007 + epoch)  # of these alone: resuming needs no state
        drops = sum(epoch > milestone for milestone in args.lr_milestones)
        optimizer.param_groups[0]["lr"] = args.lr / 10**drops
        row = train_epoch(args, epoch, model, attack, optimizer, x_train, y_train)  # l.2-15
        row["seconds"] = time.perf_counter() - begun
        row |= {"images_per_s": len(x_train) / row["seconds"], "nat": None, "pgd20": None}
        for buffer in net.buffers() if dist.is_initialized() else []:  # BatchNorm's differ
            dist.broadcast(buffer, 0)
        if args.eval_every and epoch % args.eval_every == 0:
            images, labels = x_test[: args.eval_size], y_test[: args.eval_size]
            row["nat"], row["pgd20"] = nat_and_pgd20(args, net, attack_20, images, labels)
        if is_lead():
            save_epoch(args, net, optimizer, state, row)
        left = round((time.perf_counter() - begun) * (args.epochs - epoch))
        shown = {k: v for k, v in row.items() if not k.startswith(("lr", "weight", "images"))}
        figures = [f"{name} {value:.4g}" for name, value in shown.items() if value is not None]
        print(*figures, f"{datetime.timedelta(seconds=left)} left", sep=", ", flush=True)
    if args.eval_every:
        torch.manual_seed(args.seed)
        nat, pgd20 = nat_and_pgd20(args, net, attack_20, x_test, y_test)
        where = f"(%, last epoch, all {len(x_test)} test images)"
        print(f"NAT {100 * nat:.2f}  PGD-20 {100 * pgd20:.2f}  {where}", flush=True)


# ---- Evaluation, several processes (torchrun) ----------------------------------------------------
def is_wrong(logits, y):
    """(N,) bool: misclassified, or not a number. logits (N, K), y (N,)."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def nat_and_pgd20(args, net, attack, x, y):
    """NAT and PGD-20 accuracy in [0, 1] on uint8 images x (N, C, H, W); attack: a `fast_pgd`."""
    rank, world = rank_and_world()
    places = torch.arange(len(x), device=x.device)[rank::world]
    correct = torch.zeros(2, device=x.device)
    for batch in progress(places.split(args.batch_size), "evaluation"):
        images, labels = x[batch].to(memory_format=torch.channels_last) / 255, y[batch]
        x_adv, _ = attack(images, labels, pgd_start(images, "uniform", args.eps))  # as MAIL's code
        with eval_mode(net), torch.no_grad():
            wrong = torch.stack([is_wrong(net(inputs), labels) for inputs in (images, x_adv)])
        correct += (~wrong).sum(1)
    if world > 1:
        dist.all_reduce(correct)
    return (correct / len(x)).tolist()


def progress(batches, label, passes=1):
    """Yield the batches; on a terminal, say where it is, and when `passes` such passes will end."""
    show = is_lead() and hasattr(sys.stderr, "isatty") and sys.stderr.isatty()  # None if closed
    begun = time.perf_counter()
    for done, batch in enumerate(batches):
        if show:
            rate = (time.perf_counter() - begun) / max(done, 1)
            left = datetime.timedelta(seconds=round(rate * (len(batches) * passes - done)))
            left = f"{left} left" if done else "estimating"
            line = f"\r{label}, batch {done + 1}/{len(batches)}, {left}\033[K"
            print(line, end="", file=sys.stderr, flush=True)
        yield batch
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def rank_and_world():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_lead():
    return rank_and_world()[0] == 0  # the process that writes and prints


def over_batch(function, t, *options):
    """function(t, *options) of the batch of all processes; this one's share of the result, (n,)."""
    rank, world = rank_and_world()
    return function(gather(t), *options).view(world, -1)[rank]


def gather(t):
    """t (n, ...) of each process, one after another: (processes * n, ...)."""
    if not dist.is_initialized():
        return t
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def join_processes(name, amp):
    """The torch.device of a name, ValueError if there is none; under torchrun, join the others."""
    launched = "LOCAL_RANK" in os.environ and not dist.is_initialized()
    if launched and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launched:
        patience = datetime.timedelta(days=1)  # one can be done with an attack long before another
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        if not is_lead():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one of them says it
    if amp and device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        print("note: this CPU has no fast bfloat16: leave out --amp", file=sys.stderr)
    return device


# ---- Data ----------------------------------------------------------------------------------------
def toy_data(n_train=2000, n_test=500, size=16):
    """Ten classes of small synthetic images, always the same: noise around ten close colours."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n_train + n_test) % 10)
    angle = np.arange(10) * np.pi * (3 - 5**0.5)  # ten directions spread over a sphere
    z = (np.arange(10) + 0.5) / 5 - 1
    r = np.sqrt(1 - z**2)
    colours = np.stack([r * np.cos(angle), r * np.sin(angle), z], 1)  # (10, 3)
    shade = 127.5 + 34 * colours[labels] + rng.normal(0, 8, (len(labels), 3))  # (N, 3)
    images = shade[:, :, None, None] + rng.normal(0, 30, (len(labels), 3, size, size))
    images = images.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)  # as in a file
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def load_cifar10(folder, parts):
    folder = folder.parent if folder.name == "cifar-10-batches-py" else folder
    held = {path.name for path in folder.glob("[!.]*")}
    known = folder.is_dir() or folder == Path("data")  # a mistyped name is no place to download to
    if not known or (held and not held & {"cifar-10-batches-py", "cifar-10-python.tar.gz"}):
        raise ValueError(f"{folder} holds no CIFAR-10: name its folder, an empty one, .npz or toy")
    try:
        from torchvision.datasets import CIFAR10  # slow to import, and only needed here

        sets = [CIFAR10(folder, train=part == "train", download=True) for part in parts]
    except Exception as error:  # no network, a full disk, a damaged archive
        raise OSError(f"no CIFAR-10 in {folder} ({error}): use --data FILE.npz or toy") from None
    return [array for part in sets for array in (part.data, np.array(part.targets))]


def load_data(spec, parts=("train", "test")):
    """(x_train, y_train, x_test, y_test): uint8 images (N, 3, H, W), int64 labels (N,) in 0..K-1.

    spec: `toy`, an .npz file with arrays of these names (uint8 images (N, H, W, 3), integer
    labels), or the folder of torchvision's CIFAR-10, downloaded on first use. parts: ("test",)
    for (x_test, y_test) alone. ValueError or OSError on anything else.
    """
    names = [f"{kind}_{part}" for part in parts for kind in "xy"]
    if not is_lead():
        dist.barrier()  # the lead goes first: it may download
    if spec == "toy":
        arrays = toy_data()[-len(names) :]
    elif spec.endswith(".npz"):
        try:
            with np.load(spec, allow_pickle=False) as file:
                arrays = [file[name] for name in names]
        except Exception as error:  # a damaged file can raise nearly anything
            raise ValueError(f"{spec} is no .npz with {', '.join(names)}: {error}") from None
    else:
        arrays = load_cifar10(Path(spec), parts)
    if is_lead() and dist.is_initialized():
        dist.barrier()
    tensors = []
    for x, y in zip(arrays[::2], arrays[1::2], strict=True):
        good = x.dtype == np.uint8 and x.shape[1:] == (*arrays[0].shape[1:3], 3) and x.size
        if not good or y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0:
            found = f"{x.dtype} {x.shape} and {y.dtype} {y.shape} from {min(y.flat, default=0)}"
            wanted = "uint8 images (N, H, W, 3) and N integers from 0 as labels"
            raise ValueError(f"{spec}: want {wanted}, not {found}")
        images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.from_numpy(y.astype(np.int64))]
    known, last = np.unique(arrays[1]), max(1, *(int(y.max()) for y in arrays[1::2]))
    if "train" in parts and len(known) <= last:
        raise ValueError(f"{spec}: want all classes 0..{last} in y_train, it has {known}")
    return tuple(tensors)


def digest(*tensors):
    """A short name for the values of tensors."""
    return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()[:16]


# ---- Run folder ----------------------------------------------------------------------------------
def write(path, data):
    """Write bytes under a temporary name, then rename: at any moment the file is whole."""
    temporary = path.with_name(f"{os.getpid()}.{path.name}.tmp")  # another process has its own
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path, wait=True):
    """Hold a file's lock, which a dying process gives back; if not wait, BlockingIOError at once.

    Where there are no locks (Windows, some file systems), nothing is held.
    """
    with open(path, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (ImportError, OSError) as error:
            if isinstance(error, BlockingIOError):
                raise BlockingIOError(f"{path} is held: another process is at work there") from None
        yield


def save_checkpoint(path, checkpoint):
    buffer = io.BytesIO()  # a full disk is then an OSError
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer())


def save_log(path, rows):
    lines = [",".join("" if v is None else f"{v:.6g}" for v in row.values()) for row in rows]
    write(path, "\n".join([",".join(rows[0]), *lines, ""]).encode())


def save_epoch(args, net, optimizer, state, row):
    """Add an epoch to the run: best.pt or burnin.pt where it is one, last.pt, then log.csv."""
    out, score = Path(args.out), -1.0 if row["pgd20"] is None else row["pgd20"]
    now = {"epoch": row["epoch"], "best": max(score, state["best"]), "log": [*state["log"], row]}
    checkpoint = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint |= now | {"args": settings(args)}
    if score > state["best"]:
        save_checkpoint(out / "best.pt", checkpoint | {"selected_by": "PGD-20 on test images"})
    if row["epoch"] == args.burn_in:
        save_checkpoint(out / "burnin.pt", checkpoint)
    save_checkpoint(out / "last.pt", checkpoint)
    state.update(now)
    save_log(out / "log.csv", state["log"])


def settings(args):
    """What makes a run: all arguments but where and how it is executed. Plain values."""
    return {k: v for k, v in vars(args).items() if k not in ("out", "resume", "device", "compile")}


def open_run(args):
    """The checkpoint to start from, last.pt or that of --init, or None. ValueError if unfit."""
    last = Path(args.out, "last.pt")
    if not args.resume and any(last.parent.glob("*.pt")):
        raise ValueError(f"{args.out} already holds a run: choose another --out, or --resume it")
    if last.exists():
        checkpoint, now = models.read(last), settings(args) | {"data": None}
        before = checkpoint.get("args")
        if not isinstance(before, dict) or before | {"data": None} != now:
            raise ValueError(f"{last} is not of the run whose settings args.json has")
        return checkpoint
    if not args.init:
        return None

    def origin(run):  # FAT differs from the first epoch on
        loss = "fat" if run["method"] == "fat" else METHODS[run["method"]].loss
        return f"{loss}, {run['arch']}, seed {run['seed']}"

    checkpoint, ours = models.read(args.init), origin(vars(args))
    try:
        before, epoch = checkpoint["args"], checkpoint["epoch"]
        theirs, latest = origin(before), min(before["burn_in"], args.burn_in, args.epochs - 1)
        # a KeyError if one is missing
        _ = checkpoint["model"], checkpoint["log"], checkpoint["optimizer"]["param_groups"]
    except (KeyError, TypeError):
        raise ValueError(f"{args.init} is no training checkpoint: use a run's burnin.pt") from None
    if theirs != ours or epoch > latest:
        wanted = f"want {ours}, and no epoch after {latest}: use such a run's burnin.pt"
        raise ValueError(f"{args.init} is epoch {epoch} of {theirs}; {wanted}")
    return checkpoint | {"best": -1.0}


# ---- Command line --------------------------------------------------------------------------------
def number(kind, low, high=math.inf):
    """argparse type: a finite number in [low, high]. Fractions such as 8/255 will do."""

    def parse(text):
        with contextlib.suppress(ArithmeticError):  # 8/0, 1e999
            value = int(text) if kind is int else float(Fraction(text))
            if low <= value <= high:
                return value
        raise ValueError

    parse.__name__ = f"finite {kind.__name__} in [{low}, {high}]"  # for argparse's message
    return parse


def parse_args(argv=None):
    """The arguments, defaults filled in; with --resume, `settings` not given are the run's."""
    parser = argparse.ArgumentParser("clirat.py", "%(prog)s [options]", "CLIRAT and its baselines.")
    natural, positive, real = number(int, 0), number(int, 1), number(float, 0)

    def add(name, text, default=None, **kwargs):
        text += " (default: %(default)s)" if default is not None else ""
        parser.add_argument(name, help=text, default=default, **kwargs)

    add("--method", "a row of the README's table of methods", "clirat", choices=METHODS)
    add("--arch", "resnet18 or wrn-D-K, such as wrn-32-10", "resnet18")
    add("--gamma", "slope in Eq. 6 (default: the method's)", type=number(float, 0, 1e6))
    add("--beta", "bias in Eq. 6 (default: the method's)", type=number(float, -1e6, 1e6))
    add("--trade-off", "TRADES' beta, MART's lambda (default: the method's)", type=real)
    add("--data", "folder of CIFAR-10, FILE.npz or toy", "data")
    add("--train-size", "train on the first N images (default: all)", type=positive, metavar="N")
    add("--epochs", "length of the run; the schedule scales with it", 120, type=positive)
    add("--burn-in", "last epoch with all weights 1 (default: epochs * 75/120)", type=natural)
    add("--lr-milestones", "lr / 10 after E (75, 90 of 120)", nargs="*", type=natural, metavar="E")
    add("--batch-size", "of all processes together", 128, type=number(int, 2))
    add("--lr", "learning rate (default: 0.01 for resnet18, 0.1 for wrn)", type=real)
    add("--weight-decay", "of SGD (default: 3.5e-3 for resnet18, 7e-4 for wrn)", type=real)
    add("--eps", "L-infinity radius", "8/255", type=number(float, 0, 1))
    add("--step-size", "step of the training PGD", "2/255", type=real)
    add("--steps", "steps of the training PGD", 10, type=positive)
    add("--seed", "of the weights and the data's order", 1, type=number(int, 0, 400_000))
    add("--out", "run folder (default: runs/<method>-<arch>-s<seed>)")
    add("--resume", "continue the run in --out", False, action="store_true")
    add("--init", "start from another run's burnin.pt: weights, optimiser, epoch", metavar="CKPT")
    add("--exclude", "drop those with one or several CLs (Fig. 1B)", choices=["single", "multi"])
    add("--weight-norm", "weights of mean 1, or MAIL's times 3", "batch", choices=["batch", "mail"])
    add("--amp", "bfloat16 forward passes", False, action="store_true")
    add("--compile", "torch.compile the network under attack", False, action="store_true")
    add("--device", "such as cpu, cuda, cuda:1", "cuda" if torch.cuda.is_available() else "cpu")
    add("--eval-every", "NAT and PGD-20 every N epochs, 0: never", 1, type=natural, metavar="N")
    add("--eval-size", "... on the first N test images", 1000, type=positive, metavar="N")
    args = parser.parse_args(argv)
    method, resnet = METHODS[args.method], args.arch == "resnet18"
    burn_in = round(args.epochs * 75 / 120)
    defaults = {"gamma": method.gamma, "beta": method.beta, "trade_off": method.trade_off}
    defaults |= {"burn_in": burn_in, "lr_milestones": [burn_in, round(args.epochs * 90 / 120)]}
    defaults |= {"lr": 0.01 if resnet else 0.1, "weight_decay": 3.5e-3 if resnet else 7e-4}
    defaults["out"] = f"runs/{args.method}-{args.arch}-s{args.seed}"
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif value is None and not args.resume:  # the run's method is not read yet
            parser.error(f"--{name.replace('_', '-')} does nothing with --method {args.method}")
    return resumed(parser, args.out, argv) if args.resume else args


def resumed(parser, out, argv):
    """The arguments with --resume: those of the run in out; a flag that differs is an error."""
    try:
        before = json.loads(Path(out, "args.json").read_text())
        parser.set_defaults(**before | {"out": out})
        args = parser.parse_args(argv)  # what is not given is now the run's
        changed = [name for name, value in settings(args).items() if value != before[name]]
    except (OSError, LookupError, TypeError, ValueError) as error:
        parser.error(f"{out} holds no run to resume: {error}")
    for name in changed:
        if name != "data" or "digest" not in before:  # by which the data is known, not by its place
            parser.error(f"{out} was started with {name} {before[name]}, not {getattr(args, name)}")
    return args


def setup(args, device, data, start):
    """Data on the device, network, optimiser, state. start: a checkpoint to go on from, or None."""
    x_train, y_train, x_test, y_test = data
    n, world = args.train_size or len(x_train), rank_and_world()[1]
    if not 2 * world <= args.batch_size <= n <= len(x_train) or args.batch_size % world:
        wanted = f"--batch-size {args.batch_size} of {n} images in {world} processes"
        raise ValueError(f"{wanted} does not fit: there are {len(x_train)} training images")
    data = [t.to(device) for t in (x_train[:n], y_train[:n], x_test, y_test)]
    classes, present = int(y_train.max()) + 1, len(y_train[:n].unique())
    if present < classes and is_lead():
        print(f"note: the first {n} images are of {present} of {classes} classes", file=sys.stderr)
    if (METHODS[args.method].margin or args.exclude) and args.epochs <= args.burn_in and is_lead():
        print(f"note: all weights stay 1, burn-in takes {args.burn_in} epochs", file=sys.stderr)
    torch.manual_seed(args.seed)
    net = models.build(args.arch, classes).to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    models.check_folding(net, data[0][:4].float() / 255, torch.bfloat16 if args.amp else None)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    state = {"epoch": 0, "best": -1.0, "log": []}
    if start:
        models.load_weights(net, start["model"], args.init or args.out)
        optimizer.load_state_dict(start["optimizer"])
        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
        state = {name: start[name] for name in state}
    return data, net, optimizer, state


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as convolutions have it by default
    torch.backends.cudnn.benchmark = True
    with contextlib.ExitStack() as held:
        try:
            start, device = open_run(args), join_processes(args.device, args.amp)
            data = load_data(args.data)
            before, args.digest = getattr(args, "digest", None), digest(*data)
            if before not in (None, args.digest):
                raise ValueError(f"{args.data} holds other data than {out} was started with")
            data, net, optimizer, state = setup(args, device, data, start)
            if is_lead():
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(out / ".run.lock", wait=False))
                open_run(args)  # once more: another process may have been here meanwhile
                for name in "last.pt", "best.pt", "burnin.pt", "log.csv", "args.json":
                    for left in out.glob(f"[0-9]*.{name}.tmp"):  # by a kill
                        left.unlink()
                write(out / "args.json", json.dumps(settings(args), indent=2).encode() + b"\n")
                if state["log"]:  # a kill can come between last.pt and log.csv
                    save_log(out / "log.csv", state["log"])
        except (OSError, ValueError, RuntimeError) as error:
            print(f"clirat.py: error: {error}", file=sys.stderr)
            sys.exit(2)
        try:
            images = f"{len(data[0])} training and {len(data[2])} test images"
            about = f"{args.data}, {images} {tuple(data[0].shape[1:])}; into {out}"
            print(f"{args.method}, {args.arch} on {device}: {about}", flush=True)
            train(args, data, net, optimizer, state)
            words = ["python", "eval_attacks.py", out / "last.pt", "--data", args.data]
            words += ["--eps", args.eps] if args.eps != 8 / 255 else []
            words += ["--n", min(1000, len(data[3]))]
            if METHODS[args.method].margin and args.burn_in < args.epochs:
                print("PGD overstates what weighting gains; CW and AutoAttack tell.")
            print("Evaluate it:", shlex.join(map(str, words)), flush=True)
        except (KeyboardInterrupt, FloatingPointError, OSError) as error:
            saved = f"saved up to epoch {state['epoch']}: --resume --out {out} goes on"
            saved = saved if (out / "last.pt").exists() else "nothing is saved yet: run it again"
            if is_lead():
                print(f"\nclirat.py: stopped: {str(error) or 'Ctrl-C'}; {saved}", file=sys.stderr)
            sys.stdout = None if isinstance(error, BrokenPipeError) else sys.stdout  # no second try
            sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel holds the group, whose threads can abort the end
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
