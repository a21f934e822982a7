"""Time a training step of clirat.py against the plain way of doing the same work, in turn.

    python .ci/speed.py --arch resnet18 --batch-size 128 --methods clirat clir-trades

The plain loop is that of the released MAIL code: contiguous float32, parameters that require
gradients during the attack, and for TRADES a natural branch that is computed anew in every PGD
step. One JSON line a method. A column is plain, float32, amp or amp_compile, and its
  _ms                a step, the median over the rounds
  _ratio             how many times faster than the plain loop
  _of_product_rate   its share of this device's rate of matrix products in that precision
  _full_run_hours    120 epochs of 50,000 images
  _peak_gb           device memory that it took, warm-up and cache included; on CUDA only
"""

import argparse
import gc
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clirat
import models

# the precisions of a step, as options of clirat.py
OPTIONS = {"plain": "", "float32": "", "amp": "--amp", "amp_compile": "--amp --compile"}


def settings(tf32=True, deterministic=False):
    """Those of clirat.py, or others."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def plain_epoch(args, net, optimizer, x_train, y_train):
    loss_name = clirat.METHODS[args.method].loss
    net.train()
    for x, y in zip(x_train.split(args.batch_size), y_train.split(args.batch_size), strict=True):
        x = clirat.augment(x).contiguous()
        net.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(args.steps):
            x_adv.requires_grad_()
            if loss_name == "trades":
                natural, adversarial = net(x).softmax(1), net(x_adv).log_softmax(1)
                loss = F.kl_div(adversarial, natural, reduction="sum")
            else:
                loss = F.cross_entropy(net(x_adv), y)
            (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + args.step_size * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - args.eps), x + args.eps).clamp(0, 1)
        net.train()
        natural = None if loss_name == "at" else net(x)
        adversarial = net(x_adv)
        margins = clirat.cl_pm(adversarial.detach().softmax(1), y)
        weights = clirat.instance_weights(margins, args.gamma or 0, args.beta or 0)
        if loss_name == "at":
            loss = clirat.at_loss(adversarial, y, weights)
        else:
            function = clirat.trades_loss if loss_name == "trades" else clirat.mart_loss
            loss = function(natural, adversarial, y, args.trade_off, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def attack_of(args, net):
    """The attack of `clirat.train`."""
    options = {"eps": args.eps, "step_size": args.step_size, "steps": args.steps}
    options["loss"] = "kl" if clirat.METHODS[args.method].loss == "trades" else "ce"
    return clirat.fast_pgd(net, torch.bfloat16 if args.amp else None, args.compile, **options)


def plain_attack_of(args, net):
    """The same attack, neither compiled nor recorded."""
    with mock.patch.object(models, "graphed", lambda function, device: function):
        return attack_of(argparse.Namespace(**vars(args) | {"compile": False}), net)


def prepare(options, data, device):
    """args, network, optimizer, attack, x_train, y_train of a run with these options."""
    args = clirat.parse_args(options)
    (x, y, *_), net, optimizer, _ = clirat.setup(args, torch.device(device), data, None)
    return args, net, optimizer, attack_of(args, net), x, y


def images(n):
    """n random images of CIFAR-10's size and labels, in the form of `clirat.load_data`."""
    x, y = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8), torch.arange(n) % 10
    return x, y, x, y


def training(column, method, arch, batch_size, block, device):
    """A function that trains for `block` steps past the burn-in."""
    options = ["--method", method, "--arch", arch, "--batch-size", str(batch_size)]
    data = images(block * batch_size)
    args, net, optimizer, attack, x, y = prepare([*options, *OPTIONS[column].split()], data, device)
    if column == "plain":
        net.to(memory_format=torch.contiguous_format)
        return partial(plain_epoch, args, net, optimizer, x, y)
    return partial(clirat.train_epoch, args, args.burn_in + 1, net, attack, optimizer, x, y)


def outcome(args, net, optimizer, attack, x, y):
    """(the log's row, the network as one vector) of an epoch past the burn-in, from one seed."""
    torch.manual_seed(0)
    row = clirat.train_epoch(args, args.burn_in + 1, net, attack, optimizer, x, y)
    return row, torch.cat([t.double().flatten() for t in net.state_dict().values()])


def apart(ours, theirs):
    """How far two of `outcome` are from each other: in the loss, the weights, the parameters."""
    (row, state), (other, plain) = ours, theirs
    gaps = {name: abs(row[name] - other[name]) for name in row}
    weights = max(gap for name, gap in gaps.items() if name.startswith("weight"))
    return gaps["loss"], weights, ((state - plain).norm() / plain.norm()).item()


def seconds(run, device):
    wait = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    wait()
    begun = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - begun


def in_turn(work, rounds, device):
    """{name: median seconds of a call} of functions {name: function}, called in turn."""
    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def with_peak(run, device):
    """(what run() returns, GB of device memory that it took: 0 on a CPU)."""
    if device == "cpu":
        return run(), 0.0
    gc.collect()  # what is left of others holds graphs
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    return run(), (torch.cuda.max_memory_reserved() - before) / 2**30


def measure(method, arch, batch_size, columns, rounds, block, device):
    """(the figures of a method, the columns' functions, each of `block` steps)."""
    work, figures = {}, {"method": method, "arch": arch, "batch_size": batch_size}

    def warmed(column):  # recording, compilation, cuDNN's choices
        run = training(column, method, arch, batch_size, block, device)
        run()
        return run

    for column in columns:
        work[column], peak = with_peak(partial(warmed, column), device)
        if device != "cpu":
            figures[f"{column}_peak_gb"] = round(peak, 2)
    side, products = (512, 1) if device == "cpu" else (8192, 10)  # a bfloat16 CPU can be slow
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(side, side, device=device).to(dtype)
        work[dtype] = lambda a=a: [a @ a for _ in range(products)]
        work[dtype]()

    median = in_turn(work, rounds, device)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        models.build(arch)(torch.empty(batch_size, 3, 32, 32))
    # in forwards: PGD-10 is 20, and a backward for x and the weights 2
    passes = {"at": 23, "trades": 27, "mart": 26}[clirat.METHODS[method].loss]
    figures["tflop"] = counter.get_total_flops() * passes / 1e12
    for column in columns:
        step = median[column] / block
        figures[f"{column}_ms"] = 1000 * step
        if "plain" in columns:
            figures[f"{column}_ratio"] = median["plain"] / median[column]
        product = median[torch.bfloat16 if "amp" in column else torch.float32]
        rate = products * 2 * side**3 / 1e12 / product
        figures[f"{column}_of_product_rate"] = figures["tflop"] / step / rate
        figures[f"{column}_full_run_hours"] = step * 120 * math.ceil(50_000 / batch_size) / 3600
    return figures, {column: work[column] for column in columns}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = partial(parser.add_argument, help="(default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--methods", nargs="+", choices=clirat.METHODS, default=["clirat"])
    add("--arch", type=str, default="resnet18")
    add("--batch-size", type=int, default=128)
    add("--rounds", type=int, default=5)
    add("--device", type=str, choices=["cpu", "cuda"], default=device)
    parser.add_argument("--block", type=int, help="steps a round (default: 20 on CUDA, else 1)")
    parser.add_argument("--compile", action="store_true", help="amp_compile too; on CUDA always")
    args = parser.parse_args(argv)
    cuda = args.device == "cuda"
    settings()
    columns = [c for c in OPTIONS if c != "amp_compile" or args.compile or cuda]
    block = args.block or (20 if cuda else 1)
    for method in args.methods:
        case = method, args.arch, args.batch_size, columns, args.rounds, block, args.device
        figures, _ = measure(*case)
        figures = {k: float(f"{v:.4g}") if type(v) is float else v for k, v in figures.items()}
        name = torch.cuda.get_device_name() if cuda else "cpu"
        print(json.dumps(figures | {"device": name, "torch": torch.__version__}), flush=True)


if __name__ == "__main__":
    main()
