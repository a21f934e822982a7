"""Train methods, evaluate them and print their table: the paper's, as far as time allows.

    python .paper/study.py --seeds 1 2 3 --out runs -- --amp --compile    Table 1's AT rows

Of each seed and loss the first method is trained from the start and the others from its burnin.pt;
then come NAT, PGD-20 and CW on --n test images, AutoAttack on --n-aa, and PGD-100 and APGD-CE on
--n-long, in float32, or in bfloat16 if --amp is among clirat.py's options. The same command goes on
where it was stopped. Exit status 1 while something is missing.
"""

import argparse
import csv
import datetime
import math
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import clirat
import eval_attacks
import models
import table
from clirat import METHODS, number

FOR_TRAINING = 0.85  # of --seconds; the rest is for evaluation
SHORTEST = 15  # seconds; a part is not started for less
# forward and backward passes an image, in order of value; AutoAttack's depend on the network: about
PASSES = {"nat": 1, "pgd20": 20, "cw": 20, "aa": 1000, "pgd100": 100, "apgd": 100}
# settings in which the runs of a study may differ
OWN = table.ALIKE | table.WEIGHTING | {"trade_off", "data", "digest"}


def parse_args(argv):
    parser = argparse.ArgumentParser("study.py", "%(prog)s [options] [-- options of clirat.py]")
    parser.description = (__doc__ or "").partition("\n")[0]
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add, count, usual = parser.add_argument, number(int, 1), ["at", "mail-at", "clirat"]
    add("--methods", nargs="+", choices=METHODS, default=usual, metavar="M", help=" ".join(METHODS))
    add("--seeds", nargs="+", type=number(int, 0), default=[1], metavar="S", help="a run for each")
    add("--epochs", type=count, default=120, help="of each training")
    add("--arch", default="resnet18", help="resnet18 or wrn-D-K, such as wrn-32-10")
    add("--data", default="data", help="folder of CIFAR-10, FILE.npz or toy")
    add("--n", type=count, default=10_000, help="test images for NAT, PGD-20, CW")
    add("--n-aa", type=count, default=512, help="... for AutoAttack")
    add("--n-long", type=count, default=2000, help="... for PGD-100, APGD-CE")
    add("--seconds", type=number(float, 0), default=math.inf, help="for all of it")
    add("--out", type=Path, default="runs", metavar="DIR", help="where the run folders are")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.options = argv[end + 1 :]
    data = clirat.load_data(args.data)
    args.test, digest = data[2:], clirat.digest(*data)
    methods = [method for method in METHODS if method in args.methods]  # unweighted ones first
    # {seed: {method: run folder}}
    args.runs = {s: {m: args.out / f"{m}-{args.arch}-s{s}" for m in methods} for s in args.seeds}
    images = len(args.test[1])
    args.n, args.n_aa, args.n_long = (min(n, images) for n in (args.n, args.n_aa, args.n_long))
    if any(option.startswith("--i") for option in args.options):
        parser.error("leave --init out after --: study.py sets it")
    shared = []
    for folders in args.runs.values():
        for method, folder in folders.items():
            plain = clirat.parse_args(training(args, method, folders, [])[1:])
            now = clirat.parse_args(training(args, method, folders, args.options)[1:])
            # which ends with an error where a run is there with other settings
            for name in "method", "arch", "data", "epochs", "seed", "out", "resume":
                if getattr(now, name) != getattr(plain, name):
                    parser.error(f"leave --{name} out after --: study.py sets it")
            if getattr(now, "digest", digest) != digest:
                parser.error(f"{folder} was started with other data than {args.data}")
            shared.append(table.without(clirat.settings(now), OWN))
            args.each = now
    if names := sorted({k for own in shared for k in own if own[k] != shared[0][k]}):
        parser.error(f"{', '.join(names)}: runs in {args.out} would differ; name those after --")
    return args


def logged(folder):
    """The rows of a run's log.csv, one for each epoch that it has behind it."""
    log = folder / "log.csv"
    return [*csv.DictReader(log.read_text().splitlines())] if log.exists() else []


def training(args, method, folders, options):
    """The command that trains a method, or goes on with it; forks start from the family's first."""
    folder = folders[method]
    command = ["clirat.py", "--method", method, "--arch", args.arch, "--data", args.data]
    command += ["--epochs", str(args.epochs), "--seed", folder.name.rpartition("-s")[2]]
    command += ["--out", str(folder), *options]
    if (folder / "args.json").exists():
        return [*command, "--resume"]
    family = [m for m in folders if "fat" not in (m, method) or m == method]
    first = next(m for m in family if METHODS[m].loss == METHODS[method].loss)
    start, burn_in = folders[first] / "burnin.pt", clirat.parse_args(command[1:]).burn_in
    there = start.exists() or len(logged(folders[first])) < burn_in  # or will be
    if first != method and burn_in < args.epochs and there:
        command += ["--init", str(start)]
    return command


def trained(args, folder):
    return len(logged(folder)) >= args.epochs


def verdict_file(args, folder, n):
    """Where eval_attacks.py keeps a trained run's verdicts on n images."""
    settings = {"n": n, "eps": args.each.eps, "seed": 0, "amp": args.each.amp, "data": args.data}
    settings, path = argparse.Namespace(**settings), folder / "last.pt"
    return eval_attacks.verdict_file(settings, path, *models.load(path), *args.test)[0]


def lacking(args, folder):
    """(attacks, number of images) that a run's evaluation lacks."""
    usual, long = ["nat", "pgd20", "cw"], ["pgd100", "apgd"]
    for attacks, n in (usual, args.n), (["aa"], args.n_aa), (long, args.n_long):
        file = verdict_file(args, folder, n) if trained(args, folder) else None
        done = [name for name, *_ in table.read(file)[1]] if file and file.exists() else []
        if left := [name for name in attacks if name not in done]:
            yield left, n


def announce(args):
    """Say what is to come and, once an epoch of it is through, how long all of it will take."""
    behind, epochs, images, each = {}, [], Counter(), args.each
    for folders in args.runs.values():
        for method, folder in folders.items():
            behind[folder] = len(logged(folder))
            forks = "--init" in training(args, method, folders, args.options)
            start = behind[folder] or (each.burn_in if forks else 0)
            epochs += [args.epochs - start] if start < args.epochs else []
            images.update((*attacks, n) for attacks, n in lacking(args, folder))
    texts = [f"{', '.join(names).upper()} {k} x {n:,}" for (*names, n), k in images.items()]
    precision = "bfloat16" if each.amp else "float32"
    print(f"to come: {len(epochs)} x training, {sum(epochs)} epochs", end="; ")
    print(f"test images in {precision}: {'; '.join(texts) or 'none'}", flush=True)
    passes = sum(PASSES[name] * n * k for (*names, n), k in images.items() for name in names)
    if each.eval_every:  # NAT and PGD-20 while training, and at its end
        checked = sum(epochs) // each.eval_every * each.eval_size + len(epochs) * len(args.test[1])
        passes += 21 * checked
    threading.Thread(target=foretell, args=(args, behind, epochs, passes), daemon=True).start()


def foretell(args, behind, epochs, passes):
    """Wait until a run has more epochs than {run: number} says, then say how long all will take."""
    rows, first = [], int(args.each.compile)  # compiling is slow
    while not rows:
        time.sleep(1)
        rows = [logged(run)[-1] for run, n in behind.items() if len(logged(run)) > n + first]
    seconds, rate = (float(rows[0][name]) for name in ("seconds", "images_per_s"))
    times = sum(epochs) * seconds, passes / (rate * (args.each.steps + 1))
    train, test, both = (datetime.timedelta(seconds=round(t)) for t in (*times, sum(times)))
    print(f"to come: about {both}, {train} of it training, {test} evaluation", flush=True)


def run(command, until):
    """Run one of the programs, to `until` at most. Returns its exit status, None if cut short."""
    left = until - time.monotonic()
    if left < SHORTEST:
        return None
    print(f"\n$ python {shlex.join(command)}", flush=True)
    words = [sys.executable, ROOT / command[0], *command[1:]]
    try:
        return subprocess.run(words, timeout=left if left < math.inf else None).returncode
    except subprocess.TimeoutExpired:  # killed: what it has saved is whole
        print("time is up for this part", flush=True)


def study(args, begun):
    """Do what is left of it, as far as time allows. Returns the exit status."""
    announce(args)
    for folders in args.runs.values():
        parts = {}
        for method, folder in folders.items():
            command = training(args, method, folders, args.options)
            start = command[command.index("--init") + 1] if "--init" in command else None
            if trained(args, folder) or (start and not Path(start).exists()):
                continue  # or its first is not that far
            if run(command, begun + FOR_TRAINING * args.seconds) == 2:
                return 2
        for folder in (folder for folder in folders.values() if trained(args, folder)):
            for attacks, n in lacking(args, folder):
                parts.setdefault((*attacks, n), []).append(str(folder / "last.pt"))
        for part in sorted(parts, key=lambda part: list(PASSES).index(part[0])):
            *attacks, n = part
            command = ["eval_attacks.py", *parts[part], "--attacks", *attacks, "--data", args.data]
            command += ["--n", str(n), "--device", args.each.device, *["--amp"] * args.each.amp]
            command += ["--eps", str(args.each.eps)] if args.each.eps != 8 / 255 else []
            if run(command, begun + args.seconds) == 2:
                return 2
    every = [folder for folders in args.runs.values() for folder in folders.values()]
    numbers = args.n, args.n_aa, args.n_long
    files = {verdict_file(args, f, n) for f in every if trained(args, f) for n in numbers}
    if files := sorted(file for file in files if file.exists()):
        print()
        table.show(table.table([table.read(file) for file in files]))
    status = 0
    for folder in every:
        texts = [f"{', '.join(names).upper()} on {n}" for names, n in lacking(args, folder)]
        if not trained(args, folder):
            texts = [f"training (epoch {len(logged(folder))} of {args.epochs})"]
        if texts:
            status = 1
            print(f"missing in {folder}: {', '.join(texts)}")
    return status


def main(argv=None):
    begun = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return study(parse_args(sys.argv[1:] if argv is None else argv), begun)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from there", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # such as no data, or a damaged file of verdicts
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
