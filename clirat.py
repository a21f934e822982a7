"""CLIRAT: Confused-Label Instance-Reweighted Adversarial Training in one file.

    python clirat.py --arch resnet18 --gamma 10 --beta -0.5

Equations and Algorithm 1 are those of "Instance Reweighting Adversarial Training Based on Confused
Label" (Qiu, Wang, Ma, Hou, Li & Li, Intelligent Automation & Soft Computing 37(2), 2023,
doi:10.32604/iasc.2023.038241); where the paper is silent, the README's table says what is done
here and why. Throughout: N images in a batch, K classes, images (N, C, H, W) in [0, 1], logits and
probabilities (N, K), labels (N,).
"""

import argparse
import contextlib
import csv
import datetime
import gc
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is being imported: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import models

# ---- Margins and weights -------------------------------------------------------------------------


def pm(probs, labels):
    """Probability margin (Eq. 5): p_y minus the largest other probability.

    probs: (N, K) rows of probabilities, K >= 2, any float dtype. labels: (N,) integers in 0..K-1.
    Returns (N,) in [-1, 1], negative where misclassified. ValueError on a wrong shape.
    """
    fit = probs.ndim == 2 and probs.shape[1] > 1 and labels.shape == probs.shape[:1]
    if not fit or labels.is_floating_point():
        found = f"{tuple(probs.shape)} and {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"want probs (N, K >= 2) and integer labels (N,), got {found}")
    y = labels[:, None].long()  # (N, 1)
    p_y = probs.gather(1, y).squeeze(1)  # (N,)
    return p_y - probs.scatter(1, y, -torch.inf).amax(1)


def cl_pm(probs, labels):
    """Confused-label probability margin, CL-PM (Eq. 7).

    A confused label (CL) is a class j with p_j > p_y. CL-PM is PM (Eq. 5) for an example without
    CLs, otherwise the sum of p_y - p_j over its CLs.

    probs: (N, K) rows of probabilities, K >= 2, any float dtype. labels: (N,) integers in 0..K-1.
    Returns (N,) in [-1, 1]: PM where there is at most one CL, less than PM where there are several,
    0 on a tie. ValueError on a wrong shape.
    """
    fit = probs.ndim == 2 and probs.shape[1] > 1 and labels.shape == probs.shape[:1]
    if not fit or labels.is_floating_point():
        found = f"{tuple(probs.shape)} and {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"want probs (N, K >= 2) and integer labels (N,), got {found}")
    y = labels[:, None].long()  # (N, 1)
    gaps = probs.gather(1, y) - probs  # (N, K): p_y - p_j, negative at the CLs and 0 at j = y
    margin = gaps.scatter(1, y, torch.inf).amin(1)  # (N,): Eq. 5
    return torch.where(margin < 0, gaps.clamp(max=0).sum(1), margin)


def instance_weights(margins, gamma, beta, norm="batch"):
    """Weights of a batch from its margins (Eq. 6; Algorithm 1 l.9, l.14); they carry no gradient.

    margins: (N,) of `pm`, `cl_pm` or another measure that falls with vulnerability. gamma >= 0:
    slope. beta: bias. norm: "batch" scales the weights to mean 1 (l.14 prints M, the number of
    batches, but needs the batch size); "mail" multiplies them by 3 instead, as MAIL's code does.
    Returns (N,), non-negative and finite for any gamma; NaN if a margin is NaN.
    ValueError on another shape or norm.
    """
    if margins.ndim != 1 or norm not in ("batch", "mail"):
        found = f"{margins.ndim}-D, {norm!r}"
        raise ValueError(f"want margins (N,) and norm batch or mail, got {found}")
    limit = torch.finfo(margins.dtype).max  # where a huge gamma would overflow
    scores = (min(gamma, limit) * (beta - margins.detach())).clamp(-limit, limit)  # (N,)
    if norm == "mail":
        return 3 * scores.sigmoid()
    # m w / sum(w) in log space: no 0 / 0 where every w underflows
    return len(margins) * F.logsigmoid(scores).softmax(0)


# ---- Losses: tensors in, tensors out -------------------------------------------------------------


def weighted_mean(losses, weights):
    """Algorithm 1 l.15 as a mean over the batch. losses, weights: (N,); weights None: all 1."""
    if weights is None:
        return losses.mean()
    if weights.shape != losses.shape:
        raise ValueError(f"want weights {tuple(losses.shape)}, got {tuple(weights.shape)}")
    return (weights * losses).mean()


def at_loss(logits_adv, labels, weights=None):
    """Adversarial training: mean of w CE(f(x_adv), y). logits (N, K), labels and weights (N,).

    Returns a scalar. ValueError on a wrong shape; a label outside 0..K-1 is PyTorch's own error.
    """
    if labels.shape != logits_adv.shape[:1] or labels.is_floating_point():
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"want integer labels ({len(logits_adv)},), got {found}")
    # gather, since F.cross_entropy would ignore the label -100
    log_p_y = logits_adv.log_softmax(1).gather(1, labels[:, None].long()).squeeze(1)  # (N,)
    return weighted_mean(-log_p_y, weights)


def kl(logits_nat, logits_adv):
    """KL(p(x) || p(x_adv)), (N,), in log space: no NaN gradient where softmax underflows."""
    if logits_nat.shape != logits_adv.shape:
        shapes = f"{tuple(logits_nat.shape)} and {tuple(logits_adv.shape)}"
        raise ValueError(f"want logits of one shape, got {shapes}")
    log_p, log_q = logits_nat.log_softmax(1), logits_adv.log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def trades_loss(logits_nat, logits_adv, labels, trade_off, weights=None):
    """TRADES (Eq. 3), its robust term weighted; a scalar.

    mean CE(f(x), y) + trade_off * mean w KL(p(x) || p(x_adv)). trade_off: Eq. 3's beta, which is
    not the beta of Eq. 6.
    """
    robust = weighted_mean(kl(logits_nat, logits_adv), weights)
    return at_loss(logits_nat, labels) + trade_off * robust


def mart_loss(logits_nat, logits_adv, labels, trade_off, weights=None):
    """MART (Eq. 4), its adversarial term weighted; a scalar.

    mean w BCE(p(x_adv), y) + trade_off * mean KL(p(x) || p(x_adv)) (1 - p_y(x)),
    BCE = -log p_y - log(1.0001 - max_{k != y} p_k), 1.0001 the stabiliser of MART's published code.
    """
    cross_entropy = at_loss(logits_adv, labels, weights)
    y = labels[:, None].long()  # (N, 1)
    runner_up = logits_adv.softmax(1).scatter(1, y, 0).amax(1)  # (N,)
    bce = cross_entropy + weighted_mean(-torch.log(1.0001 - runner_up), weights)
    divergence = kl(logits_nat, logits_adv)  # (N,)
    p_y = logits_nat.softmax(1).gather(1, y).squeeze(1)
    return bce + trade_off * (divergence * (1 - p_y)).mean()


class Method(NamedTuple):
    loss: str  # at, trades or mart
    margin: str | None = None  # pm (Eq. 5), cl-pm (Eq. 7), lps (GAIRAT) or None: all weights 1
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
    # (1 + tanh(-1 + 5 (1 - 2 kappa / steps))) / 2 is Eq. 6 on kappa / steps with these two:
    "gairat": Method("at", "lps", 20.0, 0.4),
    "fat": Method("at"),
}


# ---- PGD -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(model):
    """Hold a model in eval mode with constant parameters, then restore what was found."""
    if not isinstance(model, torch.nn.Module):  # any other callable is left alone
        yield
        return
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


def check_attack(x, y, eps):
    """ValueError, in one line, on images, labels or eps that no attack can take."""
    if torch.is_inference_mode_enabled():
        raise ValueError("attacks need gradients: use torch.no_grad(), not inference_mode()")
    if x.ndim != 4 or x.dtype not in (torch.float32, torch.float64) or not len(x):
        found = f"{x.dtype} {tuple(x.shape)}"
        raise ValueError(f"want float32 or float64 images (N > 0, C, H, W), got {found}")
    if y.shape != x.shape[:1] or y.is_floating_point():
        raise ValueError(f"want integer labels ({len(x)},), got {y.dtype} {tuple(y.shape)}")
    if not eps >= 0:
        raise ValueError(f"want eps >= 0, got {eps}")
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # no value can be looked at; the warm-up before did
    low, high = (value.item() for value in x.aminmax())
    if not 0 <= low <= high <= 1:
        hint = "divide by 255, or make the normalisation the model's first layer"
        raise ValueError(f"want images in [0, 1], got {low:.3g} to {high:.3g}: {hint}")
    if y.min() < 0:
        raise ValueError(f"want labels in 0..K-1, got {y.min()}")


def pgd(
    model, x, y, *, eps, step_size, steps, loss="ce", init="normal", tau=None, return_kappa=False
):
    """Projected gradient ascent in the L-infinity ball (Eq. 2; Algorithm 1 l.5-8).

    model: maps images to logits. x: (N, C, H, W) in [0, 1]. y: (N,) integers. eps, step_size: in
    units of x. steps >= 0. loss: "ce" cross-entropy, "kl" KL(p(x) || p(x_adv)), "cw"
    max_{k != y} z_k - z_y. init: "normal" x + 0.001 N(0, I), "uniform" in the ball, "none" x itself
    (l.5 as printed), or a tensor like x. tau: an example stops once more than tau of its iterates,
    the start included, were misclassified (FAT); None: never.

    Returns x_adv like x, inside the ball and [0, 1]; with return_kappa also kappa (N,), at how many
    of the iterates 0..steps-1 (0: the start) the example was classified correctly (GAIRAT). Runs in
    eval mode and restores the mode it found; gradients and BatchNorm statistics stay untouched.
    ValueError on an unknown loss or init, and on what `check_attack` names.
    """
    check_attack(x, y, eps)
    if steps < 0 or loss not in ("ce", "kl", "cw"):
        raise ValueError(f"want steps >= 0 and loss ce, kl or cw, got {steps} and {loss!r}")
    x, y = x.detach(), y.long()
    if isinstance(init, torch.Tensor) and init.shape == x.shape:
        x_adv = init.detach()
    elif init == "normal":
        x_adv = x + 0.001 * torch.randn_like(x)
    elif init == "uniform":
        x_adv = x + torch.empty_like(x).uniform_(-eps, eps)
    elif init == "none":
        x_adv = x
    else:
        found = tuple(init.shape) if isinstance(init, torch.Tensor) else repr(init)
        raise ValueError(f"want init normal, uniform, none or a tensor like x, got {found}")
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    x_adv = x_adv.clamp(lower, upper)
    kappa = torch.zeros_like(y)

    with frozen(model), torch.enable_grad():
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
                direction = direction * (t + 1 - kappa <= tau)[:, None, None, None]
            x_adv = x_adv.detach().add(direction, alpha=step_size).clamp_(lower, upper)
    return (x_adv, kappa) if return_kappa else x_adv


def graphed(function, device):
    """A function of tensors that returns a tuple of tensors, on CUDA as a CUDA graph.

    Without it a step waits for the CPU, which launches some 5,000 kernels. Each set of input shapes
    is recorded once, then replayed: what `function` reads besides its arguments must stay where it
    is, and it must not look at a value. Elsewhere it is returned as it is.
    """
    if device.type != "cuda":
        return function
    graphs, stream, pool = {}, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def replay(*inputs):
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in graphs:
            static = [t.clone() for t in inputs]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # warm up: compilation, cuDNN's choices
                for _ in range(3):
                    function(*static)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            options = {"pool": pool, "stream": stream}
            # thread_local: NCCL's watchdog may ask for its events meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
                outputs = function(*static)
            graphs[key] = graph, static, outputs
        graph, static, outputs = graphs[key]
        for ours, theirs in zip(static, inputs, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return tuple(t.clone() for t in outputs)  # the next replay overwrites them

    return replay


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def augment(x):
    """Random crop after 4 pixels of zero padding, then random horizontal flip.

    (N, C, H, W), uint8 -> the same in [0, 1], channels last, the faster layout for convolutions.
    """
    n, _, h, w = x.shape
    top, left = torch.randint(9, (2, n), device=x.device)
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 9, 9, H, W), a view
    x = crops[torch.arange(n, device=x.device), :, top, left]  # (N, C, H, W)
    x = torch.where(torch.rand(n, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)
    return x.to(memory_format=torch.channels_last) / 255


def train_epoch(args, epoch, model, attack, optimizer, x_train, y_train):
    """Algorithm 1 l.2-15: one epoch over uint8 images x_train (N, C, H, W), labels y_train (N,).

    model: the network, under torchrun in DistributedDataParallel. attack: l.5-8 as a function of
    x, y, start and tau, see `attacks`. Returns what the log is made of, (3, N), batch after batch:
    the loss of each example's batch, its weight, its number of confused labels.
    """
    method, device = METHODS[args.method], x_train.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    tau = args.steps  # never stop early
    if args.method == "fat":
        tau = sum(epoch > round(args.epochs * e / 120) for e in (50, 90))
    tau = torch.full((), tau, device=device)
    rank, world = rank_and_world()
    order = torch.randperm(len(x_train), device=device)
    if world > 1:  # the order is that of all processes, what follows each one's own
        torch.manual_seed(torch.initial_seed() + 2**32 * rank)
    batches = order[: len(order) // world * world].split(args.batch_size)
    # a lone image is left out: BatchNorm cannot train on its feature maps where they are 1 x 1
    batches = [batch[rank::world] for batch in batches if len(batch) > world]
    seen = []

    model.train()
    for batch in progress(batches, f"epoch {epoch}/{args.epochs}", args.epochs - epoch + 1):  # l.2
        x, y = augment(x_train[batch]), y_train[batch]  # l.3
        start = x + 0.001 * torch.randn(x.shape, device=device)  # l.5, but off x: see the README
        x_adv, kappa = attack(x, y, start, tau)  # l.5-8
        with autocast:
            logits_nat = None if method.loss == "at" else model(x).to(x.dtype)  # (n, K)
            logits_adv = model(x_adv).to(x.dtype)  # (n, K)

        probs = logits_adv.detach().softmax(1)
        num_cl = (probs > probs.gather(1, y[:, None])).sum(1)  # (n,)
        weights = torch.ones_like(probs[:, 0])  # (n,) l.12
        if epoch > args.burn_in and method.margin:  # l.11
            if method.margin == "cl-pm":
                margins = cl_pm(probs, y)  # (n,)
            elif method.margin == "pm":
                margins = pm(probs, y)
            else:
                margins = kappa / args.steps  # GAIRAT
            if world > 1:
                margins = gather(margins).flatten()  # of the whole batch
            weights = instance_weights(margins, args.gamma, args.beta, args.weight_norm)  # l.9, 14
            weights = weights[len(y) * rank : len(y) * (rank + 1)]
        if epoch > args.burn_in and args.exclude:  # Fig. 1B
            weights.masked_fill_(num_cl == 1 if args.exclude == "single" else num_cl > 1, 0)
            if args.weight_norm == "batch":  # mean 1 again; all stay 0 if none is left
                weights /= gather(weights).mean().clamp(min=1e-30)

        if method.loss == "at":
            loss = at_loss(logits_adv, y, weights)
        elif method.loss == "trades":
            loss = trades_loss(logits_nat, logits_adv, y, args.trade_off, weights)
        else:
            loss = mart_loss(logits_nat, logits_adv, y, args.trade_off, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # l.15
        seen.append(torch.stack([loss.detach().expand(len(y)), weights, num_cl.to(weights)]))
    return gather(torch.cat(seen, 1)).permute(1, 2, 0).flatten(1)


def is_wrong(logits, y):
    """(N,) bool: misclassified, or not a number. logits (N, K), y (N,)."""
    return (logits.argmax(1) != y) | logits.isnan().any(1)


def evaluate(net, attack, x, y, *, eps, batch_size):
    """NAT and PGD-20 accuracy in [0, 1] on uint8 images x (N, C, H, W) with labels y (N,).

    attack: PGD-20 as a function of images, labels and start, see `attacks`. As in MAIL's
    evaluation: uniform start, step 0.003, verdict on the last iterate.
    """
    rank, world = rank_and_world()
    correct = torch.zeros(2, device=x.device)
    batches = torch.arange(len(x), device=x.device)[rank::world].split(batch_size)
    for batch in progress(batches if len(x) > rank else [], "evaluation"):
        images, labels = x[batch].to(memory_format=torch.channels_last) / 255, y[batch]
        start = images + torch.empty_like(images).uniform_(-eps, eps)
        x_adv, _ = attack(images, labels, start)
        with frozen(net), torch.no_grad():
            wrong = torch.stack([is_wrong(net(inputs), labels) for inputs in (images, x_adv)])
        correct += (~wrong).sum(1)
    if world > 1:
        dist.all_reduce(correct)
    return (correct / len(x)).tolist()


def log_row(epoch, lr, loss, weights, num_cl):
    """A row of log.csv from what `train_epoch` returns of each example, (N,) each.

    loss: the weighted one. adv_correct, single_cl, multi_cl: fractions of the examples with no, one
    and several confused labels (Fig. 1A). weight_*: these groups' shares of the weight. ess: the
    effective sample size of the weights, (sum w)^2 / sum w^2, as a fraction of the examples.
    """
    groups = {"adv_correct": num_cl == 0, "single_cl": num_cl == 1, "multi_cl": num_cl > 1}
    total = weights.sum().clamp(min=1e-30)
    row = {"epoch": epoch, "lr": lr, "loss": loss.mean().item()}
    row |= {name: group.double().mean().item() for name, group in groups.items()}
    row |= {f"weight_{k}": (weights[group].sum() / total).item() for k, group in groups.items()}
    row["ess"] = (total**2 / weights.square().sum().clamp(min=1e-30)).item() / len(weights)
    return row


def progress(batches, label, passes=1):
    """Yield the batches; on a terminal, say how many are done and how long the rest will take.

    passes: how many such passes are left, this one included.
    """
    show, begun, left = sys.stderr.isatty() and is_lead(), time.perf_counter(), ", estimating"
    for done, batch in enumerate(batches):
        if done:
            seconds = (time.perf_counter() - begun) / done * (len(batches) * passes - done)
            left = f", {datetime.timedelta(seconds=round(seconds))} left"
        if show:
            line = f"\r{label}, batch {done + 1}/{len(batches)}{left}\033[K"
            print(line, end="", file=sys.stderr, flush=True)
        yield batch
    if show:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def attacks(args, net):
    """PGD of the training, of (x, y, start, tau), and PGD-20, of (x, y, start): (x_adv, kappa).

    Both attack a copy of the network, the first in bfloat16 with --amp, which follows it in place.
    """
    device = next(net.parameters()).device
    attacked = models.Folded(net, torch.bfloat16 if args.amp else None)
    fast = torch.compile(attacked, dynamic=False) if args.compile else attacked
    attacked_20 = models.Folded(net)
    inner = {"steps": args.steps, "step_size": args.step_size}
    inner["loss"] = "kl" if METHODS[args.method].loss == "trades" else "ce"
    common = {"eps": args.eps, "return_kappa": True}

    def pgd_train(x, y, start, tau):
        attacked.refresh(net)
        return pgd(fast, x, y, init=start, tau=tau, **inner, **common)

    def pgd_20(x, y, start):
        attacked_20.refresh(net)
        return pgd(attacked_20, x, y, init=start, steps=20, step_size=0.003, **common)

    return graphed(pgd_train, device), graphed(pgd_20, device)


def train(args, data, net, model, optimizer, state):
    """Algorithm 1 from the epoch after state["epoch"]; each epoch ends with a row of log.csv.

    net: the network. model: the same, under torchrun in DistributedDataParallel.
    FloatingPointError if the loss or the weights are not finite, before they reach a checkpoint.
    """
    x_train, y_train, x_test, y_test = data
    attack, attack_20 = attacks(args, net)
    test = {"eps": args.eps, "batch_size": args.batch_size}
    if is_lead() and state["log"]:  # a kill can come between last.pt and log.csv
        save_log(Path(args.out, "log.csv"), state["log"])
    for epoch in range(state["epoch"] + 1, args.epochs + 1):  # Alg. 1 l.1
        begun = time.perf_counter()
        torch.manual_seed(args.seed * 10_007 + epoch)  # of these alone: resuming needs no state
        lr = args.lr / 10 ** sum(epoch > milestone for milestone in args.lr_milestones)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seen = train_epoch(args, epoch, model, attack, optimizer, x_train, y_train)  # l.2-15
        seen = seen.double().cpu()
        if dist.is_initialized():  # without SyncBatchNorm statistics differ: all take rank 0's
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)
        bad = ~seen.isfinite().all(0)  # (N,)
        bad[-1] |= not all(t.isfinite().all() for t in net.state_dict().values())
        if bad.any():
            batch = bad.nonzero()[0].item() // args.batch_size + 1
            what = "the loss or the weights are not finite"
            raise FloatingPointError(f"epoch {epoch}, batch {batch}: {what}")

        row, seconds = log_row(epoch, lr, *seen), time.perf_counter() - begun
        row |= {"seconds": seconds, "images_per_s": len(bad) / seconds, "nat": None, "pgd20": None}
        if args.eval_every and epoch % args.eval_every == 0:
            images, labels = x_test[: args.eval_size], y_test[: args.eval_size]
            row["nat"], row["pgd20"] = evaluate(net, attack_20, images, labels, **test)
        if is_lead():
            save_epoch(args, net, optimizer, state, row)
            in_log_alone = ("lr", "weight", "images")
            shown = [name for name in row if not name.startswith(in_log_alone)]
            figures = [f"{name} {row[name]:.4g}" for name in shown if row[name] is not None]
            left = round((time.perf_counter() - begun) * (args.epochs - epoch))
            print(*figures, f"{datetime.timedelta(seconds=left)} left", sep=", ", flush=True)

    if args.eval_every:
        torch.manual_seed(args.seed)
        nat, pgd20 = evaluate(net, attack_20, x_test, y_test, **test)
        if is_lead():
            where = f"(%, last epoch, all {len(x_test)} test images)"
            print(f"NAT {100 * nat:.2f}  PGD-20 {100 * pgd20:.2f}  {where}")


# ---- Several processes (torchrun) ----------------------------------------------------------------


def rank_and_world():
    """This process's number and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_lead():
    """Whether this process writes and prints: rank 0."""
    return rank_and_world()[0] == 0


def gather(t):
    """t (n, ...) of each process -> (processes, n, ...)."""
    parts = [torch.empty_like(t) for _ in range(rank_and_world()[1])]
    if len(parts) == 1:
        return t[None]
    dist.all_gather(parts, t.contiguous())
    return torch.stack(parts)


def join_processes(name, amp):
    """The torch.device of a name; under torchrun, after joining the others, one GPU a process.

    amp: whether bfloat16 is wanted there. ValueError if this machine does not have the device.
    """
    launched = "LOCAL_RANK" in os.environ and not dist.is_initialized()
    if launched and name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: use cpu or cuda")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # 33 MB, freed at once: glibc then keeps freed blocks of that size for the next pass,
        torch.empty(8_300_000)  # which else pays a page fault for every 4 kB, a quarter of its time
    if launched:
        patience = datetime.timedelta(days=1)  # one can be done with an attack long before another
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    if amp and device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        print("note: this CPU has no fast bfloat16: leave out --amp", file=sys.stderr)
    return device


def distributed(net):
    """net in DistributedDataParallel under torchrun, else net itself."""
    if not dist.is_initialized():
        return net
    with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers, 2.4 knows no other
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(net, broadcast_buffers=False)


@contextlib.contextmanager
def bad_input_ends_all(program):
    """Turn OSError and ValueError into one line on stderr and exit status 2, in all processes."""
    error = None
    try:
        yield
    except (OSError, ValueError) as bad_input:
        error = f"{program}: error: {' '.join(str(bad_input).split())}"
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if message := next(filter(None, errors), None):
        stop(2, message)


def stop(status, message=None):
    """Leave the group and, unless status is 0, end this process; the lead says why."""
    if message and is_lead():
        print(message, file=sys.stderr)
    if dist.is_initialized():
        gc.collect()  # DistributedDataParallel holds the group, whose threads would abort the end
        dist.destroy_process_group()
    if status:
        sys.exit(status)


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


def load_npz(path, parts):
    names = [f"{kind}_{part}" for part in parts for kind in "xy"]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in names]
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path}: no .npz with {', '.join(names)} ({error})") from None
    labels = arrays[1]
    classes = max(int(labels.max(initial=0)) + 1, 2) if labels.dtype.kind in "iu" else 2
    for part, x, y in zip(parts, arrays[::2], arrays[1::2], strict=True):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape:
            found = f"{x.dtype} {x.shape}"
            raise ValueError(f"{path}: x_{part} must be uint8 (N, H, W, 3), N > 0, not {found}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(f"{path}: y_{part} must be {len(x)} integers, not {y.dtype} {y.shape}")
        if y.min() < 0 or y.max() >= classes:
            found = f"{y.min()}..{y.max()}"
            raise ValueError(f"{path}: y_{part} must be in 0..{classes - 1}, not {found}")
        if x.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(f"{path}: x_{part} differs in size from x_{parts[0]}")
    present = np.unique(labels)
    if "train" in parts and len(present) < classes:
        missing = next((i for i, label in enumerate(present) if i != label), len(present))
        raise ValueError(f"{path}: y_train has no image of class {missing}")
    return arrays


def load_cifar10(folder, parts):
    if folder.name == "cifar-10-batches-py":
        folder = folder.parent
    if not folder.is_dir() and folder != Path("data"):  # a mistyped name is no place to download to
        raise FileNotFoundError(f"no folder {folder} for CIFAR-10: make it, or use FILE.npz or toy")
    held = {path.name for path in folder.glob("[!.]*")}
    if held and not held & {"cifar-10-batches-py", "cifar-10-python.tar.gz"}:
        raise ValueError(f"{folder} holds {min(held)}, not CIFAR-10: give an empty folder")
    try:
        from torchvision.datasets import CIFAR10  # slow to import, and only needed here

        sets = [CIFAR10(folder, train=part == "train", download=True) for part in parts]
    except PermissionError as error:
        raise OSError(f"cannot write to the folder of CIFAR-10: {error}") from None
    except OSError as error:
        damaged = "; what is there is damaged" if held else ""
        hint = "use --data FILE.npz or toy"
        raise OSError(f"no download of CIFAR-10 into {folder} ({error}){damaged}: {hint}") from None
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(f"CIFAR-10 in {folder} is damaged ({error}): delete it") from None
    return [array for part in sets for array in (part.data, np.array(part.targets))]


def load_data(spec, parts=("train", "test")):
    """(x_train, y_train, x_test, y_test): uint8 images (N, 3, H, W), int64 labels (N,) in 0..K-1.

    spec: `toy`, an .npz file with arrays of these names (uint8 images (N, H, W, 3), integer
    labels), or the folder of torchvision's CIFAR-10, downloaded on first use. parts: ("test",)
    for (x_test, y_test) alone. ValueError or OSError, in one line, on anything else.
    """
    if spec == "toy":
        arrays = toy_data()[-2 * len(parts) :]
    elif spec.endswith(".npz"):
        arrays = load_npz(spec, parts)
    else:
        arrays = load_cifar10(Path(spec), parts)
    images = [torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in arrays[::2]]
    labels = [torch.from_numpy(y.astype(np.int64)) for y in arrays[1::2]]
    return tuple(t for pair in zip(images, labels, strict=True) for t in pair)


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


def save_checkpoint(path, checkpoint):
    buffer = io.BytesIO()  # a full disk is then an OSError
    torch.save(checkpoint, buffer)
    write(path, buffer.getbuffer())


def save_log(path, rows):
    file = io.StringIO()
    table = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write(path, file.getvalue().encode())


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
    """The checkpoint that the run starts from, last.pt or that of --init, or None.

    OSError or ValueError, in one line, if the run must not go to --out or can't start from there.
    """
    last = Path(args.out, "last.pt")
    if not args.resume and any(last.parent.glob("*.pt")):
        hint = "choose another --out" if args.init else "add --resume, or choose another --out"
        raise ValueError(f"{args.out} already holds a run: {hint}")
    if args.resume:
        if not last.with_name("args.json").exists():
            raise ValueError(f"{args.out} holds no run to resume: leave out --resume to start one")
        try:
            init = json.loads(last.with_name("args.json").read_text())["init"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{args.out}/args.json is not of a run, or is damaged") from None
        if args.init and (not init or Path(args.init).absolute() != Path(init).absolute()):
            started = f"--init {init}" if init else "no --init"
            raise ValueError(f"{args.out} was started with {started}, not --init {args.init}")
        args.init = init
    resume = args.resume and last.exists()
    if not resume and not args.init:
        return None
    path = last if resume else args.init
    checkpoint = models.read(path)
    try:
        before, epoch = checkpoint["args"], checkpoint["epoch"]
        method, burn_in = before["method"], before["burn_in"]
        _ = METHODS[method], checkpoint["optimizer"]["param_groups"]
        _ = checkpoint["model"], checkpoint["best"], checkpoint["log"]
    except (KeyError, TypeError):
        hint = "use a run's burnin.pt or last.pt"
        raise ValueError(f"{path} is no training checkpoint of clirat.py: {hint}") from None
    now = settings(args)
    changed = {k: f"{k} was {before.get(k)}, not {now[k]}" for k in now if before.get(k) != now[k]}
    if resume and changed:
        texts = "; ".join(changed.values())
        raise ValueError(f"{args.out} was started with other settings: {texts}")
    if resume:
        return checkpoint

    # FAT differs from the first epoch on
    family, own = (name if name == "fat" else METHODS[name].loss for name in (method, args.method))
    if family != own:
        raise ValueError(f"{path} is from {method}, whose burn-in is not that of {args.method}")
    if epoch >= args.epochs:
        raise ValueError(f"{path} is from epoch {epoch}: --epochs {args.epochs} adds nothing")
    fixed, weighting = {"arch", "seed"}, {"method", "gamma", "beta", "exclude", "weight_norm"}
    if epoch > burn_in:  # past it the weights were at work, and the log would call them this run's
        fixed |= weighting
    if wrong := "; ".join(text for name, text in changed.items() if name in fixed):
        raise ValueError(f"{path} is epoch {epoch} of another run: {wrong}")
    free = weighting | {"init", "eval_every", "eval_size"}
    other = "; ".join(text for name, text in changed.items() if name not in free)
    if other and is_lead():
        print(f"note: {path} was trained with other settings: {other}", file=sys.stderr)
    return checkpoint | {"best": -1.0}


# ---- Command line --------------------------------------------------------------------------------


def number(kind, low, high=math.inf):
    """argparse type: a finite number in [low, high]. Fractions such as 8/255 will do."""

    def parse(text):
        try:
            value = int(text) if kind is int else float(Fraction(text))
        except (ValueError, ZeroDivisionError, OverflowError):
            message = f"{text!r} is not a finite {kind.__name__}"
            raise argparse.ArgumentTypeError(message) from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    return parse


def make_parser(program, description):
    """An argparse parser that takes -1/2 for a number and keeps an error to one line.

    Returns it and its add_argument, which takes the help text second and shows the default there.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.error = lambda message: parser.exit(2, f"{program}: error: {message}\n")

    def add(name, text, default=None, **kwargs):
        if default is not None:
            text, kwargs["default"] = f"{text} (default: %(default)s)", default
        parser.add_argument(name, help=text, **kwargs)

    return parser, add


def parse_args(argv):
    about = "CLIRAT and its companions: instance-reweighted adversarial training."
    parser, add = make_parser("clirat.py", about)
    natural, positive = number(int, 0), number(int, 1)
    real, signed = number(float, 0), number(float, -math.inf)
    add("--method", "a row of the README's table of methods", "clirat", choices=METHODS)
    add("--arch", "resnet18 or wrn-D-K, such as wrn-32-10", "resnet18", type=str)
    add("--gamma", "slope of the weights, Eq. 6 (default: the method's)", type=real)
    add("--beta", "bias of the weights, Eq. 6 (default: the method's)", type=signed)
    add("--trade-off", "TRADES' beta, MART's lambda (default: the method's)", type=real)
    add("--data", "folder of CIFAR-10, FILE.npz or toy", "data", type=str)
    add("--train-size", "train on the first N images (default: all)", type=positive, metavar="N")
    add("--epochs", "length of the run; the schedule scales with it", 120, type=positive)
    add("--burn-in", "last epoch with all weights 1 (default: epochs * 75/120)", type=natural)
    add("--lr-milestones", "last epochs before lr / 10 (default: epochs * 75/120, 90/120)",
        type=natural, nargs="*", metavar="EPOCH")  # fmt: skip
    add("--batch-size", "of all processes together", 128, type=number(int, 2))
    add("--lr", "learning rate (default: 0.01 for resnet18, 0.1 for wrn)", type=real)
    add("--weight-decay", "of SGD (default: 3.5e-3 for resnet18, 7e-4 for wrn)", type=real)
    add("--eps", "L-infinity radius", "8/255", type=number(float, 0, 1))
    add("--step-size", "step of the training PGD", "2/255", type=real)
    add("--steps", "steps of the training PGD", 10, type=positive)
    add("--seed", "of the weights and the data's order", 1, type=number(int, 0, 400_000))
    add("--out", "run folder (default: runs/<method>-<arch>-s<seed>)", type=str)
    add("--resume", "continue the run in --out", action="store_true")
    add("--init", "start from another run's burnin.pt: weights, optimiser, epoch", metavar="CKPT")
    add("--exclude", "drop the examples with one or with several confused labels (Fig. 1B)",
        choices=["single", "multi"])  # fmt: skip
    add("--weight-norm", "weights of mean 1, or MAIL's times 3", "batch", choices=["batch", "mail"])
    add("--amp", "bfloat16 forward passes", action="store_true")
    add("--compile", "torch.compile the network under attack", action="store_true")
    add("--device", "cpu, cuda, cuda:1", "cuda" if torch.cuda.is_available() else "cpu", type=str)
    add("--eval-every", "NAT and PGD-20 every N epochs, 0: never", 1, type=natural, metavar="N")
    add("--eval-size", "... on the first N test images", 1000, type=positive, metavar="N")
    args = parser.parse_args(argv)

    method, burn_in = METHODS[args.method], round(args.epochs * 75 / 120)
    defaults = {"burn_in": burn_in, "lr_milestones": [burn_in, round(args.epochs * 90 / 120)]}
    defaults |= {name: getattr(method, name) for name in ("gamma", "beta", "trade_off")}
    resnet = args.arch == "resnet18"
    defaults |= {"lr": 0.01 if resnet else 0.1, "weight_decay": 3.5e-3 if resnet else 7e-4}
    defaults |= {"out": f"runs/{args.method}-{args.arch}-s{args.seed}"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        elif value is None:
            parser.error(f"--{name.replace('_', '-')} does nothing with --method {args.method}")
    if args.weight_norm == "mail" and not method.margin:
        parser.error(f"--weight-norm does nothing with --method {args.method}")
    return args


def setup(args, device, data, start):
    """Data on the device, network, optimiser and state of the run. ValueError where they don't fit.

    start: the checkpoint to go on from, or None.
    """
    x_train, y_train, x_test, y_test = data
    n, world = args.train_size or len(x_train), rank_and_world()[1]
    if not args.batch_size <= n <= len(x_train):
        wanted = f"--batch-size {args.batch_size} of {n} images"
        raise ValueError(f"{wanted}: there are {len(x_train)} training images")
    if args.batch_size % world or args.batch_size < 2 * world:
        raise ValueError(f"--batch-size {args.batch_size} is not 2 or more images a process")
    data = [t.to(device) for t in (x_train[:n], y_train[:n], x_test, y_test)]

    torch.manual_seed(args.seed)
    net = models.build(args.arch, int(y_train.max()) + 1)
    net = net.to(device, memory_format=torch.channels_last)
    if world > 1 and device.type == "cuda":
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    decay = {"weight_decay": args.weight_decay}
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, **decay)
    state = {"epoch": 0, "best": -1.0, "log": []}
    if start:
        models.load_weights(net, start["model"], args.init or args.out)
        optimizer.load_state_dict(start["optimizer"])
        optimizer.param_groups[0].update(decay)
        state = {name: start[name] for name in state}
    return data, net, optimizer, state


def check_compiler(device):
    """ValueError if torch.compile does not work here, for want of a C++ compiler for example."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[:2])
        raise ValueError(f"--compile does not work here: {reason}") from None


def introduce(args, device, data):
    """The first line of a run: what, where, on which data."""
    x_train, y_train, x_test, _ = data
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    images = f"{len(x_train)} training and {len(x_test)} test images {tuple(x_train.shape[1:])}"
    about = f"{args.data}, {images}, {y_train.max() + 1} classes"
    print(f"{args.method}, {args.arch} on {where}: {about}; into {args.out}", flush=True)


def main(argv=None):
    args = parse_args(argv)
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA, as convolutions have it by default
    torch.backends.cudnn.benchmark = True
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    with contextlib.suppress(AttributeError):  # what a terminal can't show becomes ?
        sys.stdout.reconfigure(errors="replace")
    program, out, state = "clirat.py", Path(args.out), {"epoch": 0}
    status, message = 0, None
    try:
        with bad_input_ends_all(program):  # what is known without the data
            device = join_processes(args.device, args.amp)
            with torch.device("meta"):
                models.build(args.arch)
            start = open_run(args)
            if args.compile:
                check_compiler(device)
        with bad_input_ends_all(program):
            data = load_data(args.data) if is_lead() else None  # first, it may download
        with bad_input_ends_all(program):
            data = data or load_data(args.data)
            data, net, optimizer, state = setup(args, device, data, start)
            if is_lead():
                out.mkdir(parents=True, exist_ok=True)
                for name in "last.pt", "best.pt", "burnin.pt", "log.csv", "args.json":
                    for left in out.glob(f"[0-9]*.{name}.tmp"):  # by a kill
                        left.unlink()
                write(out / "args.json", json.dumps(settings(args), indent=2).encode() + b"\n")
                introduce(args, device, data)
        train(args, data, net, distributed(net), optimizer, state)
        if is_lead():
            command = ["python", "eval_attacks.py", str(out / "last.pt"), "--data", args.data]
            command += ["--n", str(min(1000, len(data[3])))]
            command += ["--eps", str(args.eps)] if args.eps != 8 / 255 else []
            print(f"Evaluate it: {shlex.join(command)}")
    except KeyboardInterrupt:
        hint = "; the same command with --resume goes on"
        hint = hint if 0 < state["epoch"] < args.epochs else ""
        status, message = 130, f"\n{program}: stopped after epoch {state['epoch']}{hint}"
    except FloatingPointError as error:
        saved = f"epoch {state['epoch']} is the last one saved"
        saved = saved if state["epoch"] else "none is saved"
        status, message = 1, f"{program}: stopped at {error}; {saved}"
    except OSError as error:
        status, message = 1, f"{program}: cannot write to {out} ({error}); what is there is whole"
    stop(status, message)


if __name__ == "__main__":
    main()
