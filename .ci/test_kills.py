"""Kills at any moment and while a file is written, Ctrl-C, a full disk, a closed pipe.

KILLS=20 python -m pytest -q .ci/test_kills.py    more than the usual six
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

import clirat
import eval_attacks
from conftest import evaluate, load, run, same

KILLS = int(os.environ.get("KILLS", 6))
TRAIN = ["--arch=wrn-10-1", "--batch-size=20", "--steps=2", "--eval-size=20", "--epochs"]


def start(program, *words, device="cpu", file_limit=resource.RLIM_INFINITY):
    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    command = [sys.executable, program.__file__, *map(str, words), "--device", device]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    return subprocess.Popen(command, preexec_fn=prepare, env=buffered, **pipes)


def ended(process, status):
    """What it said on stderr: no traceback, and nothing at all if it ended well."""
    err = process.communicate(timeout=300)[1]
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert "ignored" not in err
    return err.strip()


def waits_for(condition, process):
    while process.poll() is None and not condition():
        time.sleep(0.0005)
    return condition()


def logged(folder):
    log = folder / "log.csv"
    return len(log.read_text().splitlines()) - 1 if log.exists() else 0


def test_kills(data, tmp_path):
    """A run that is killed and resumed, again and again, equals one that was never stopped."""
    straight, killed, rng = tmp_path / "straight", tmp_path / "killed", random.Random(0)
    words = [*TRAIN, 30, "--data", data, "--out"]
    begun = time.monotonic()
    process = start(clirat, *words, straight)
    waits_for((straight / "args.json").exists, process)
    loaded = time.monotonic() - begun
    assert ended(process, 0) == ""
    epoch = (time.monotonic() - begun - loaded) / 30

    def go_on():
        resume = ["--resume"] if (killed / "args.json").exists() else []
        return start(clirat, *words, killed, *resume)

    for kill in range(KILLS):
        stale, process = {*killed.glob("*.tmp")}, go_on()
        if kill % 2:
            time.sleep(rng.uniform(0.8 * loaded, loaded + 3 * epoch))
        else:  # while a file is written; now and then after an epoch, so that it gets on
            wanted = logged(killed) + (kill % 4 > 0)
            waits_for(lambda wanted=wanted: logged(killed) >= wanted, process)
            waits_for(lambda stale=stale: {*killed.glob("*.tmp")} - stale, process)
        process.kill()
        process.communicate()
    assert ended(go_on(), 0) == ""
    assert not any(killed.glob("*.tmp"))
    for name in "last.pt", "best.pt", "burnin.pt":
        assert same(load(killed / name), load(straight / name))
    clirat.save_log(tmp_path / "log.csv", load(killed / "last.pt")["log"])
    assert (killed / "log.csv").read_bytes() == (tmp_path / "log.csv").read_bytes()


def test_a_killed_evaluation(data, straight, tmp_path):
    path = shutil.copy(straight / "last.pt", tmp_path)
    words = ["--data", data, "--n", 4, "--eps", "1/255", "--attacks", "aa", "--batch-size"]
    process = start(eval_attacks, path, *words, 2)

    def after_apgd_t():
        for file in tmp_path.glob("*.npz"):
            verdicts, _ = eval_attacks.read_verdicts(file)
            return not any(eval_attacks.to_ask(verdicts, n).any() for n in ("apgd", "apgd-t"))

    assert waits_for(after_apgd_t, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before the kill"
    for checkpoint, batch_size in (path, 4), (shutil.copy(path, tmp_path / "other.pt"), 3):
        evaluate(checkpoint, *words, batch_size)  # another batch size changes nothing
    killed, other = (eval_attacks.read_verdicts(file)[0] for file in tmp_path.glob("*.npz"))
    assert same(killed, other)
    assert (killed["square"] == 0).any()


def test_ctrl_c_and_a_full_disk(data, tmp_path):
    process = start(clirat, *TRAIN, 9999, "--data", data, "--out", tmp_path)
    assert waits_for(lambda: logged(tmp_path) >= 2, process)
    process.send_signal(signal.SIGINT)
    err, epoch = ended(process, 130), load(tmp_path / "last.pt")["epoch"]
    said = f"saved up to epoch ({epoch}|{epoch - 1}): --resume --out {tmp_path} goes on"
    assert re.fullmatch(f"clirat.py: stopped: Ctrl-C; {said}", err)
    before = (tmp_path / "last.pt").read_bytes()
    err = ended(start(clirat, "--resume", "--out", tmp_path, file_limit=100_000), 1)
    assert re.fullmatch(f"clirat.py: stopped: .* File too large; {said}", err)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_ctrl_c_before_anything_is_saved(data, straight, tmp_path, monkeypatch, capsys):
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    path = shutil.copy(straight / "last.pt", tmp_path)
    monkeypatch.setitem(eval_attacks.ATTACKS, "pgd20", stop)
    with pytest.raises(SystemExit, match="130"):
        evaluate(path, "--data", data)
    said = "\neval_attacks.py: stopped: Ctrl-C; the same command goes on from there\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr(clirat, "augment", stop)
    fork = "--out", tmp_path / "fork", "--method", "mail-at", "--init", straight / "burnin.pt"
    with pytest.raises(SystemExit, match="130"):
        run(data, *fork)
    said = "\nclirat.py: stopped: Ctrl-C; nothing is saved yet: run it again\n"
    assert capsys.readouterr().err == said
    monkeypatch.undo()
    run(data, *fork)  # as it says
    assert load(tmp_path / "fork" / "last.pt")["epoch"] == 3


@pytest.mark.parametrize("program", [clirat, eval_attacks])
def test_a_closed_pipe(program, data, straight, tmp_path):
    if program is clirat:
        process = start(clirat, *TRAIN, 9999, "--data", data, "--out", tmp_path)
        hint = f"--resume --out {tmp_path} goes on"
    else:
        path = shutil.copy(straight / "last.pt", tmp_path)
        process = start(eval_attacks, path, "--data", data, "--attacks", "nat", "pgd20")
        hint = "the same command goes on from there"
    process.stdout.readline()
    process.stdout.close()  # as by | head -1
    err = ended(process, 1)
    assert "stopped: [Errno 32] Broken pipe" in err
    assert err.endswith(hint)
