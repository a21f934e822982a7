"""Time a training step of clirat.py against the plain way of doing the same work, in turn, in one run.

    python .ci/speed.py ARCH BATCH_SIZE ROUNDS [METHOD ...]

The plain loop is that of the released base code: contiguous float32, parameters that require gradients during the
attack, and for TRADES a natural branch that is computed anew in every PGD step. One JSON line a method: medians in
milliseconds, ratios of the medians, and what share of this machine's matrix-product rate the steps reach.
"""

import json
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


def matmul_rate(dtype, size=2048):
    a = torch.randn(size, size).to(dtype)
    begun = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * size**3 / (time.perf_counter() - begun)


def main(arch, batch_size, rounds, *methods):
    batch_size, rounds = int(batch_size), int(rounds)
    x, y = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (batch_size,))
    for method in methods or ["clirat"]:
        steps = {}
        for name in ("plain", "fp32", "amp"):
            words = ["--method", method, "--arch", arch, *(["--amp"] if name == "amp" else [])]
            _, args = clirat.parse_args(words)
            net = models.build(arch).train()
            if name != "plain":
                net = net.to(memory_format=torch.channels_last)
            optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
            step = plain_step if name == "plain" else our_step
            steps[name] = partial(step, args, net, optimizer, x, y)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(clirat.to_input(x))
        flop = counter.get_total_flops() * (2 * args.steps + (3 if clirat.METHODS[method].loss == "at" else 7))

        times, rates = {name: [] for name in steps}, {torch.float32: [], torch.bfloat16: []}
        for turn in range(-1, rounds):  # the first is for warming up
            for name, step in steps.items():
                begun = time.perf_counter()
                step()
                if turn >= 0:
                    times[name].append(1000 * (time.perf_counter() - begun))
            for dtype, rate in rates.items():
                rate.append(matmul_rate(dtype))
        ms = {name: statistics.median(t) for name, t in times.items()}
        fp32, bf16 = (statistics.median(rate) for rate in rates.values())
        figures = {"method": method, "arch": arch, "batch_size": batch_size, "rounds": rounds}
        figures |= {f"{name}_ms": round(t, 1) for name, t in ms.items()}
        figures |= {f"{name}_ratio": round(ms["plain"] / ms[name], 2) for name in ("fp32", "amp")}
        figures |= {"matmul_fp32_gflop_per_s": round(fp32 / 1e9), "matmul_bf16_gflop_per_s": round(bf16 / 1e9)}
        figures |= {"fp32_share": round(1000 * flop / ms["fp32"] / fp32, 2)}
        figures |= {"amp_share": round(1000 * flop / ms["amp"] / bf16, 2)}
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
