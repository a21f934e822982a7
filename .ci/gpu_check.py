"""Check what only a GPU can show: on an H100 in 4 minutes, or 9 for all parts.

    python .ci/gpu_check.py [--data FILE.npz] [--seconds 900] [--parts autoattack tests]

The parts run one after another, the most valuable first, in a process that is replaced where one
fails or takes too long. Rows come as they are found and once more as a table; exit status 1 where
one is off or slow. --device cpu runs small sizes of it all, to try this file without a GPU.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import importlib.util
import io
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import speed  # beside this file; it makes clirat importable
import torch

import clirat

ROOT = Path(clirat.__file__).parent
TOY = ["--data", "toy", "--arch", "wrn-10-1", "--steps", "2"]
# milliseconds of a step on an H100, batches of 128: a tenth above those first measured
MOST = {"resnet18 float32": 35, "resnet18 amp": 21.5, "resnet18 amp_compile": 19}


def judge(good, bad="off"):
    return "ok" if good else bad


def load(options, n_train, n_test=500):
    """(x_train, y_train, x_test, y_test) of --data, or ten close colours under noise, 32 x 32."""
    if options.data:
        data = clirat.load_data(options.data)
    else:
        arrays = clirat.toy_data(n_train, n_test, size=32)
        data = [torch.from_numpy(a.transpose(0, 3, 1, 2) if a.ndim == 4 else a) for a in arrays]
    return [t[:n] for t, n in zip(data, (n_train, n_train, n_test, n_test), strict=True)]


# ---- Parts: each yields rows (name, finding, state) ----------------------------------------------


def trained(options, command, data, which):
    """One epoch past the burn-in with the attack recorded, plain, or both.

    Returns what `speed.outcome` does, and for "both" the mean share of pixels in which the two
    attacks differ; training goes on with the recorded one.
    """
    args, net, optimizer, recorded, x, y = speed.prepare(command.split(), data, options.device)
    plain = speed.plain_attack_of(args, net)
    differ = [torch.zeros((), dtype=torch.float64, device=x.device)]

    def both(*inputs):
        x_adv, kappa = recorded(*inputs)
        differ.append((x_adv != plain(*inputs)[0]).double().mean())
        return x_adv, kappa

    attack = {"recorded": recorded, "plain": plain, "both": both}[which]
    found = speed.outcome(args, net, optimizer, attack, x, y)
    return found, sum(differ).item() / max(len(differ) - 1, 1)


def graph(options):
    """20 steps with the graph and without, from one seed."""
    speed.settings(tf32=False, deterministic=True)
    size, steps = (8, 3) if options.device == "cpu" else (64, 20)
    data = load(options, steps * size - size // 2 + 1, 50)  # the last batch is smaller
    precisions = ("", "--amp")
    cases = [(method, "wrn-10-1 --steps 5", p) for method in clirat.METHODS for p in precisions]
    if options.device == "cuda":
        cases += [("clirat", "resnet18", precision) for precision in precisions]
        cases += [("clirat", "wrn-10-1 --steps 5", "--amp --compile")]
    for method, arch, precision in cases:
        command = f"--method {method} --arch {arch} --batch-size {size} --lr 0.01 {precision}"
        ours, pixels = trained(options, command, data, "both")
        plain, _ = trained(options, command, data, "plain")
        loss, weight, distance = speed.apart(ours, plain)
        # Another order of summation turns signs of the gradient: in float32 for 2% of the pixels
        # (KL: 20%), in bfloat16 for 30% (KL: 60%). Weights that are a step old turn 65%.
        if precision:
            kl = clirat.METHODS[method].loss == "trades"
            good = distance < 2e-2 and (kl or pixels < 0.45)
        else:
            good = max(loss, weight, distance) <= 1e-4 and pixels < 0.3
        found = f"loss {loss:.0e}, weights {weight:.0e}, parameters {distance:.0e} apart; "
        found += f"{100 * pixels:.1f}% of the pixels differ"
        yield f"{method} {arch.split()[0]} {precision}", found, judge(good)


WARM = {}  # functions that train, by column: `profile` goes on with the last


def timing(options, arch, columns, rounds, block):
    speed.settings()
    WARM.clear()
    case = (arch, 128, columns, rounds, block)
    if options.device == "cpu":
        case = ("wrn-10-1", 8, ["plain", "float32", "amp"], 1, 1)
    figures, work = speed.measure("clirat", *case, options.device)
    WARM.update(work)
    h100 = options.device == "cuda" and "H100" in torch.cuda.get_device_name()
    for column in case[2]:
        ms, share = figures[f"{column}_ms"], figures[f"{column}_of_product_rate"]
        found = f"{ms:.1f} ms, {100 * share:.0f}% of the product rate"
        found += f", {figures[f'{column}_peak_gb']} GB" if options.device == "cuda" else ""
        good = ms <= MOST.get(f"{arch} {column}", math.inf)
        if ratio := figures.get(f"{column}_ratio"):
            found += f", {ratio:.2f} x plain"
            good &= column != "amp_compile" or ratio >= 4
        yield f"{case[0]} {column}", found, judge(good, "slow") if h100 else ""


def profile(options):
    """Where the device's time goes in two steps of what was timed last."""
    if not WARM:
        list(timing(options, "resnet18", ["amp_compile"], 1, 2))
    column, run = list(WARM.items())[-1]
    *first, x, y = run.args
    two = 2 * first[0].batch_size
    with torch.profiler.profile() as recorded:
        run.func(*first, x[:two], y[:two])
    kinds = {"elementwise": r"triton|elementwise|multi_tensor|bn_|batch_?norm"}
    kinds["convolutions"] = r"conv(?!ert)|gemm|xmma|cutlass|nvjet|[dw]grad|fprop|winograd"
    kernels, sums = [], dict.fromkeys([*kinds, "rest"], 0)
    cuda = torch.autograd.DeviceType.CUDA
    for event in recorded.key_averages():
        spent = event.self_cpu_time_total
        if options.device == "cuda":  # kernels, not the CPU's share nor named ranges
            own = event.device_type == cuda and not event.is_user_annotation
            spent = own * event.self_device_time_total
        kernels.append((spent, event.count, event.key[:90]))
        kind = next((k for k, v in kinds.items() if re.search(v, event.key.lower())), "rest")
        sums[kind] += spent
    total = sum(sums.values()) or 1
    for spent, count, name in sorted(kernels, reverse=True)[:12]:
        print(f"    {100 * spent / total:5.1f}%  {count:6d} x  {name}", flush=True)
    shares = ", ".join(f"{kind} {100 * spent / total:.0f}%" for kind, spent in sums.items())
    yield f"two steps of {column}", f"{total / 2000:.1f} ms each: {shares}", ""


def no_wait(options):
    """Nothing waits for the device between the first attack of an epoch and its end."""
    if options.device == "cpu":
        yield "", "needs CUDA", ""
        return
    speed.settings()
    data = load(options, 160, 50)
    commands = ["clirat", "clirat --amp", "clir-trades", "mail-mart --exclude multi", "gairat"]
    for command in [*commands, "fat", "clir-mart --exclude single --weight-norm mail"]:
        words = f"--method {command} --arch wrn-10-1 --batch-size 64".split()
        args, net, optimizer, attack, x, y = speed.prepare(words, data, options.device)

        def strict(*inputs, attack=attack):
            torch.cuda.set_sync_debug_mode("error")
            return attack(*inputs)

        def gather(t):  # of all examples (N, 3): the log, after the last step, may wait
            torch.cuda.set_sync_debug_mode("default" if t.ndim == 2 else "error")
            return t

        try:
            for function in (attack, strict):  # the first epoch records
                with mock.patch.object(
                    clirat, "gather", gather if function is strict else clirat.gather
                ):
                    clirat.train_epoch(args, args.burn_in + 1, net, function, optimizer, x, y)
            yield command, "no wait", "ok"
        except RuntimeError as error:
            yield command, str(error).splitlines()[0], "off"
        finally:
            torch.cuda.set_sync_debug_mode("default")


def log_of(out):
    with open(Path(out, "log.csv")) as file:
        return list(csv.DictReader(file))


def run_here(options, words):
    """The log of `clirat.main` in this process."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        clirat.main([*TOY, *words.split(), "--device", options.device, "--out", out])
        return log_of(out)


def schedule(options):
    """Neither a learning-rate drop nor the end of the burn-in needs a new recording."""
    with mock.patch.object(torch.cuda, "graph", wraps=torch.cuda.graph) as graph:
        log = run_here(options, "--train-size 300 --epochs 8 --eval-size 128 --lr 0.1")
    # batches of 128 and 44 in training, of 128 and, at the end, 500 - 3 * 128 in evaluation
    wanted = 4 if options.device == "cuda" else 0
    good = graph.call_count == wanted
    yield "recordings", f"{graph.call_count} in 8 epochs, wanted {wanted}", judge(good)
    rates = [float(row["lr"]) for row in log]
    good = rates == [0.1] * 5 + [0.01] + [0.001] * 2
    yield "learning rates", " ".join(map(str, rates)), judge(good)


def exclude(options):
    for group in ("single", "multi"):
        for norm in ("batch", "mail"):
            words = f"--exclude {group} --weight-norm {norm}"
            run = f"{words} --epochs 3 --burn-in 1 --train-size 300 --eval-every 0"
            log = run_here(options, run)
            finite = all(math.isfinite(float(v)) for row in log for v in row.values() if v)
            dropped = max(float(row[f"weight_{group}_cl"]) for row in log[1:])
            good = len(log) == 3 and finite and dropped == 0
            yield words, f"finite: {finite}, weight of the dropped: {dropped:g}", judge(good)


def fingerprints(options):
    """Hashes of a network after five steps, for each way of choosing cuDNN's algorithms."""
    size, arch = (8, "wrn-10-1") if options.device == "cpu" else (128, "resnet18")
    data, hashes = load(options, 5 * size, 50), []
    for deterministic in (False, True):
        speed.settings(deterministic=deterministic)
        for precision in ("", "--amp"):
            command = f"--arch {arch} --batch-size {size} {precision}"
            (_, state), _ = trained(options, command, data, "recorded")
            hashes.append(hashlib.sha256(state.cpu().numpy().tobytes()).hexdigest())
    return hashes


def deterministic(options):
    """Does cuDNN without benchmarking make two processes equal, and what does it cost?"""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        first, second = pool.map(fingerprints, [options] * 2)
    equal = iter([a == b for a, b in zip(first, second, strict=True)])
    case = ("resnet18", 128, ["float32", "amp"], 3, 20)
    if options.device == "cpu":
        case = ("wrn-10-1", 8, ["float32", "amp"], 1, 1)
    for name in ("benchmark", "deterministic"):
        speed.settings(deterministic=name == "deterministic")
        figures, _ = speed.measure("clirat", *case, options.device)
        for column in case[2]:
            found = f"{figures[f'{column}_ms']:.1f} ms, two processes equal: {next(equal)}"
            yield f"{name} {column}", found, ""


def start(options, out, *words, module=()):
    command = [sys.executable, *module, str(ROOT / "clirat.py"), *TOY, *words, "--epochs", "4"]
    command += ["--device", options.device, "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes)


def resume(options):
    """A run that is killed after its second epoch and resumed, beside one that is not."""
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        start(options, straight).communicate()
        process = start(options, killed)
        for line in process.stdout:
            if line.startswith("epoch 2,"):
                process.kill()
        process.wait()
        process = start(options, killed, "--resume")
        output, _ = process.communicate()
        a, b = log_of(straight), log_of(killed)
    for row in a + b:
        del row["seconds"], row["images_per_s"]
    good = process.returncode == 0 and [row["epoch"] for row in b] == list("1234")
    yield "killed and resumed", output.strip().splitlines()[-2], judge(good)
    yield "the log of a run not killed", "equal bit for bit" if a == b else "not equal", ""


def torchrun(options):
    module = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    with tempfile.TemporaryDirectory() as out:
        process = start(options, out, "--train-size", "300", module=module)
        output, _ = process.communicate()
        good = process.returncode == 0 and len(log_of(out)) == 4
    yield "one process", output.strip().splitlines()[-2], judge(good)


def autoattack(options):
    """AutoAttack as the command runs it, and pyautoattack in turn where it is installed."""
    import eval_attacks

    speed.settings()
    cpu = options.device == "cpu"
    n_train, n_test, n, size, epochs = (400, 8, 4, 16, 1) if cpu else (10_000, 512, 128, 128, 5)
    arch, data = "wrn-10-1" if cpu else "resnet18", load(options, n_train, n_test)
    words = f"--method at --arch {arch} --batch-size {size} --amp".split()
    args, net, optimizer, attack, x, y = speed.prepare(words, data, options.device)
    for epoch in range(1, epochs + 1):
        clirat.train_epoch(args, epoch, net, attack, optimizer, x, y)
    speed.settings(tf32=False)
    x, y = data[2].to(options.device), data[3].to(options.device)
    net.eval().to(memory_format=torch.channels_last if cpu else torch.contiguous_format)

    def ours(n, **precision):
        begun, case = time.perf_counter(), (net, x[:n], y[:n], ["aa"])
        verdicts = eval_attacks.evaluate(*case, eps=8 / 255, **({"batch_size": 128} | precision))
        robust = eval_attacks.robust_in(verdicts, "aa").tolist()
        return robust, time.perf_counter() - begun

    robust, spent = ours(n)
    yield f"{n} images", f"{spent:.1f} s, {sum(robust)} robust", ""
    if importlib.util.find_spec("pyautoattack"):
        from pyautoattack import AutoAttack

        begun = time.perf_counter()
        theirs = AutoAttack(net, device=options.device, eps=8 / 255, seed=0)
        x_adv = theirs.run_standard_evaluation(x[:n] / 255, y[:n], batch_size=128)[0]
        with torch.no_grad():
            expected = (net(x_adv).argmax(1) == y[:n]).tolist()
        longer = time.perf_counter() - begun
        found, good = f"{longer:.1f} s, {sum(expected)} robust", robust == expected
        yield "pyautoattack, the same verdicts", found, judge(good)
        state = "" if cpu else judge(longer >= 1.5 * spent, "slow")
        yield "its time over ours", f"{longer / spent:.2f}", state
    robust, spent = ours(len(x))
    state = "" if cpu else judge(spent <= 60, "slow")
    yield f"{len(x)} images", f"{spent:.1f} s, {sum(robust)} robust", state
    in_half, spent = ours(len(x), amp=True, batch_size=512)  # as the command has it
    near = abs(sum(in_half) - sum(robust)) <= 1
    state = judge(near and (cpu or spent <= 30), "slow" if near else "off")
    yield f"{len(x)} images, --amp", f"{spent:.1f} s, {sum(in_half)} robust", state


def tests(options):
    command = [sys.executable, "-m", "pytest", "-q", "test_clpm.py", ".ci/test_programs.py"]
    command += ["--collect-only"] if options.device == "cpu" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield "pytest", "; ".join([*failed, lines[-1]]), judge(done.returncode == 0)


# ---- One part after another ----------------------------------------------------------------------

ALL = list(speed.OPTIONS)
PARTS = {  # name: (function, limit in seconds)
    "graph": (graph, 110),
    "speed": (functools.partial(timing, arch="resnet18", columns=ALL, rounds=5, block=20), 90),
    "profile": (profile, 60),
    "no-wait": (no_wait, 40),
    "wide": (functools.partial(timing, arch="wrn-32-10", columns=ALL[2:], rounds=3, block=10), 100),
    "schedule": (schedule, 40),
    "deterministic": (deterministic, 60),
    "resume": (resume, 60),
    "torchrun": (torchrun, 60),
    "exclude": (exclude, 40),
    "autoattack": (autoattack, 300),
    "tests": (tests, 150),
}


def work(connection, parts, options):
    """Send the parts' rows; after a part None, or "broken", and then this process ends."""
    os.setpgrp()  # so that it can be ended with all that it started
    for function, _ in parts.values():
        try:
            for row in function(options):
                connection.send(row)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            text = " ".join(str(error).split("\n")[:1])
            connection.send((type(error).__name__, text, "off"))
            connection.send("broken")
            return
        connection.send(None)


def rows_of(parts, options):
    """Yield (part, name, finding, state) of these parts, within --seconds.

    parts: {name: (function of options that yields (name, finding, state), limit in seconds)}.
    """
    context, left = multiprocessing.get_context("spawn"), list(parts)
    end = time.monotonic() + options.seconds
    while left and time.monotonic() < end:
        ours, theirs = context.Pipe(duplex=False)
        rest = {name: parts[name] for name in left}
        process = context.Process(target=work, args=(theirs, rest, options))
        process.start()
        theirs.close()
        message = None
        while left and message != "broken":
            if message is None:  # a part begins
                until = time.monotonic() + parts[left[0]][1]
            if not ours.poll(max(0, min(end, until) - time.monotonic())):
                if time.monotonic() >= end:
                    break
                yield left[0], "", f"no end after {parts[left[0]][1]} s", "off"
                message = "broken"
            else:
                try:
                    message = ours.recv()
                except EOFError:
                    yield left[0], "", "its process died", "off"
                    message = "broken"
            if isinstance(message, tuple):
                yield left[0], *message
            else:
                left.pop(0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    for name in left:
        yield name, "", f"not through: {options.seconds:g} s are over", ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = functools.partial(parser.add_argument, help="(default: %(default)s)")
    add("--device", type=str, choices=["cuda", "cpu"], default="cuda")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--seconds", type=float, default=240)
    parser.add_argument("--data", type=str, help=".npz of 32 x 32 images (default: synthetic)")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here, nothing checked; --device cpu tries the script itself")
        return
    rows, begun = [], time.monotonic()
    for row in rows_of({name: PARTS[name] for name in options.parts}, options):
        rows.append(row)
        print(f"{time.monotonic() - begun:4.0f} s  {' | '.join(row)}", flush=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"\n{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| part | | finding | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    wrong = sum(row[3] in ("off", "slow") for row in rows)
    unfinished = len({row[0] for row in rows if row[2].startswith("not through")})
    print(f"\n{wrong} of {len(rows)} rows are off or slow, {unfinished} parts not through")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
