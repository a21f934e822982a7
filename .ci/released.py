"""A training step of clirat.py against the code that MAIL's authors released: loss, gradient.

    git clone https://github.com/QizhouWang/MAIL ../MAIL
    python .ci/released.py ../MAIL CKPT DATA

The paper builds on MAIL, whose code holds AT, TRADES and MART too. Ours is `train_step` with
`--weight-norm mail`, in float64. Both take the first 64 test images and the same noise; pixels are
kept off 0 and 1, since that code does not clamp PGD's start.
"""

import argparse
import copy
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clirat
import models

METHODS = "at", "trades", "mart", "mail-at", "mail-trades", "mail-mart"


def theirs(args, net, x, y):
    """Loss and gradient (P,) of the released code, on images x (N, C, H, W) in [0, 1]."""
    from at_loss import at_loss
    from mail_loss import mail_loss

    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    options = {"step_size": args.step_size, "epsilon": args.eps, "perturb_steps": args.steps}
    options |= {"beta": args.trade_off or 0, "method": args.method}
    torch.manual_seed(0)
    if args.method.startswith("mail"):
        loss = mail_loss(net, x, y, optimizer, bias=args.beta, slope=args.gamma, **options)
    else:
        loss = at_loss(net, x, y, optimizer, **options)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])


def ours(args, net, x, y):
    """Loss and gradient (P,) of Algorithm 1: what an optimiser of rate 1 takes off."""
    optimizer, attack = torch.optim.SGD(net.parameters(), 1.0), clirat.inner_attack(args, net)
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.manual_seed(0)
    loss, *_ = clirat.train_step(args, args.epochs, net.train(), attack, optimizer, x, y)
    after = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return loss.item(), before - after


def main(argv=None):
    parser = argparse.ArgumentParser("released.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mail", type=Path, help="folder of the released code")
    parser.add_argument("checkpoint")
    parser.add_argument("data")
    given = parser.parse_args(argv)
    for name in "at_loss.py", "mail_loss.py":
        if not (given.mail / name).is_file():
            where = f"git clone https://github.com/QizhouWang/MAIL {given.mail}"
            parser.error(f"no {name} in {given.mail}: {where}")
    try:
        x, y = (t[:64] for t in clirat.load_data(given.data, ["test"]))
        network, _ = models.load(given.checkpoint)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.path.insert(0, str(given.mail))
    torch.Tensor.cuda = lambda tensor: tensor  # which that code calls
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore", "size_average")
    x = x.clamp(6, 249).double() / 255
    for method in METHODS:
        args = clirat.parse_args(["--method", method, "--weight-norm", "mail"])
        results = []
        for step in theirs, ours:
            results.append(step(args, copy.deepcopy(network).double(), x, y))
        (loss, grad), (our_loss, our_grad) = results
        apart = (our_grad - grad).norm() / grad.norm()
        print(f"{method}: loss {loss:.8f}, ours {our_loss:.8f}, gradients {apart:.1e} apart")


if __name__ == "__main__":
    main()
