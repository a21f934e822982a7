"""Verdicts of AutoAttack: eval_attacks.py against pyautoattack.

    python .ci/peer.py CKPT DATA [--n 200] [--batch-size 64] [--amp]

Needs `pip install pyautoattack`, whose numerics are the official release's. Both attack the first N
test images at eps 8/255 with seed 0; ours through `evaluate`, as the command line does.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clirat
import eval_attacks
import models


def theirs(model, x, y, eps):
    """Which uint8 images (N, C, H, W) pyautoattack does not fool the model on, (N,) bool."""
    from pyautoattack import AutoAttack

    peer = AutoAttack(model, device=x.device, norm="Linf", eps=eps, version="standard", seed=0)
    x_adv = peer.run_standard_evaluation(x / 255, y, batch_size=min(len(x), 200))
    x_adv = x_adv[0] if isinstance(x_adv, tuple) else x_adv
    with torch.no_grad():
        return (model(x_adv).argmax(1) == y).cpu()


def network_and_images(parser, checkpoint, data, n):
    """A checkpoint's network and the first n test images and their labels, on the GPU if any."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        x, y = (t[:n].to(device) for t in clirat.load_data(data, ["test"]))
        return models.load(checkpoint)[0].to(device), x, y
    except (OSError, ValueError) as error:
        parser.error(str(error))


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=str)
    parser.add_argument("data", type=str)
    parser.add_argument("--n", type=int, default=200, help="images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="ours (default: %(default)s)")
    parser.add_argument("--amp", action="store_true", help="ours in bfloat16")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("auto-attack").setLevel(logging.DEBUG)  # the peer says what each stage leaves
    torch.backends.cudnn.allow_tf32 = False
    case, eps = network_and_images(parser, args.checkpoint, args.data, args.n), 8 / 255
    expected = theirs(*case, eps)
    options = {"eps": eps, "batch_size": args.batch_size, "amp": args.amp}
    verdicts = eval_attacks.evaluate(*case, ["aa"], **options)
    left = {stage: int((verdict == 0).sum()) for stage, verdict in verdicts.items()}
    differ = (eval_attacks.robust_in(verdicts, "aa") != expected).sum()
    print(f"{differ} of {args.n} verdicts differ; ours still robust after each stage: {left}")


if __name__ == "__main__":
    main()
