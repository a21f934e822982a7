"""Kill a run twenty times, resume it each time, and hold it against a run that was never stopped.

    python .ci/kill_test.py [DATA [KILLS]]

Half of the kills come at arbitrary moments, half while a file is being written. Then SIGINT, a full
disk, and an evaluation that is killed. On the CPU, where a resumed run is equal bit for bit.
"""

import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from conftest import same  # noqa: E402
from eval_attacks import read_verdicts, to_ask  # noqa: E402

DATA = sys.argv[1] if len(sys.argv) > 1 else "toy"
KILLS = int(sys.argv[2]) if len(sys.argv) > 2 else 20
OPTIONS = "--arch wrn-10-1 --train-size 256 --batch-size 64 --epochs 30 --steps 2 --eval-size 64"


def start(out, *options, file_limit=resource.RLIM_INFINITY):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, str(ROOT / "clirat.py"), "--out", str(out), "--device", "cpu"]
    command += options or ["--data", DATA, *OPTIONS.split()]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=prepare, **pipes)


def start_evaluation(checkpoint, batch_size):
    command = [sys.executable, str(ROOT / "eval_attacks.py"), str(checkpoint), "--data", DATA]
    command += ["--n", "4", "--eps", "2/255", "--device", "cpu"]
    command += ["--batch-size", str(batch_size)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resume(out):
    return start(out, *(["--resume"] if (out / "args.json").exists() else []))


def finish(process, status=0):
    err = process.communicate(timeout=600)[1]
    assert process.returncode == status, (process.returncode, err)
    return err


def rows(path):
    lines = [line.split(",") for line in (path / "log.csv").read_text().splitlines()]
    timings = [i for i, name in enumerate(lines[0]) if name in ("seconds", "images_per_s")]
    return [[cell for i, cell in enumerate(line) if i not in timings] for line in lines]


def epochs(path):
    return len(rows(path)) - 1 if (path / "log.csv").exists() else 0


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None and not condition():
        time.sleep(0.0005)
    return condition()


def main():
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder, "straight"), Path(folder, "killed")
        begun = time.monotonic()
        process = start(straight)
        wait_for((straight / "args.json").exists, process)
        loaded = time.monotonic() - begun
        finish(process)
        epoch = (time.monotonic() - begun - loaded) / 30

        for kill in range(KILLS):
            stale, process = {*killed.glob("*.tmp")}, resume(killed)
            if kill % 2:
                time.sleep(rng.uniform(0.8 * loaded, loaded + 3 * epoch))
            else:
                if rng.random() < 0.7:  # let an epoch end first, so that the run gets on
                    logged = epochs(killed)
                    wait_for(lambda logged=logged: epochs(killed) > logged, process)
                wait_for(lambda stale=stale: {*killed.glob("*.tmp")} - stale, process)
            process.kill()
            process.communicate()
            print(f"kill {kill + 1}: {epochs(killed)} epochs logged", flush=True)
        finish(resume(killed))
        assert not any(killed.glob("*.tmp"))
        for name in ("last.pt", "best.pt", "burnin.pt"):
            a, b = (torch.load(out / name, weights_only=True) for out in (straight, killed))
            assert same(a, b), name
        assert rows(straight) == rows(killed)
        print(f"{KILLS} kills: every file equals that of the run that was never stopped")

        out = Path(folder, "interrupted")
        process = start(out)
        assert wait_for((out / "log.csv").exists, process)
        process.send_signal(signal.SIGINT)
        err = finish(process, 130)
        assert "--resume" in err, err
        assert "Traceback" not in err, err
        print("SIGINT: one line that says how to go on")

        before = (out / "last.pt").read_bytes()
        err = finish(start(out, "--resume", file_limit=100_000), 1)
        assert "File too large" in err, err
        assert "Traceback" not in err, err
        assert (out / "last.pt").read_bytes() == before
        print("a full disk: one line, and the last checkpoint is whole")

        straight.joinpath("copy.pt").write_bytes((straight / "last.pt").read_bytes())
        process = start_evaluation(straight / "copy.pt", 2)

        def after_apgd_t():
            for file in straight.glob("copy.pt.*.npz"):
                verdicts, _ = read_verdicts(file)
                return not any(to_ask(verdicts, name).any() for name in ("nat", "apgd", "apgd-t"))

        assert wait_for(after_apgd_t, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the evaluation was over before the kill"
        process.communicate()
        again = ("copy.pt", 4), ("last.pt", 3)  # another batch size changes nothing
        tables = [start_evaluation(straight / name, n).communicate() for name, n in again]
        assert not any("error" in err for _, err in tables), tables
        figures = [table.splitlines()[4].split("|")[2:] for table, _ in tables]
        assert figures[0] == figures[1], tables
        print("an evaluation killed in the middle of AutoAttack: the same row", figures[0])


if __name__ == "__main__":
    main()
