"""AutoAttack of eval_attacks.py against pyautoattack, in turn: verdicts, seconds.

    python .ci/peer.py CKPT DATA [--n 200] [--batch-size 64] [--amp]

Needs `pip install pyautoattack`, whose numerics are the official release's. Both attack the first N
test images at eps 8/255 with seed 0; ours through `evaluate`, as the command line does.
"""

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import clirat
import eval_attacks
import models


def compare(model, x, y, batch_size, amp=False, eps=8 / 255):
    """Images that differ in their verdict, robust images after each of our stages, seconds.

    x: uint8 images (N, C, H, W). Returns (int, {stage: int}, ours, theirs).
    """
    from pyautoattack import AutoAttack

    begun = time.perf_counter()
    peer = AutoAttack(model, device=x.device, norm="Linf", eps=eps, version="standard", seed=0)
    x_adv = peer.run_standard_evaluation(x / 255, y, batch_size=len(x))
    x_adv = x_adv[0] if isinstance(x_adv, tuple) else x_adv
    with torch.no_grad():
        theirs_robust = (model(x_adv).argmax(1) == y).cpu()
    theirs = time.perf_counter() - begun

    begun = time.perf_counter()
    verdicts = eval_attacks.evaluate(model, x, y, ["aa"], eps=eps, batch_size=batch_size, amp=amp)
    ours = time.perf_counter() - begun
    robust = eval_attacks.robust_in(verdicts, "aa")
    left = {stage: int((verdict == 0).sum()) for stage, verdict in verdicts.items()}
    return int((robust != theirs_robust).sum()), left, ours, theirs


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = models.load(args.checkpoint)
    x, y = (t[: args.n].to(device) for t in clirat.load_data(args.data, ["test"]))
    model = model.to(device)
    differ, left, ours, theirs = compare(model, x, y, args.batch_size, args.amp)
    print(f"{differ} of {len(x)} verdicts differ; ours still robust after each stage: {left}")
    print(f"ours {ours:.1f} s, pyautoattack {theirs:.1f} s, {theirs / ours:.2f} x")


if __name__ == "__main__":
    main()
