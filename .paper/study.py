"""Train methods, evaluate them and print their table: the paper's, as far as time allows.

    python .paper/study.py --seeds 1 2 3 --out runs -- --amp --compile    Table 1's AT rows

Of each seed and loss the first method is trained from the start and the others from its burnin.pt;
then come NAT, PGD-20 and CW on --n test images, AutoAttack in bfloat16 on --n-aa, and PGD-100 and
APGD-CE on --n-long, in bfloat16 if --amp is among the training's options. The same command goes on
where it was stopped. Exit status 1 while something is missing.
"""

import argparse
import csv
import fcntl
import math
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
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
GRACE = 5  # seconds between SIGINT, at which a program keeps what it has, and SIGKILL


def parse_args(argv):
    parser = argparse.ArgumentParser("study.py", "%(prog)s [options] [-- options of clirat.py]")
    parser.description = (__doc__ or "").partition("\n")[0]
    add, count = parser.add_argument, number(int, 1)
    add("--methods", nargs="+", choices=METHODS, default=["at", "mail-at", "clirat"], metavar="M")
    add("--seeds", nargs="+", type=number(int, 0), default=[1], metavar="S")
    add("--epochs", type=count, default=120)
    add("--arch", default="resnet18")
    add("--data", default="data", help="folder of CIFAR-10, FILE.npz or toy")
    add("--n", type=count, default=10_000, help="test images for NAT, PGD-20, CW")
    add("--n-long", type=count, default=2000, help="... for PGD-100, APGD-CE")
    add("--n-aa", type=count, default=512, help="... for AutoAttack")
    add("--seconds", type=number(float, 0), default=math.inf, help="for all of it")
    add("--out", type=Path, required=True, metavar="DIR", help="where the run folders are")
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.options = argv[end + 1 :]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        args.test = clirat.load_data(args.data, ["test"])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.methods = [method for method in METHODS if method in args.methods]  # unweighted ones first
    images = len(args.test[1])
    args.n, args.n_long, args.n_aa = (min(n, images) for n in (args.n, args.n_long, args.n_aa))
    for seed in args.seeds:
        folders = folders_of(args, seed)
        starts = [str(folder / "burnin.pt") for folder in folders.values()]
        for method in folders:
            plain = clirat.parse_args(training(args, method, folders, [])[1:])
            now = clirat.parse_args(training(args, method, folders, args.options)[1:])
            # which ends with an error where a run is there with other settings
            for name in "method", "arch", "data", "epochs", "seed", "out", "resume":
                if getattr(now, name) != getattr(plain, name):
                    parser.error(f"leave --{name} out after --: study.py sets it")
            if not now.resume and now.init not in (None, *starts):
                parser.error("leave --init out after --: study.py sets it")
            args.eps, args.amp = now.eps, now.amp
            args.device = now.device if now.device != plain.device else None
    return args


def folders_of(args, seed):
    """{method: run folder}."""
    return {method: args.out / f"{method}-{args.arch}-s{seed}" for method in args.methods}


def lock(folder, deadline):
    """Wait until no other study, nor a program that a killed one left behind, works in folder."""
    file = open(folder / ".study.lock", "w")  # noqa: SIM115  held, by the programs too, to the end
    said = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if not said:
                print(f"waiting: another study, or what one left, is at work in {folder}")
            said = True
        if time.monotonic() > deadline:
            return None
        time.sleep(0.5)


def run(command, until, held):
    """Run one of the programs, its output shown, to `until` at most. Returns its exit status."""
    left = until - time.monotonic()
    if left < SHORTEST:
        return None
    print(f"\n$ python {shlex.join(command)}", flush=True)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is deaf
    words = [sys.executable, ROOT / command[0], *command[1:]]
    process = subprocess.Popen(words, pass_fds=[held.fileno()], preexec_fn=heard)
    try:
        return process.wait(left - GRACE if left < math.inf else None)
    except subprocess.TimeoutExpired:
        print("time is up for this part", flush=True)
    finally:  # Ctrl-C comes here as well
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.wait()


def epochs_of(folder):
    """How many epochs a run has behind it."""
    if not (folder / "log.csv").exists():
        return 0
    with open(folder / "log.csv", newline="") as file:
        return max((int(row.get("epoch") or 0) for row in csv.DictReader(file)), default=0)


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
    forks = 0 < clirat.parse_args(command[1:]).burn_in < args.epochs
    if first != method and forks:
        command += ["--init", str(folders[first] / "burnin.pt")]
    return command


def parts(args, folder):
    """(attacks, n, amp, verdict file) of each part of a run's evaluation, in order of value."""
    model, metadata = models.load(folder / "last.pt")
    for attacks, n, amp in (
        (["nat", "pgd20", "cw"], args.n, args.amp),
        (["aa"], args.n_aa, True),
        (["pgd100", "apgd"], args.n_long, args.amp),
    ):
        asked = argparse.Namespace(n=n, eps=args.eps, seed=0, amp=amp, data=args.data)
        path = folder / "last.pt"
        file, _ = eval_attacks.verdict_file(asked, path, model, metadata, *args.test)
        yield attacks, n, amp, file


def lacking(attacks, file):
    """Which of the attacks are not through in a verdict file."""
    done = [name for name, _, _ in table.read(file)[1]] if file.exists() else []
    return [name for name in attacks if name not in done]


def missing(args, folder):
    """What of a run is not there yet: its training, or attacks on it, as text."""
    if (epochs := epochs_of(folder)) < args.epochs:
        return [f"training (epoch {epochs} of {args.epochs})"]
    return [
        f"{name.upper()} on {n}"
        for attacks, n, _, file in parts(args, folder)
        for name in lacking(attacks, file)
    ]


def study(args, deadline, held):
    every = []
    spare = (1 - FOR_TRAINING) * args.seconds if args.seconds < math.inf else 0
    for seed in args.seeds:
        folders = folders_of(args, seed)
        for method, folder in folders.items():
            if epochs_of(folder) < args.epochs:
                command = training(args, method, folders, args.options)
                init = command[command.index("--init") + 1] if "--init" in command else None
                if init and not Path(init).exists():
                    continue  # its first is not that far
                if run(command, deadline - spare, held) == 2:
                    return 2
        trained = [f for f in folders.values() if epochs_of(f) >= args.epochs]
        every += trained
        for same in zip(*(parts(args, folder) for folder in trained), strict=True):
            attacks, n, amp, _ = same[0]
            left = [f for f, part in zip(trained, same, strict=True) if lacking(attacks, part[3])]
            if left:
                command = ["eval_attacks.py", *(str(f / "last.pt") for f in left)]
                command += ["--attacks", *attacks, "--data", args.data, "--n", str(n)]
                command += ["--eps", str(args.eps)] if args.eps != 8 / 255 else []
                command += ["--device", args.device] if args.device else []
                if run([*command, *["--amp"] * amp], deadline, held) == 2:
                    return 2
        files = {part[3] for folder in every for part in parts(args, folder)}
        if files := sorted(file for file in files if file.exists()):
            print()
            table.show(table.table([table.read(file) for file in files]))
    status = 0
    for folder in (f for seed in args.seeds for f in folders_of(args, seed).values()):
        if texts := missing(args, folder):
            status = 1
            print(f"missing in {folder}: {', '.join(texts)}")
    return status


def main(argv=None):
    begun = time.monotonic()
    args = parse_args(sys.argv[1:] if argv is None else argv)
    deadline = begun + args.seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        held = lock(args.out, deadline)
        return study(args, deadline, held) if held else 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on from there", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:  # such as a damaged file of verdicts
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
