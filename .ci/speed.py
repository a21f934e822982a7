"""Time a training step of clirat.py against the plain way of doing the same work, in turn, in one run.

    python .ci/speed.py ARCH BATCH_SIZE ROUNDS [METHOD ...]

The plain loop is that of the released base code: contiguous float32, parameters that require gradients during the
attack, and for TRADES a natural branch that is computed anew in every PGD step. It has a process of its own, whose
memory allocator is as Python starts it. One JSON line a method: medians in milliseconds, their ratios, what share of
this machine's matrix-product rate the steps reach, and how much of a step is spent outside the network's passes: a step
with a trivial network, and the folding of BatchNorm.
"""

import functools
import json
import multiprocessing
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clirat
import models


def plain_step(args, net, optimizer, x, y):
    row, x = clirat.METHODS[args.method], clirat.augment(x).float() / 255
    net.eval()
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(args.steps):
        x_adv.requires_grad_()
        if row.loss == "trades":
            natural, adversarial = net(x).softmax(1), net(x_adv).log_softmax(1)
            loss = F.kl_div(adversarial, natural, reduction="sum")
        else:
            loss = F.cross_entropy(net(x_adv), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + args.step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - args.eps), x + args.eps).clamp(0, 1)
    net.train()
    natural = None if row.loss == "at" else net(x)
    adversarial = net(x_adv)
    with torch.no_grad():
        weights = clirat.instance_weights(clirat.cl_pm(adversarial.softmax(1), y), args.gamma, args.beta)
    if row.loss == "at":
        loss = clirat.at_loss(adversarial, y, weights)
    else:
        loss = clirat.trades_loss(natural, adversarial, y, args.trade_off, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def our_step(args, net, optimizer, x, y):
    batch = next(clirat.mini_batches(x, y, len(x)))
    clirat.train_step(args, args.burn_in + 1, net, net, optimizer, *batch)


@functools.cache
def prepare(name, method, arch, batch_size):
    """A training step to call, "plain", "fp32", "amp" or "rest": with a network that costs nothing."""
    _, args = clirat.parse_args(["--method", method, "--arch", arch, *(["--amp"] if name == "amp" else [])])
    net = models.build(arch)
    if name == "rest":
        net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))
    if name != "plain":
        net = net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    x, y = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (batch_size,))
    return partial(plain_step if name == "plain" else our_step, args, net, optimizer, x, y)


def time_of(run, *arguments):
    begun = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begun


def time_step(*case):
    return time_of(prepare(*case))


def main(arch, batch_size, rounds, *methods):
    batch_size, pool = int(batch_size), multiprocessing.get_context("spawn").Pool(1)
    clirat.keep_freed_memory()
    matrices = [torch.randn(2048, 2048).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    for method in methods or ["clirat"]:
        case = method, arch, batch_size
        work = {"plain": partial(pool.apply, time_step, ("plain", *case))}
        work |= {name: partial(time_step, name, *case) for name in ("fp32", "amp", "rest")}
        net = models.build(arch).to(memory_format=torch.channels_last)
        work["folding"] = partial(time_of, models.folded, net)
        work |= {
            name: partial(time_of, torch.mm, a, a)
            for name, a in zip(("fp32 matmul", "bf16 matmul"), matrices, strict=True)
        }
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.rand(batch_size, 3, 32, 32))
        passes = 20 + (3 if clirat.METHODS[method].loss == "at" else 7)  # PGD-10 and training, in forwards
        flop = {"step": counter.get_total_flops() * passes, "matmul": 2 * 2048**3}

        seconds = {name: [] for name in work}
        for _ in range(1 + int(rounds)):
            for name, run in work.items():
                seconds[name].append(run())
        s = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first is for warming up
        figures = {"method": method, "arch": arch, "batch_size": batch_size, "rounds": int(rounds)}
        figures |= {f"{name}_ms": round(1000 * t, 1) for name, t in s.items()}
        figures |= {f"{name}_ratio": round(s["plain"] / s[name], 2) for name in ("fp32", "amp")}
        for name, precision in (("fp32", "fp32"), ("amp", "bf16")):
            share = flop["step"] / s[name] / (flop["matmul"] / s[f"{precision} matmul"])
            figures |= {f"{name}_of_matmul_rate": round(share, 2)}
            figures |= {f"{name}_outside_network": round((s["rest"] + s["folding"]) / s[name], 3)}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
