"""Runs, their folders, resuming and forking them, several processes."""

import argparse
import gc
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import clirat
import eval_attacks
import models
from clirat import pgd
from conftest import contents, evaluate, load, run, same, same_run, small_images, small_network


def test_the_first_weights_are_a_seeds():
    data = torch.zeros(20, 3, 8, 8).byte(), torch.arange(20) % 2
    weights = []
    for seed in "122":
        args = clirat.parse_args(["--arch=wrn-10-1", "--batch-size=20", f"--seed={seed}"])
        _, net, *_ = clirat.setup(args, torch.device("cpu"), data * 2, None)
        weights.append(net.fc.weight)
    assert [torch.equal(weights[i], weights[2]) for i in (0, 1)] == [False, True]


def test_best_is_by_pgd20_on_test_images(data, tmp_path, monkeypatch):
    accuracy = mock.Mock(side_effect=[(0.1, 0.3), (0.9, 0.2), (0.2, 0.3), (0.5, 0.1)])
    monkeypatch.setattr(clirat, "nat_and_pgd20", accuracy)
    stopped_run(data, tmp_path, monkeypatch, after=1)
    resume(tmp_path)  # it remembers the best
    best, last = load(tmp_path / "best.pt"), load(tmp_path / "last.pt")
    assert (best["epoch"], best["best"], last["best"]) == (1, 0.3, 0.3)
    assert "selected_by" in best
    x, y = clirat.load_data(str(data), ["test"])
    for call, n in zip(accuracy.mock_calls, (20, 20, 20, 30), strict=True):
        assert same(call.args[3:], (x[:n], y[:n]))
    accuracy.side_effect = [(0.1, 0.0), (0.1, 0.1)]
    run(data, "--out", tmp_path / "2", "--eval-every", "2")
    assert load(tmp_path / "2" / "best.pt")["epoch"] == 2  # of those that were evaluated
    run(data, "--out", tmp_path / "0", "--eval-every", "0")
    assert not (tmp_path / "0" / "best.pt").exists()


def test_a_finished_run_says_its_figures_again(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clirat, "nat_and_pgd20", lambda *_: torch.rand(2).tolist())
    run(data, "--out", tmp_path)
    figures = capsys.readouterr().out.splitlines()[-3:]
    resume(tmp_path)
    assert capsys.readouterr().out.splitlines()[-3:] == figures


@pytest.mark.parametrize(("step", "value"), [(1, math.nan), (3, 0.0), (4, math.nan)])
def test_nonfinite_stops(step, value, data, tmp_path, monkeypatch, capsys):
    calls, loss = itertools.count(1), clirat.at_loss

    def sometimes_bad(logits, *args):  # a gradient of NaN in any case
        return (0 * logits.sum()).sqrt() + value if next(calls) == step else loss(logits, *args)

    monkeypatch.setattr(clirat, "at_loss", sometimes_bad)
    with pytest.raises(SystemExit, match="1"):
        run(data, "--out", tmp_path / "run")
    epoch = {1: 1, 3: 1, 4: 2}[step]  # three batches an epoch
    assert f"epoch {epoch}: the loss or the network is not finite" in capsys.readouterr().err
    assert (tmp_path / "run" / "last.pt").exists() == (epoch > 1)


def test_accuracy_in_training():
    net, (x, y), args = small_network().eval(), small_images(30), clirat.parse_args([])
    y = net(x).argmax(1) * (torch.arange(30) % 5 > 0)  # some are wrong from the start
    images = (x * 255).round().byte()
    attack = clirat.fast_pgd(net, eps=8 / 255, step_size=0.003, steps=20)
    torch.manual_seed(0)
    starts = []
    spied = lambda x, y, start: attack(x, y, starts.append(start) or start)  # noqa: E731
    found = clirat.nat_and_pgd20(args, net, spied, images, y)
    torch.manual_seed(0)
    x = images.to(memory_format=torch.channels_last) / 255
    start = x + torch.empty(x.shape).uniform_(-8 / 255, 8 / 255)
    x_adv = pgd(net, x, y, eps=8 / 255, step_size=0.003, steps=20, init=start)
    torch.testing.assert_close(starts[0], start)
    torch.testing.assert_close(attack(x, y, start)[0], x_adv)
    expected = [(net(z).argmax(1) == y).double().mean().item() for z in (x, x_adv)]
    assert found == pytest.approx(expected)
    assert found[0] > found[1] > 0
    net[4].bias.data[:] = math.nan  # NaN is wrong
    args.batch_size = 7
    assert clirat.nat_and_pgd20(args, net, attack, images, y) == [0, 0]


def test_what_a_run_attacks_with(data, tmp_path, monkeypatch, capsys):
    made = set()

    def noted(model, x, y, *, steps, step_size, eps, loss="ce", **options):
        made.add((steps, step_size, eps, loss, next(model.parameters()).dtype))
        return pgd(model, x, y, steps=steps, step_size=step_size, eps=eps, loss=loss, **options)

    monkeypatch.setattr(clirat, "pgd", noted)
    run(data, "--out", tmp_path, "--epochs", "1", "--eps", "0.01", "--step-size", "0.004")
    single, half = torch.float32, torch.bfloat16
    assert made == {(2, 0.004, 0.01, "ce", single), (20, 0.003, 0.01, "ce", single)}
    assert capsys.readouterr().out.endswith(f"/last.pt --data {data} --eps 0.01 --n 30\n")
    for method, loss in ("mart", "ce"), ("clir-trades", "kl"):
        made.clear()
        run(data, "--out", tmp_path / method, "--epochs", "1", "--method", method, "--amp")
        assert made == {(2, 2 / 255, 8 / 255, loss, half), (20, 0.003, 8 / 255, "ce", single)}


def test_the_path_of_cuda_graphs(data, straight, tmp_path, fake_cuda):
    run(data, "--out", tmp_path / "run")
    assert same_run(straight, tmp_path / "run")
    sizes = sorted(shape[0] for shape in fake_cuda)
    assert sizes == [10, 10, 20, 20]  # of the batches in training, of those in evaluation


def test_progress_of_a_training(data, tmp_path, monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    clock = itertools.count(0, 10).__next__  # ten seconds a batch
    monkeypatch.setattr(clirat.time, "perf_counter", clock)
    monkeypatch.setattr("sys.stderr", stderr)
    assert list(clirat.progress(["a", "b"], "epoch 1/3", 3)) == ["a", "b"]
    # a batch took 20 seconds, the first look at the clock included, and 5 are left
    lines = ["epoch 1/3, batch 1/2, estimating", "epoch 1/3, batch 2/2, 0:01:40 left", ""]
    assert stderr.getvalue().replace("\033[K", "").split("\r")[1:] == lines
    run(data, "--out", tmp_path, "--epochs", "2", "--eval-size", "7")
    lines = stderr.getvalue().replace("\033[K", "").split("\r")[4:]
    assert [line.rpartition(",")[0] for line in lines if line] == [
        *(f"epoch 1/2, batch {i}/3" for i in (1, 2, 3)), "evaluation, batch 1/1",
        *(f"epoch 2/2, batch {i}/3" for i in (1, 2, 3)), "evaluation, batch 1/1",
        "evaluation, batch 1/2", "evaluation, batch 2/2",
    ]  # fmt: skip
    assert "epoch 1/2, batch 3/3, 0:01:00 left" in lines  # of two epochs


@pytest.mark.parametrize("options", ["--amp", "--compile", "--amp --method mail-trades"])
def test_amp_and_compile(options, data, straight, tmp_path, monkeypatch):
    compiled = mock.Mock(side_effect=partial(torch.compile, backend="aot_eager"))
    casts = mock.Mock(side_effect=torch.autocast)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch, "autocast", casts)
    run(data, "--out", tmp_path / "run", *options.split())
    log, exact = (load(out / "last.pt")["log"] for out in (tmp_path / "run", straight))
    kinds = [type(call.args[0]) for call in compiled.mock_calls]
    assert kinds == [models.Folded] * options.count("--compile")
    cast = mock.call("cpu", torch.bfloat16, enabled="--amp" in options)
    assert casts.mock_calls == [cast] * len(casts.mock_calls) != []
    assert all(math.isfinite(row["loss"]) for row in log)
    if "trades" not in options:  # later epochs drift apart
        assert log[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)


def test_precision(data, tmp_path):
    """TF32 in training, on CUDA; none in an evaluation after it, and what is set can be read."""
    run(data, "--out", tmp_path, "--epochs", "1")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", True)
    evaluate(tmp_path / "last.pt", "--data", data, "--attacks", "nat")
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    assert (torch.get_float32_matmul_precision(), *allowed) == ("highest", False, False)


def resume(out, *words):
    clirat.main(["--resume", "--device", "cpu", "--out", str(out), *words])


def stopped_run(data, out, monkeypatch, after):
    """A run that dies when the given epoch is in last.pt, but not in log.csv."""
    save = clirat.save_log
    with monkeypatch.context() as patch:
        dying = lambda path, rows: save(path, rows) if len(rows) < after else 1 / 0  # noqa: E731
        patch.setattr(clirat, "save_log", dying)
        with pytest.raises(ZeroDivisionError):
            run(data, "--out", out)


def test_run_resume_and_init(data, straight, tmp_path, monkeypatch):
    names = {"args.json", "best.pt", "burnin.pt", "last.pt", "log.csv", ".run.lock"}
    assert {p.name for p in straight.iterdir()} == names
    burnin, last = (load(straight / f"{name}.pt") for name in ("burnin", "last"))
    assert (burnin["epoch"], last["epoch"]) == (1, 3)
    assert [row["ess"] < 1 for row in last["log"]] == [False, True, True]  # after the burn-in
    net, metadata = models.load(straight / "last.pt")
    assert (net.training, net.fc.out_features) == (False, 5)
    (group,) = last["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 7e-4)
    assert len(group["params"]) == len(list(net.parameters()))
    assert (metadata["arch"], metadata["method"], metadata["epoch"]) == ("wrn-10-1", "clirat", 3)

    stopped_run(data, tmp_path / "resumed", monkeypatch, after=2)
    resume(tmp_path / "resumed")  # equals one that was never stopped
    burn, moved = tmp_path / "burn", tmp_path / "moved.pt"
    run(data, "--out", burn, "--method", "at")
    run(data, "--out", tmp_path / "init", "--init", burn / "burnin.pt")  # another's burn-in
    run(data, "--out", tmp_path / "init-at", "--init", burn / "burnin.pt", "--method", "at")
    for name in "best", "burnin", "last":
        assert same(load(straight / f"{name}.pt"), load(tmp_path / "resumed" / f"{name}.pt"))
    assert same_run(straight, tmp_path / "init")
    assert same_run(burn, tmp_path / "init-at")

    (burn / "burnin.pt").rename(moved)
    copy = str(shutil.copy(data, tmp_path / "copy.npz"))  # the data is known by what it is
    resume(tmp_path / "init", "--data", copy)  # needs --init's file no longer
    kept = json.loads((tmp_path / "init" / "args.json").read_text())
    assert (kept["init"], kept["data"]) == (str(burn / "burnin.pt"), copy)
    (tmp_path / "fresh").mkdir()  # stopped before its first epoch was saved
    (tmp_path / "fresh" / "args.json").write_text(json.dumps(kept | {"init": str(moved)}))
    burnin = load(moved)
    burnin["model"]["fc.bias"] += 1
    torch.save(burnin | {"best": 1.0}, moved)
    resume(tmp_path / "fresh")
    assert load(tmp_path / "fresh" / "last.pt")["log"][0] == burnin["log"][0]
    assert not same_run(straight, tmp_path / "fresh")  # for it went on from there
    run(data, "--out", tmp_path / "other", "--init", moved, "--weight-decay", "0.1")
    forked = load(tmp_path / "other" / "last.pt")
    assert forked["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    assert forked["best"] == max(row["pgd20"] for row in forked["log"][1:])  # its own

    stopped_run(data, tmp_path / "late", monkeypatch, after=3)  # all trained, the log is behind
    resume(tmp_path / "late")
    assert len((tmp_path / "late" / "log.csv").read_text().splitlines()) == 4

    stopped_run(data, tmp_path / "early", monkeypatch, after=0)  # at once: nothing is saved yet
    for path in (tmp_path / "early").glob("*.pt"):
        path.unlink()
    run(data, "--out", tmp_path / "early", "--lr", "0.01")  # such a folder is free


def test_a_run_is_of_one_process(data, straight, tmp_path, refused):
    folder = shutil.copytree(straight, tmp_path / "run")
    before, held = contents(folder), ".run.lock is held: another process is at work there"
    with clirat.locked(folder / ".run.lock", wait=False):  # as a run does
        refused(held, resume, folder)
        assert contents(folder) == before
        evaluate(folder / "last.pt", "--data", data, "--attacks", "nat")  # may stand beside
    resume(folder)  # whose holder has gone
    for path in folder.glob("*.pt"):
        path.unlink()
    with clirat.locked(folder / ".run.lock"):
        refused(held, run, data, "--out", folder)  # nothing is saved yet: not a run to refuse


def test_a_run_that_came_in_between(data, straight, tmp_path, monkeypatch, refused):
    """One that began and ended while this one read its data is not overwritten."""
    load_data = clirat.load_data

    def slow(*args):
        shutil.copytree(straight, tmp_path / "run")
        return load_data(*args)

    monkeypatch.setattr(clirat, "load_data", slow)
    refused("already holds a run", run, data, "--out", tmp_path / "run")
    assert same_run(straight, tmp_path / "run")


@pytest.mark.parametrize("error", [ImportError, OSError(38, "no locks here")])
def test_without_locks(error, data, tmp_path, monkeypatch):
    fcntl = types.SimpleNamespace(LOCK_EX=0, LOCK_NB=0)
    fcntl.flock = lambda *_: exec("raise error", {"error": error})
    monkeypatch.setitem(sys.modules, "fcntl", None if error is ImportError else fcntl)
    run(data, "--out", tmp_path, "--epochs", "1")
    assert load(tmp_path / "last.pt")["epoch"] == 1


def test_what_is_written_when(data, tmp_path, monkeypatch, capsys):
    """Every file is renamed into place, and one that others lean on comes after them."""
    replace = mock.Mock(wraps=os.replace)
    figures = mock.Mock(side_effect=[(0.1, 0.2), (0.1, 0.3), (0.5, 0.0), (0.25, 0.125)])
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(clirat, "nat_and_pgd20", figures)
    monkeypatch.setattr(clirat.time, "perf_counter", itertools.count().__next__)  # a second a look
    run(data, "--out", tmp_path, "--burn-in", "2")
    targets = [call.args[1].name for call in replace.mock_calls]
    order = ["args.json", "best.pt", "last.pt", "log.csv", "best.pt", "burnin.pt", "last.pt"]
    assert targets == [*order, "log.csv", "last.pt", "log.csv"]
    assert {path.name for path in tmp_path.iterdir()} == {*targets, ".run.lock"}

    shown = capsys.readouterr().out.splitlines()
    images = "50 training and 30 test images (3, 8, 8)"
    assert shown[0] == f"clirat, wrn-10-1 on cpu: {data}, {images}; into {tmp_path}"
    assert re.search(r"^epoch 1, loss .*, seconds 2, nat 0.1, pgd20 0.2, 0:00:06 left$", shown[1])
    assert re.search(r"^epoch 3, .*, ess 0\.\d+, .*, nat 0.5, pgd20 0, 0:00:00 left$", shown[3])
    assert shown[4] == "NAT 25.00  PGD-20 12.50  (%, last epoch, all 30 test images)"
    assert shown[5] == "PGD overstates what weighting gains; CW and AutoAttack tell."
    command = f"python eval_attacks.py {tmp_path}/last.pt --data {data} --n 30"
    assert shown[6:] == [f"Evaluate it: {command}"]

    files = [load(tmp_path / f"{name}.pt") for name in ("best", "burnin", "last")]
    keys = {"model", "optimizer", "epoch", "best", "log", "args"}
    assert [file.keys() - keys for file in files] == [{"selected_by"}, set(), set()]
    last, args = files[2], json.loads((tmp_path / "args.json").read_text())
    assert all(file["args"] == args for file in files)
    assert args.keys() & {"out", "resume", "device", "compile"} == set()
    assert args["digest"] == clirat.digest(*clirat.load_data(str(data)))
    titles, *rows = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()]
    assert titles == list(last["log"][0])
    written = [[float(cell) for cell in row] for row in rows]
    assert written == [pytest.approx([*row.values()], rel=1e-5) for row in last["log"]]
    assert last["log"][0]["images_per_s"] == 25  # 50 in 2 seconds

    replace.reset_mock()
    words = ["--data", data, "--n", "9", "--attacks", "nat", "--json", tmp_path / "figures.json"]
    before = {*tmp_path.iterdir()}
    evaluate(tmp_path / "last.pt", *words)
    new = {path.name for path in {*tmp_path.iterdir()} - before}
    assert new == {*(call.args[1].name for call in replace.mock_calls), ".verdicts.lock"}


@pytest.mark.parametrize("change", [{"method": "mart", "trade_off": 6.0}, {"epochs": None}])
def test_resume_wants_args_json_and_last_pt_of_one_run(change, straight, tmp_path, refused):
    path = shutil.copytree(straight, tmp_path / "run") / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = contents(tmp_path)
    refused("last.pt is not of the run", resume, path.parent)
    assert contents(tmp_path) == before
    torch.save({}, path.with_name("last.pt"))
    refused("last.pt is not of the run", resume, path.parent)


def test_init_from_other_peoples_checkpoints(data, straight, tmp_path, refused):
    burnin, path = load(straight / "burnin.pt"), tmp_path / "theirs.pt"
    wrong = {"args": {}}, {"args": argparse.Namespace(method="at")}, {"optimizer": {}}
    for change in (*wrong, {"args": burnin["args"] | {"method": "magic"}}, {"optimizer": None}):
        torch.save(burnin | change, path)
        refused("no training checkpoint", run, data, "--out", tmp_path / "run", "--init", path)
        assert not (tmp_path / "run").exists()


def test_what_a_kill_left_goes_and_nothing_else(data, tmp_path):
    others = ["notes.tmp", "2024.notes.tmp", "last.pt.tmp", "7.last.pt.1a.npz.tmp"]
    for name in [*others, "7.last.pt.tmp", "7.args.json.tmp"]:
        (tmp_path / name).write_text("x")
    run(data, "--out", tmp_path, "--epochs", "1")
    assert {path.name for path in tmp_path.glob("*.tmp")} == {*others}


def test_temporary_files(tmp_path, monkeypatch):
    order = mock.Mock()
    for name in "fsync", "replace":
        order.attach_mock(mock.Mock(wraps=getattr(os, name)), name)
        monkeypatch.setattr(os, name, getattr(order, name))
    clirat.write(tmp_path / "a", b"1")
    assert [name for name, *_ in order.mock_calls] == ["fsync", "replace"]  # lest it be left empty
    assert str(os.getpid()) in order.replace.call_args.args[0].name
    order.replace.side_effect = OSError("full")
    with pytest.raises(OSError, match="full"):
        clirat.write(tmp_path / "a", b"2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"1")]


@pytest.mark.parametrize("stderr", [None, types.SimpleNamespace(write=print, flush=print)])
def test_without_a_stderr(stderr, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)  # None: closed, as by 2>&-
    run(data, "--out", tmp_path, "--epochs", "1")
    evaluate(tmp_path / "last.pt", "--data", data, "--attacks", "nat", "pgd20")
    assert load(tmp_path / "last.pt")["epoch"] == 1


def work(rank, world, folder):
    if world > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    net, (x, y) = small_network().eval(), small_images(13)
    args = clirat.parse_args(["--batch-size", "4"])
    untouched = lambda x, y, start: (x, None)  # noqa: E731
    accuracy = clirat.nat_and_pgd20(args, net, untouched, (x * 255).byte(), net(x).argmax(1))
    kept = Path(folder, f"{rank} of {world}.npz")  # as on separate disks
    settings = dict.fromkeys(eval_attacks.SETTINGS, 0) | {"n": 13, "dataset": "", "training": {}}
    options = {"attacks": ["pgd20", "apgd"], "eps": 0.02, "seed": 0, "batch_size": 4}
    asked = argparse.Namespace(**options, amp=False, data="")
    case = asked, Path("a.pt"), net, kept, settings, (x * 255).byte(), y
    results = {"accuracy": accuracy, "figures": eval_attacks.evaluate_one(*case)["attacks"]}
    if rank == 0:
        assert (eval_attacks.read_verdicts(kept)[0]["pgd20"] >= 0).all()
    words = f"--epochs 1 --batch-size 6 --steps 1 --eval-every 0 --out {folder}"
    args, state = clirat.parse_args(words.split()), {"epoch": 0, "best": -1.0, "log": []}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    clirat.train(args, ((x * 255).byte(), y, None, None), net, optimizer, state)
    for ours in net.buffers():  # each process has seen other images
        lead = ours.clone()
        dist.broadcast(lead, 0) if world > 1 else None
        assert torch.equal(ours, lead)
    clirat.augment = lambda x: x / 255  # the processes would draw their own
    torch.manual_seed(0)
    x, y = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8), torch.arange(24) % 5
    for words in ("clirat", "clir-trades", "mail-mart", "clirat --exclude single"):
        torch.manual_seed(0)
        # no BatchNorm, of which each process would see half
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        args = clirat.parse_args(["--batch-size", "8", "--method", *words.split()])
        model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
        attack = lambda x, y, epoch: (x.flip(3), y)  # noqa: E731
        row = clirat.train_epoch(args, 76, model, attack, optimizer, x, y)
        results[words] = [net.state_dict(), row]
        del model  # holds the group
    if rank == 0:
        torch.save(results, f"{folder}/results-{world}.pt")
    if world > 1:
        gc.collect()  # as in main
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(work, (2, tmp_path), nprocs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clirat, "augment", clirat.augment)  # `work` replaces it
        work(0, 1, tmp_path)
    one, two = (torch.load(tmp_path / f"results-{world}.pt") for world in (1, 2))
    assert one.pop("accuracy") == two.pop("accuracy") == [1, 1]
    assert one.pop("figures") == two.pop("figures")
    for words in one:
        torch.testing.assert_close(one[words], two[words], atol=1e-5, rtol=1e-4)


def torchrun(processes, program, *words):
    """What `program` prints, started by torchrun."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    command = [sys.executable, *command, program.__file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun(data, tmp_path):
    common = f"--device cpu --data {data}".split()
    train = "--arch wrn-10-1 --batch-size 20 --steps 2 --epochs 2 --out"
    out = torchrun(2, clirat, *common, *train.split(), tmp_path)
    assert [line.split()[0] for line in out.splitlines()] == [
        "clirat,", "epoch", "epoch", "NAT", "PGD", "Evaluate"
    ]  # fmt: skip
    names = {"args.json", "best.pt", "burnin.pt", "last.pt", "log.csv", ".run.lock"}
    assert {path.name for path in tmp_path.iterdir()} == names
    path, attacks = tmp_path / "last.pt", ["nat", "pgd20"]
    out = torchrun(2, eval_attacks, path, *common, "--attacks", *attacks)
    assert [line.count("|") for line in out.splitlines()] == [0, 0, 6, 6, 6]
    verdicts, _ = eval_attacks.read_verdicts(*tmp_path.glob("last.pt.*.npz"))
    (net, _), images = models.load(path), clirat.load_data(str(data), ["test"])
    assert same(verdicts, eval_attacks.evaluate(net, *images, attacks, eps=8 / 255))
    figures = eval_attacks.summarise(verdicts, attacks)
    cells = [cell.split()[0] for cell in out.splitlines()[-1].split("|")[4:6]]
    assert cells == [f"{figures[name]['accuracy']:.2f}" for name in attacks]
