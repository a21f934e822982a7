"""python -m pytest -q .ci/test_programs.py    networks, runs, flags, files and processes."""

import argparse
import collections
import contextlib
import functools
import gc
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn

import clirat
import eval_attacks
import models
from clirat import pgd
from conftest import TIMING, Terminal, load, run, same, same_run, small_images, small_network

ROOT = Path(clirat.__file__).parent


# ---- Networks and checkpoints --------------------------------------------------------------------


SIZES = {"resnet18": 11_173_962, "wrn-28-10": 36_479_194, "wrn-34-10": 46_160_474}  # as published
SIZES |= {"wrn-32-10": SIZES["wrn-34-10"]}  # counted differently


def test_resnet18_is_torchvisions():
    net, peer = models.build("resnet18"), torchvision.models.resnet18(num_classes=10)
    peer.conv1, peer.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    state, x = net.state_dict(), torch.rand(2, 3, 16, 16)
    names = [k.replace("shortcut", "downsample").replace("linear", "fc") for k in state]
    peer.load_state_dict(dict(zip(names, state.values(), strict=True)))
    torch.testing.assert_close(net(x), peer(x))


def test_sizes_of_networks():
    with torch.device("meta"):
        nets = {name: models.build(name) for name in SIZES}
        for depth in range(30):
            if depth in (8, 10, 14, 16, 20, 22, 26, 28):  # 6n + 2, 6n + 4
                assert len(models.build(f"wrn-{depth}-1").block1.layer) == (depth - 2) // 6
            else:
                with pytest.raises(ValueError, match="unknown architecture"):
                    models.build(f"wrn-{depth}-1")
    assert {k: sum(p.numel() for p in net.parameters()) for k, net in nets.items()} == SIZES


def test_wrn_by_hand():
    net, x = models.build("wrn-16-2"), torch.rand(2, 3, 16, 16)
    out = net.conv1(x)
    for stage in net.block1, net.block2, net.block3:
        for block in stage.layer:
            a = F.relu(block.bn1(out))
            shortcut = block.convShortcut(a) if block.convShortcut else out
            out = block.conv2(F.relu(block.bn2(block.conv1(a)))) + shortcut
    assert out.shape == (2, 128, 4, 4)
    torch.testing.assert_close(net(x), net.fc(F.relu(net.bn1(out)).mean((2, 3))))


@pytest.mark.parametrize("arch", ["resnet18", "wrn-10-2"])
def test_folding_changes_nothing(arch):
    net, x = models.build(arch).double(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    folded = models.Folded(net)
    places = [p.data_ptr() for p in folded.parameters()]
    for _ in range(2):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                stats = module.weight, module.bias, module.running_mean, module.running_var
                for t in stats:
                    nn.init.uniform_(t, 0.5, 1.5)
        folded.refresh(net)
        assert net.training
        torch.testing.assert_close(folded(x), net.eval()(x))
        net.train()
    assert places == [p.data_ptr() for p in folded.parameters()]
    assert not any(p.requires_grad for p in folded.parameters())
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(nn.BatchNorm2d) == 0
    assert kinds.count(models.Affine) == (0 if arch == "resnet18" else 3)  # that follow a sum
    x = x[:, :, :5]
    torch.testing.assert_close(models.pooled(x), F.adaptive_avg_pool2d(x, 1).flatten(1))


class OnesOwn(nn.Module):
    """Networks of somebody else's, whose BatchNorms do not simply follow convolutions."""

    def __init__(self, kind="plain", k=10):
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)  # registered after both
        self.last = nn.BatchNorm1d(3)
        self.fc = nn.Linear(3, k)
        if kind == "two names":
            self.bn2 = self.bn1
        if kind == "tied weight":
            self.conv2.weight = self.conv1.weight
        if kind == "no parameters":
            self.bn1 = nn.BatchNorm2d(3, affine=False)
        if kind == "no statistics":
            self.bn1 = nn.BatchNorm2d(3, track_running_stats=False)
        if kind == "subclass":
            self.bn1 = Doubled(3)
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.mask = None

    def forward(self, x):
        out = self.conv1(x)
        if self.kind == "keeps a tensor":
            self.mask = torch.ones_like(x[:1, :1]) if self.mask is None else self.mask
            return self.fc(self.bn1(out).mul(self.mask)[:, self.order].mean((2, 3)))
        if self.kind == "keyword":
            return self.fc(self.bn2(input=self.bn1(input=out)).mean((2, 3)))
        if self.kind == "reads":
            return self.fc(self.bn1(out).mul(self.bn1.weight.mean()).mean((2, 3)))
        if self.kind == "output used twice":
            return self.fc(self.last(self.bn1(out).add(out).mean((2, 3))))
        if self.kind == "weight used twice":
            again = F.conv2d(x, self.conv1.weight, padding=1)
            return self.fc(self.bn1(out).add(again).mean((2, 3)))
        if self.kind == "before":
            return self.fc(self.conv2(self.bn2(self.bn1(x))).relu().mean((2, 3)))
        if self.kind == "values" and x.mean() > 9:
            return self.fc(out.mean((2, 3)))
        if self.kind == "types":  # what a tracer does not see
            out = out + 1 if isinstance(out, torch.Tensor) else out
            return self.fc(self.bn1(out).mean((2, 3)))
        out = self.conv2(self.bn1(out).relu())
        return self.fc(self.last(self.bn2(out).relu().mean((2, 3))))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


KINDS = ["plain", "two names", "tied weight", "no parameters", "no statistics", "subclass"]
KINDS += ["output used twice", "weight used twice", "before", "values", "keeps a tensor", "keyword"]


@pytest.mark.parametrize("kind", KINDS)
def test_folding_of_other_networks(kind):
    torch.manual_seed(0)
    net, x = OnesOwn(kind).double(), torch.rand(4, 3, 8, 8, dtype=torch.float64)
    folded = models.Folded(net)
    for _ in range(3):
        for _ in range(3):
            net.train()(x)  # moves the statistics
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.rand_like(parameter)
        folded.refresh(net)
        torch.testing.assert_close(folded(x), net.eval()(x))
    models.check_folding(net, x)
    net.fc.weight.data[:] = net.fc.bias.data[:] = 0
    models.check_folding(net, x)
    if kind == "plain":
        assert not any(
            isinstance(module, models.Affine | nn.BatchNorm2d) for module in folded.modules()
        )


def test_a_copy_that_is_another_function_is_refused(data, tmp_path, monkeypatch, capsys):
    x = torch.rand(4, 3, 8, 8)
    for zeros in False, True:  # a last layer of zeros hides nothing
        net = OnesOwn("types")
        net.fc.weight.data *= not zeros
        with pytest.raises(ValueError, match="copy of OnesOwn to attack is another function"):
            models.check_folding(net, x)
    half = OnesOwn()
    half.fc.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    models.check_folding(half, x)
    with pytest.raises(ValueError, match=r"to attack fails .'Identity' object has"):
        models.check_folding(OnesOwn("reads"), x)
    with pytest.raises(ValueError, match=r"to attack fails in torch\.bfloat16 .*: does its"):
        models.check_folding(half, x, torch.bfloat16)
    build = models.build
    own = {"types": lambda k: OnesOwn("types", k), "half": lambda k: half}
    monkeypatch.setattr(
        models, "build", lambda name, k=10: own[name](k) if name in own else build(name, k)
    )
    for words in ["--arch", "types"], ["--arch", "half", "--amp"]:
        with pytest.raises(SystemExit, match="2"):
            run(data, "--out", tmp_path / "run", *words)
        assert "clirat.py: error: the copy of OnesOwn to attack " in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_training_and_evaluating_a_network_of_ones_own(data, tmp_path, monkeypatch, capsys):
    build = models.build
    own = lambda name, k=10: OnesOwn("plain", k) if name == "own" else build(name, k)  # noqa: E731
    monkeypatch.setattr(models, "build", own)
    run(data, "--out", tmp_path, "--arch", "own")
    words = [str(tmp_path / "last.pt"), "--data", str(data), "--attacks", "nat", "--device", "cpu"]
    with pytest.raises(SystemExit, match="2"):
        eval_attacks.main(words)
    said = "other networks are evaluated from Python, or by --arch if models.build knows them"
    assert said in capsys.readouterr().err
    eval_attacks.main([*words, "--arch", "own"])
    assert f"| {tmp_path}/last.pt | 30 | 8/255 |" in capsys.readouterr().out
    net, _ = models.load(tmp_path / "last.pt", "own")
    assert same(net.state_dict(), load(tmp_path / "last.pt")["model"])


@pytest.mark.parametrize("name", ["resnet18", "wrn-10-2", "wrn-16-1"])
def test_other_peoples_checkpoints(name, tmp_path):
    net, path = models.build(name, 5), tmp_path / "theirs.pt"
    state, x = net.state_dict(), torch.rand(2, 3, 16, 16)
    expected = net.eval()(x)
    beside = {"epoch": 3, "best": np.float64(0.5), "path": Path("a/b"), "arch": "ResNet18"}
    beside |= {"rng": np.random.get_state(), "seen": np.int64(7)}
    beside |= {"optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1, out=Path("x"))}
    files = [{key: state} | beside for key in ("net", "model", "state_dict", "weights")]
    prefixes = (
        "1.",
        "module.",
        "model.",
        "_orig_mod.",
        "module.module.",
        "module._orig_mod.",
        "_orig_mod.module.",
    )
    files += [{prefix + key: value for key, value in state.items()} for prefix in prefixes]
    files += [state | {"sub_block1.layer.0.bn1.weight": torch.ones(1)}]
    files += [{key: v for key, v in state.items() if "num_batches" not in key}]
    files += [{"net": state, "args": None}, {"net": state, "args": [1]}]
    files += [torch.optim.swa_utils.AveragedModel(net).state_dict()]
    for file in files:
        torch.save(file, path)
        ours, metadata = models.load(path)
        torch.testing.assert_close(ours(x), expected)
        assert metadata["arch"] == name
    torch.save(files[0], path)
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(tmp_path / "numpy_1.pt", "w") as older:
        for item in file.namelist():
            older.writestr(item, file.read(item).replace(b"numpy._core", b"numpy.core"))
    path = tmp_path / "numpy_1.pt"
    assert models.load(path)[1] == {"epoch": 3, "best": 0.5, "seen": 7, "arch": name, "lr": 0.1}
    other = {key: 2 * value for key, value in state.items()}
    for first, second in ("ema", "net"), ("net", "ema"):  # the first is taken, and it is said
        torch.save({first: state, second: other, "epoch": 3}, path)
        ours, metadata = models.load(path)
        torch.testing.assert_close(ours(x), expected)
        assert metadata["state_dict"] == f"{first}, not {second}"


def zipped(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch hacked",)


WRN = models.build("wrn-10-1").state_dict()


REFUSED = {
    "code": (RunsCode(), "module.*state_dict"),
    "module": (small_network(), "defaultdict, module"),
    "defaultdict": (collections.defaultdict(int, WRN), "defaultdict.*torch.save"),
    "list": ([1, 2], "no state dict .*list"),
    "other keys": ({"model": {"a": torch.ones(1)}}, "no weights of ResNet-18"),
    "web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0{\"conv1.weight\":", "safetensors"),
    "npz": (zipped({"weights": np.zeros(3)}), ".npz"),
    "text": (b"not a checkpoint", "no state dict"),
    "empty": (b"", "damaged"),
    "nan": (WRN | {"fc.bias": torch.tensor([math.nan, *[0.0] * 9])}, "not finite"),
    "normalising": (WRN | {"mean": torch.ones(3)}, "mean is .3,., not known"),
    "deeper": (WRN | {"block1.conv3.weight": torch.ones(1)}, "WideResNet .block1.conv3.weight is"),
}  # fmt: skip


def test_checkpoints_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    torch.save(WRN, tmp_path / "a.pt")
    assert same(models.load(tmp_path / "a.pt")[0].state_dict(), WRN)


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", REFUSED)
def test_refused_checkpoints(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED[what]
    path = tmp_path / "theirs.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    refused(path, message)
    assert not Path("hacked").exists()


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "theirs.pt")
    refused(tmp_path / "theirs.pt", "TorchScript")


# ---- Training ------------------------------------------------------------------------------------


def test_setup():
    x, y = torch.zeros(300, 3, 8, 8, dtype=torch.uint8), torch.arange(300) % 5
    args = clirat.parse_args(["--arch", "wrn-10-1", "--train-size", "200"])
    data, net, optimizer, _ = clirat.setup(args, torch.device("cpu"), (x, y, x, y), None)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 7e-4)
    assert len(group["params"]) == len(list(net.parameters()))
    assert [len(t) for t in data] == [200, 200, 300, 300]
    assert net.fc.out_features == 5
    args.seed = 2
    other = clirat.setup(args, torch.device("cpu"), (x, y, x, y), None)[1]
    assert not torch.equal(net.fc.weight, other.fc.weight)


def test_best_is_by_pgd20_on_test_images(data, tmp_path, monkeypatch):
    figures, seen = iter([(0.1, 0.3), (0.9, 0.2), (0.2, 0.3), (0.5, 0.1)]), []

    def accuracy(args, net, attack, x, y):
        seen.append((x, y))
        return next(figures)

    monkeypatch.setattr(clirat, "nat_and_pgd20", accuracy)
    run(data, "--out", tmp_path)
    best = load(tmp_path / "best.pt")
    assert (best["epoch"], best["best"]) == (1, 0.3)
    assert "selected_by" in best
    x, y = clirat.load_data(str(data), ["test"])
    assert [len(labels) for _, labels in seen] == [20, 20, 20, 30]
    for images, labels in seen:
        assert torch.equal(images, x[: len(images)])
        assert torch.equal(labels, y[: len(images)])
    figures = iter([(0.1, 0.0), (0.1, 0.1)])
    run(data, "--out", tmp_path / "2", "--eval-every", "2")
    assert load(tmp_path / "2" / "best.pt")["epoch"] == 2  # of those that were evaluated
    run(data, "--out", tmp_path / "0", "--eval-every", "0")
    assert not (tmp_path / "0" / "best.pt").exists()


@pytest.mark.parametrize(("step", "value"), [(1, math.nan), (3, 0.0), (4, math.nan)])
def test_nonfinite_stops(step, value, data, tmp_path, monkeypatch, capsys):
    calls, loss = [], clirat.at_loss

    def sometimes_bad(logits, *args):
        calls.append(args)
        if len(calls) != step:
            return loss(logits, *args)
        return (0 * logits.sum()).sqrt() + value  # its gradient is NaN in any case

    monkeypatch.setattr(clirat, "at_loss", sometimes_bad)
    with pytest.raises(SystemExit) as stop:
        run(data, "--out", tmp_path / "run")
    assert stop.value.code == 1
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


def test_pgd20_is_at_the_eps_of_the_run(data, tmp_path, monkeypatch, capsys):
    made, fast_pgd = [], clirat.fast_pgd

    def noted(net, dtype=None, compiled=False, **options):
        made.append(options | ({"dtype": dtype} if dtype else {}))
        return fast_pgd(net, dtype, compiled, **options)

    monkeypatch.setattr(clirat, "fast_pgd", noted)
    run(data, "--out", tmp_path, "--epochs", "1", "--eps", "0.01", "--step-size", "0.004")
    assert made == [
        {"steps": 2, "step_size": 0.004, "eps": 0.01, "loss": "ce"},
        {"steps": 20, "step_size": 0.003, "eps": 0.01},
    ]
    assert capsys.readouterr().out.endswith(f"/last.pt --data {data} --eps 0.01 --n 30\n")
    made.clear()
    run(data, "--out", tmp_path / "trades", "--epochs", "1", "--method", "mart", "--amp")
    half = {"steps": 2, "step_size": 2 / 255, "eps": 8 / 255, "loss": "ce", "dtype": torch.bfloat16}
    assert made == [half, {"steps": 20, "step_size": 0.003, "eps": 8 / 255}]


def test_processes_draw_their_own(monkeypatch):
    shares, draws = [], []
    for rank in range(3):
        monkeypatch.setattr(clirat, "rank_and_world", lambda rank=rank: (rank, 3))
        torch.manual_seed(1)
        shares += clirat.shuffled(34, 9, "cpu")
        draws.append(torch.rand(1).item())
    assert [len(share) for share in shares] == [3, 3, 3, 2] * 3
    assert len(torch.cat(shares).unique()) == 33  # of one order
    assert len({*draws}) == 3


def test_a_lone_image_is_left_out():
    batches = clirat.shuffled(41, 20, "cpu")
    assert [len(batch) for batch in batches] == [20, 20]
    assert len(torch.cat(batches).unique()) == 40
    assert [len(batch) for batch in clirat.shuffled(42, 20, "cpu")] == [20, 20, 2]


def test_exclude_can_drop_all():
    net, (x, _) = small_network(), small_images(8)
    net[4].weight.data[:] = 0
    net[4].bias.data = -torch.arange(10.0)
    args = clirat.parse_args(["--exclude", "multi", "--batch-size", "8"])
    optimizer, y = torch.optim.SGD(net.parameters(), 0.1), torch.full((8,), 9)
    attack = lambda x, y, epoch: (x, y)  # noqa: E731
    row = clirat.train_epoch(args, 76, net, attack, optimizer, (255 * x).byte(), y)
    found = [row[name] for name in ("loss", "multi_cl", "weight_multi_cl", "ess")]
    assert found == pytest.approx([0, 1, 0, 0], abs=1e-9)


def test_fats_tau(monkeypatch):
    """0, from epoch 51 of 120 on 1, from epoch 91 on 2; the other methods never stop early."""
    net, (x, y), taus = small_network(), small_images(4), []
    noted = lambda x, y, start, tau: taus.append(tau.item())  # noqa: E731
    monkeypatch.setattr(clirat, "fast_pgd", lambda *_, **__: noted)
    for method, epochs in ("fat", (1, 50, 51, 90, 91, 120)), ("at", (1, 120)):
        attack = clirat.inner_attack(clirat.parse_args(["--method", method]), net)
        for epoch in epochs:
            attack(x, y, epoch)
    assert taus == [0, 0, 1, 1, 2, 2, 10, 10]


def test_a_replay_leaves_earlier_results_alone(fake_cuda):
    double = models.graphed(lambda x: (2 * x,), torch.device("cuda"))
    results = [double(torch.full((3,), float(i)))[0] for i in range(3)]
    assert torch.stack(results).tolist() == [[0] * 3, [2] * 3, [4] * 3]
    assert len(fake_cuda) == 1


def test_the_path_of_cuda_graphs(data, straight, tmp_path, fake_cuda):
    run(data, "--out", tmp_path / "run")
    assert same_run(straight, tmp_path / "run")
    sizes = [shapes[0][0] for shapes in fake_cuda]
    assert sorted(sizes) == [10, 10, 20, 20]  # of the batches in training, of those in evaluation


def test_progress_of_a_training(data, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 10))  # ten seconds a batch
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(clirat, "time", fake)
    monkeypatch.setattr("sys.stderr", Terminal())
    assert list(clirat.progress(["a", "b"], "epoch 1/3", 3)) == ["a", "b"]
    lines = sys.stderr.getvalue().replace("\033[K", "").split("\r")[1:]
    # a batch took 20 seconds, the first look at the clock included, and 5 are left
    assert lines == ["epoch 1/3, batch 1/2, estimating", "epoch 1/3, batch 2/2, 0:01:40 left", ""]
    parts, progress = [], clirat.progress

    def noted(batches, label, passes=1):
        parts.append((len(batches), label, passes))
        return progress(batches, label, passes)

    monkeypatch.undo()
    monkeypatch.setattr(clirat, "progress", noted)
    run(data, "--out", tmp_path, "--epochs", "2", "--eval-size", "7")
    assert parts == [
        (3, "epoch 1/2", 2), (1, "evaluation", 1), (3, "epoch 2/2", 1), (1, "evaluation", 1),
        (2, "evaluation", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("options", ["--amp", "--compile", "--amp --method mail-trades"])
def test_amp_and_compile(options, data, straight, tmp_path, monkeypatch):
    compiled, compile_, casts, autocast = [], torch.compile, [], torch.autocast

    def noted(model, **options):
        compiled.append(type(model))
        return compile_(model, backend="aot_eager", **options)

    def cast(*args, enabled):
        casts.append((*args, enabled))
        return autocast(*args, enabled=enabled)

    monkeypatch.setattr(torch, "compile", noted)
    monkeypatch.setattr(torch, "autocast", cast)
    run(data, "--out", tmp_path / "run", *options.split())
    log, exact = (
        torch.load(o / "last.pt", weights_only=True)["log"] for o in (tmp_path / "run", straight)
    )
    assert compiled == [models.Folded] * options.count("--compile")
    assert {*casts} == {("cpu", torch.bfloat16, "--amp" in options)}
    if "trades" not in options:  # later epochs drift apart
        assert log[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    assert all(math.isfinite(row["loss"]) for row in log)


# ---- Flags ---------------------------------------------------------------------------------------


def test_defaults(monkeypatch):
    for cuda, device, sizes in (False, "cpu", (64, 64)), (True, "cuda", (128, 512)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert vars(clirat.parse_args([])) == {
            "method": "clirat", "arch": "resnet18", "gamma": 10, "beta": -0.5, "trade_off": None,
            "data": "data", "train_size": None, "epochs": 120, "burn_in": 75,
            "lr_milestones": [75, 90], "batch_size": 128, "lr": 0.01, "weight_decay": 3.5e-3,
            "eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "seed": 1, "init": None,
            "exclude": None, "weight_norm": "batch", "amp": False, "eval_every": 1,
            "eval_size": 1000, "out": "runs/clirat-resnet18-s1", "resume": False, "compile": False,
            "device": device,
        }  # fmt: skip
        usual = {"checkpoints": [Path("a.pt")], "arch": None, "data": "data", "n": None}
        usual |= {"attacks": ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]}  # the paper's columns
        usual |= {"eps": 8 / 255, "seed": 0, "json": None, "device": device}
        for flag, size in ([], sizes[0]), (["--amp"], sizes[1]):
            found = vars(eval_attacks.parse_args(["a.pt", *flag]))
            assert found == usual | {"amp": bool(flag), "batch_size": size}
    args = clirat.parse_args(["--method", "trades", "--arch", "wrn-32-10", "--seed", "7"])
    assert (args.trade_off, args.out) == (5, "runs/trades-wrn-32-10-s7")


BOUNDS = {  # of each number: the first and last that are taken, and those beside them that are not
    clirat: {
        "--gamma": ("0 1e6", "-1e-9 1000001"),
        "--trade-off": ("0", "-1e-9"),
        "--train-size": ("1", "0"),
        "--epochs": ("1", "0"),
        "--burn-in": ("0", "-1"),
        "--lr-milestones": ("0", "-1"),
        "--batch-size": ("2", "1"),
        "--lr": ("0", "-1e-9"),
        "--weight-decay": ("0", "-1e-9"),
        "--eps": ("0 1", "-1e-9 1.01"),
        "--step-size": ("0", "-1e-9"),
        "--steps": ("1", "0"),
        "--seed": ("0 400000", "-1 400001"),
        "--eval-every": ("0", "-1"),
        "--eval-size": ("1", "0"),
        "--beta": ("-1e6 1e6 -1/3", "inf nan 1e999 1000001 -1000001"),
    },
    eval_attacks: {
        "--n": ("1", "0"),
        "--batch-size": ("1", "0"),
        "--eps": ("0 1", "-1e-9 1.01"),
        "--seed": (f"0 {2**31}", f"-1 {2**31 + 1}"),
    },
}


@pytest.mark.parametrize("program", BOUNDS)
def test_bounds(program, capsys):
    for flag, (taken, refused) in BOUNDS[program].items():
        words = ["a.pt"] if program is eval_attacks else []
        words += ["--method", "trades"] if flag == "--trade-off" else []
        for value in taken.split():
            program.parse_args([*words, f"{flag}={value}"])
        for value in refused.split():
            with pytest.raises(SystemExit, match="2"):
                program.parse_args([*words, f"{flag}={value}"])
            assert f"argument {flag}: invalid finite" in capsys.readouterr().err
    assert clirat.parse_args(["--lr-milestones"]).lr_milestones == []  # none


TRAIN = [  # a flag, the first epoch whose row of the log it changes, and columns it changes there
    ("--method mail-at", 2, "loss ess"),
    ("--arch wrn-10-2", 1, "loss"),
    ("--gamma 3", 2, "loss ess"),
    ("--beta 0", 2, "loss ess"),
    ("--trade-off 2", 1, "loss"),
    ("--data other_images.npz", 1, "loss"),
    ("--train-size 40", 1, "loss"),
    ("--epochs 3", 2, "lr"),  # it drops an epoch later
    ("--burn-in 2", 2, "loss ess"),
    ("--lr-milestones 2", 2, "lr"),
    ("--batch-size 25", 1, "loss"),
    ("--lr 0.05", 1, "lr loss"),
    ("--weight-decay 0.5", 1, "loss"),
    ("--eps 4/255", 1, "loss"),
    ("--step-size 1/255", 1, "loss"),
    ("--steps 3", 1, "loss"),
    ("--seed 2", 1, "loss"),
    ("--exclude single", 2, "loss weight_single_cl"),
    ("--weight-norm mail", 2, "loss"),
    ("--amp", 1, "loss"),
    ("--eval-every 2", 1, "nat pgd20"),
    ("--eval-size 7", 1, "nat pgd20"),
]
EVALUATE = [  # a flag, and what changes of what an attack is called with
    ("--attacks pgd20 cw", {"names": ["pgd20", "cw"], "batches": [9, 9]}),
    ("--data other_test.npz", {"first": 220}),
    ("--n 7", {"batches": [7]}),
    ("--batch-size 4", {"batches": [4, 4, 1], "batch_size": 4, "names": ["pgd20"] * 3}),
    ("--eps 4/255", {"eps": 4 / 255}),
    ("--seed 5", {"seed": 5}),
    ("--amp", {"dtype": torch.bfloat16}),
    ("--device cuda:7", {"device": "cuda:7"}),
]
# --resume, --init: test_run_resume_and_init. --compile: test_amp_and_compile. --out: everywhere.
# --arch of an evaluation: test_bad_input. --json: test_evaluation_files.


def test_the_tables_have_every_flag(capsys):
    for program, table, elsewhere in (
        (clirat, TRAIN, {"--resume", "--init", "--compile", "--out", "--device"}),
        (eval_attacks, EVALUATE, {"--arch", "--json"}),
    ):
        with pytest.raises(SystemExit, match="0"):
            program.parse_args(["--help"])
        flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
        assert {case[0].split()[0] for case in table} | elsewhere == flags


@pytest.fixture(scope="session")
def rows_of(desk, tmp_path_factory):
    """A function of flags: the rows of the log that a run of two epochs with them has."""

    @functools.cache
    def rows(*flags):
        out = tmp_path_factory.mktemp("run")
        run(desk / "small.npz", "--epochs", "2", *flags, "--out", out)
        return load(out / "last.pt")["log"]

    return rows


@pytest.mark.parametrize(("flag", "epoch", "columns"), TRAIN)
def test_flags_of_training(flag, epoch, columns, rows_of, desk, monkeypatch):
    monkeypatch.chdir(desk)
    common = ["--method", "trades"] if "trade-off" in flag else []
    usual, changed = rows_of(*common), rows_of(*common, *flag.split())
    assert same(changed[: epoch - 1], usual[: epoch - 1])
    before, now = usual[epoch - 1], changed[epoch - 1]
    differing = {name for name in before if before[name] != now[name]} - {*TIMING}
    assert {*columns.split()} <= differing
    assert ("lr" in differing) == ("lr" in columns)
    if "--eval" in flag:
        assert {*columns.split()} == differing
        assert changed[1]["loss"] == usual[1]["loss"]
    assert len(changed) == 2 + ("--epochs" in flag)


@pytest.mark.parametrize(("flag", "change"), EVALUATE)
def test_flags_of_evaluation(flag, change, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    shutil.copy("run/last.pt", tmp_path)

    def seen(*words):
        noted = {"names": [], "batches": []}

        def attack(model, x, y, *, name, judge, index, **options):
            noted["names"].append(name)
            noted["batches"].append(len(x))
            noted.setdefault("first", round(255 * x[0, 0, 0, 0].item()))
            noted.update(options, dtype=next(model.parameters()).dtype)
            return x

        def device(name, amp):
            noted["device"] = name
            return torch.device("cpu")

        for name in "pgd20", "cw":
            monkeypatch.setitem(eval_attacks.ATTACKS, name, partial(attack, name=name))
        monkeypatch.setattr(clirat, "join_processes", device)
        for file in tmp_path.glob("*.npz"):
            file.unlink()
        usual = {"--attacks": ["pgd20"], "--data": ["small.npz"], "--n": ["9"]}
        usual |= {"--device": ["cpu"], "--batch-size": ["64"]}
        rest = [w for key, values in usual.items() if key not in words for w in (key, *values)]
        eval_attacks.main([str(tmp_path / "last.pt"), *words, *rest])
        return noted

    usual, changed = seen(), seen(*flag.split())
    assert {key: value for key, value in changed.items() if value != usual[key]} == change


def test_device_of_training(data, tmp_path, monkeypatch):
    asked = []

    def device(*call):
        asked.append(call)
        return torch.device("cpu")

    monkeypatch.setattr(clirat, "join_processes", device)
    run(data, "--out", tmp_path, "--epochs", "1", "--device", "cuda:7")
    assert asked == [("cuda:7", False)]


def test_precision(data, tmp_path, monkeypatch):
    """TF32 in training, on CUDA; none in an evaluation after it, and what is set can be read."""
    found, backends, evaluate = [], torch.backends, eval_attacks.evaluate
    nat_and_pgd20 = clirat.nat_and_pgd20

    def trained(*args):
        found.append((torch.get_float32_matmul_precision(), backends.cudnn.benchmark))
        return nat_and_pgd20(*args)

    def evaluated(*args, **options):
        found.append((torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32))
        return evaluate(*args, **options)

    monkeypatch.setattr(clirat, "nat_and_pgd20", trained)
    monkeypatch.setattr(eval_attacks, "evaluate", evaluated)
    run(data, "--out", tmp_path, "--epochs", "1")
    evaluate_files(tmp_path / "last.pt", "--data", data, "--attacks", "nat")
    assert found == [("high", True), ("high", True), ("highest", False)]
    assert not backends.cuda.matmul.allow_tf32


# ---- Run folders ---------------------------------------------------------------------------------


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
    log = np.genfromtxt(straight / "log.csv", delimiter=",", names=True)
    groups = log["adv_correct"] + log["single_cl"] + log["multi_cl"]
    np.testing.assert_allclose(groups, 1, atol=1e-5)
    assert log["ess"][0] == 1  # weights from the epoch after the burn-in on
    assert (log["ess"][1:] < 1).all()
    burnin, last = (load(straight / f"{name}.pt") for name in ("burnin", "last"))
    assert (burnin["epoch"], last["epoch"]) == (1, 3)
    net, metadata = models.load(straight / "last.pt")
    assert not net.training
    assert (metadata["arch"], metadata["method"], metadata["epoch"]) == ("wrn-10-1", "clirat", 3)

    resume = ["--resume", "--device", "cpu", "--out"]
    stopped_run(data, tmp_path / "resumed", monkeypatch, after=2)
    clirat.main([*resume, str(tmp_path / "resumed")])  # equals one that was never stopped
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
    clirat.main([*resume, str(tmp_path / "init"), "--data", copy])  # needs --init's file no longer
    kept = json.loads((tmp_path / "init" / "args.json").read_text())
    assert (kept["init"], kept["data"]) == (str(burn / "burnin.pt"), copy)
    (tmp_path / "fresh").mkdir()  # stopped before its first epoch was saved
    (tmp_path / "fresh" / "args.json").write_text(json.dumps(kept | {"init": str(moved)}))
    burnin = load(moved)
    burnin["model"]["fc.bias"] += 1
    torch.save(burnin | {"best": 1.0}, moved)
    clirat.main([*resume, str(tmp_path / "fresh")])
    assert load(tmp_path / "fresh" / "last.pt")["log"][0] == burnin["log"][0]
    assert not same_run(straight, tmp_path / "fresh")  # for it went on from there
    run(data, "--out", tmp_path / "other", "--init", moved, "--weight-decay", "0.1")
    forked = load(tmp_path / "other" / "last.pt")
    assert forked["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    assert forked["best"] == max(row["pgd20"] for row in forked["log"][1:])  # its own

    stopped_run(data, tmp_path / "late", monkeypatch, after=3)  # all trained, the log is behind
    clirat.main([*resume, str(tmp_path / "late")])
    assert len((tmp_path / "late" / "log.csv").read_text().splitlines()) == 4

    stopped_run(data, tmp_path / "early", monkeypatch, after=0)  # at once: nothing is saved yet
    for path in (tmp_path / "early").glob("*.pt"):
        path.unlink()
    run(data, "--out", tmp_path / "early", "--lr", "0.01")  # such a folder is free


def test_a_run_is_of_one_process(data, straight, tmp_path, capsys):
    folder = shutil.copytree(straight, tmp_path / "run")
    words = ["--resume", "--device", "cpu", "--out", str(folder)]
    before = contents(folder)
    with clirat.locked(folder / ".run.lock"):
        with pytest.raises(SystemExit, match="2"):
            clirat.main(words)
        assert ".run.lock is held: another process is at work there" in capsys.readouterr().err
        assert contents(folder) == before
        evaluate_files(folder / "last.pt", "--data", data, "--attacks", "nat")  # may stand beside
    clirat.main(words)  # whose holder has gone
    for path in folder.glob("*.pt"):
        path.unlink()
    with clirat.locked(folder / ".run.lock"), pytest.raises(SystemExit, match="2"):
        run(data, "--out", folder)  # nothing is saved yet: not a run to refuse
    assert "is held" in capsys.readouterr().err


def test_a_run_that_came_in_between(data, straight, tmp_path, monkeypatch, capsys):
    """One that began and ended while this one read its data is not overwritten."""
    setup = clirat.setup

    def slow(*args):
        shutil.copytree(straight, tmp_path / "run")
        return setup(*args)

    monkeypatch.setattr(clirat, "setup", slow)
    with pytest.raises(SystemExit, match="2"):
        run(data, "--out", tmp_path / "run")
    assert "already holds a run" in capsys.readouterr().err
    assert same_run(straight, tmp_path / "run")


def test_started_twice(data, tmp_path):
    common = ["--data", str(data), "--device", "cpu", "--arch", "wrn-10-1", "--batch-size", "20"]
    command = [sys.executable, "clirat.py", *common, "--epochs", "9999", "--out", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    first = subprocess.Popen(command, **pipes)
    first.stdout.readline()  # it has its folder
    second = subprocess.run(command, **pipes)
    first.stdout.readline()  # an epoch
    again = subprocess.run([*command, "--resume"], **pipes)
    for refused_one in second, again:
        assert refused_one.returncode == 2
        assert len(refused_one.stderr.splitlines()) == 1
    assert "is held: another process is at work" in again.stderr
    first.kill()
    first.communicate()
    third = subprocess.Popen([*command, "--resume"], **pipes)  # a killed one locks nobody out
    assert third.stdout.readline().startswith("clirat, ")
    third.kill()
    third.communicate()


@pytest.mark.parametrize("error", [ImportError, OSError(38, "no locks here")])
def test_without_locks(error, data, tmp_path, monkeypatch):
    fcntl = types.SimpleNamespace(LOCK_EX=0, LOCK_NB=0)
    fcntl.flock = lambda *_: exec("raise error", {"error": error})
    monkeypatch.setitem(sys.modules, "fcntl", None if error is ImportError else fcntl)
    run(data, "--out", tmp_path, "--epochs", "1")
    assert load(tmp_path / "last.pt")["epoch"] == 1


def test_resume_remembers_the_best(data, tmp_path, monkeypatch):
    figures = iter([(0.1, 0.3), (0.9, 0.2), (0.5, 0.1), (0.5, 0.1)])
    monkeypatch.setattr(clirat, "nat_and_pgd20", lambda *_: next(figures))
    stopped_run(data, tmp_path, monkeypatch, after=1)
    clirat.main(["--resume", "--device", "cpu", "--out", str(tmp_path)])
    best, last = load(tmp_path / "best.pt"), load(tmp_path / "last.pt")
    assert (best["epoch"], best["best"]) == (1, 0.3)
    assert (last["epoch"], last["best"]) == (3, 0.3)


def test_what_is_written_when(data, tmp_path, monkeypatch, capsys):
    """Every file is renamed into place, and one that others lean on comes after them."""
    targets, replace = [], os.replace

    def noted(old, new):
        targets.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", noted)
    figures = iter([(0.1, 0.2), (0.1, 0.3), (0.5, 0.1), (0.25, 0.125)])
    monkeypatch.setattr(clirat, "nat_and_pgd20", lambda *_: next(figures))
    clock = iter(range(100))  # a second a look at it
    fake = types.SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr(clirat, "time", fake)
    run(data, "--out", tmp_path, "--burn-in", "2")
    order = ["args.json", "best.pt", "last.pt", "log.csv", "best.pt", "burnin.pt", "last.pt"]
    assert targets == [*order, "log.csv", "last.pt", "log.csv"]
    assert {path.name for path in tmp_path.iterdir()} == {*targets, ".run.lock"}

    shown = capsys.readouterr().out.splitlines()
    images = "50 training and 30 test images (3, 8, 8)"
    assert shown[0] == f"clirat, wrn-10-1 on cpu: {data}, {images}; into {tmp_path}"
    assert re.search(r"^epoch 1, loss .*, seconds 2, nat 0.1, pgd20 0.2, 0:00:06 left$", shown[1])
    assert re.search(r"^epoch 3, .*, ess 0\.\d+, .*, nat 0.5, pgd20 0.1, 0:00:00 left$", shown[3])
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

    targets.clear()
    words = ["--data", data, "--n", "9", "--attacks", "nat", "--json", tmp_path / "figures.json"]
    before = {*tmp_path.iterdir()}
    evaluate_files(tmp_path / "last.pt", *words)
    new = {path.name for path in {*tmp_path.iterdir()} - before}
    assert new == {*targets, ".verdicts.lock"}


def test_resume_wants_args_json_and_last_pt_of_one_run(data, straight, tmp_path, capsys):
    resume = ["--resume", "--device", "cpu", "--out", str(tmp_path / "run")]
    other = {"method": "mart", "trade_off": 6.0}
    for name, change in ("args.json", other), ("last.pt", None), ("args.json", {"epochs": None}):
        shutil.copytree(straight, tmp_path / "run")
        path = tmp_path / "run" / name
        if name == "args.json":
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
        else:
            torch.save({}, path)
        before = {p: p.read_bytes() for p in path.parent.iterdir()}
        with pytest.raises(SystemExit, match="2"):
            clirat.main(resume)
        assert "last.pt is not of the run" in capsys.readouterr().err
        assert {p: p.read_bytes() for p in path.parent.iterdir()} == before
        shutil.rmtree(path.parent)


def test_init_from_other_peoples_checkpoints(data, straight, tmp_path, capsys):
    burnin, path = load(straight / "burnin.pt"), tmp_path / "theirs.pt"
    wrong = {"args": {}}, {"args": argparse.Namespace(method="at")}, {"optimizer": {}}
    for change in (*wrong, {"args": burnin["args"] | {"method": "magic"}}, {"optimizer": None}):
        torch.save(burnin | change, path)
        with pytest.raises(SystemExit, match="2"):
            run(data, "--out", tmp_path / "run", "--init", path)
        assert "no training checkpoint" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_what_a_kill_left_goes_and_nothing_else(data, tmp_path):
    ours = {"7.last.pt.tmp", "7.args.json.tmp"}
    others = {"notes.tmp", "2024.notes.tmp", "last.pt.tmp", "7.last.pt.1a.npz.tmp"}
    for name in ours | others:
        (tmp_path / name).write_text("x")
    run(data, "--out", tmp_path, "--epochs", "1")
    assert {path.name for path in tmp_path.glob("*.tmp")} == others


def test_temporary_files(tmp_path, monkeypatch):
    names, replace, synced, fsync = [], os.replace, [], os.fsync

    def noted(old, new):
        assert len(synced) == len(names) + 1  # or a power cut could leave an empty file
        names.append(Path(old).name)
        if len(names) == 2:
            raise OSError("full")
        replace(old, new)

    monkeypatch.setattr(os, "replace", noted)
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(fsync(file)))
    clirat.write(tmp_path / "a", b"1")
    with pytest.raises(OSError, match="full"):
        clirat.write(tmp_path / "a", b"2")
    assert str(os.getpid()) in names[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"1"


# ---- Other surroundings --------------------------------------------------------------------------


def test_another_module_named_models(tmp_path):
    (tmp_path / "models").mkdir()  # as in TRADES' tree
    (tmp_path / "models" / "__init__.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import eval_attacks"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].startswith("ImportError: cannot import name 'Folded'")
    assert str(tmp_path / "models" / "__init__.py") in done.stderr.splitlines()[-1]


SCRIPTS = [*ROOT.glob("*.py"), *ROOT.glob(".figures/*.py"), *ROOT.glob(".ci/*.py")]
SCRIPTS = [path for path in SCRIPTS if "ArgumentParser(" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", [path for path in SCRIPTS if "test_" not in path.name])
def test_without_docstrings(path):
    command = [sys.executable, "-OO", str(path), "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


# ---- Bad input -----------------------------------------------------------------------------------


BAD = {
    clirat: [
        ("--method magic", "magic"),
        ("--method at --gamma 2", "--gamma does nothing"),
        ("--arch wrn-11-1", "wrn-11-1"),
        ("--batch-size 51", "51"),
        ("--eps 2", "--eps"),
        ("--eps 8/0", "--eps"),
        ("--lr nan", "finite"),
        ("--device cuda:99", "--device cuda:99"),
        ("--data nowhere.npz", "nowhere.npz"),
        ("--data truncated.npz", "truncated.npz"),
        ("--data test.npz", "x_train"),
        ("--data float_images.npz", "uint8"),
        ("--data grey_images.npz", "(50, 8, 8, 1)"),
        ("--data negative_labels.npz", "-1"),
        ("--data unknown_labels.npz", "0..5"),
        ("--data skipped_class.npz", "all classes 0..4 in y_train"),
        ("--data object_labels.npz", "object_labels.npz"),
        ("--data svhn", "svhn holds no CIFAR-10"),
        ("--data run", "run holds no CIFAR-10"),
        ("--init nowhere.pt", "nowhere.pt"),
        ("--init weights.pt", "no training checkpoint"),
        ("--init run/burnin.pt --method trades", "want trades, wrn-10-1, seed 1"),
        ("--init run/burnin.pt --method fat", "want fat"),
        ("--init run/burnin.pt --seed 2", "want at, wrn-10-1, seed 2"),
        ("--init run/burnin.pt --burn-in 0", "no epoch after 0"),
        ("--init run/burnin.pt --epochs 1", "no epoch after 0"),
        ("--init run/last.pt --epochs 4 --method mail-at", "no epoch after 1"),
        ("--init run/last.pt --epochs 9 --burn-in 5", "no epoch after 1"),
        ("--out small.npz", "small.npz"),
        ("--out pile", "already holds a run: choose another --out, or --resume"),
        ("--out nothing --resume", "no run to resume"),
        ("--out list --resume", "list holds no run to resume"),
        ("--out run --resume --gamma 3", "started with gamma 10.0, not 3.0"),
        ("--out run --resume --init nowhere.pt", "started with init None, not nowhere.pt"),
        ("--out run --resume --data other_images.npz", "other data than run was started with"),
    ],
    eval_attacks: [
        ("nowhere.pt", "nowhere.pt"),
        ("run", "no file run"),
        ("truncated.pt", "truncated.pt"),
        ("weights.pt nowhere.pt", "nowhere.pt"),  # before the first is evaluated
        ("weights.pt --arch resnet18", "layer1.0.conv1.weight"),
        ("weights.pt --arch bogus", "unknown architecture 'bogus'"),
        ("weights.pt --data toy", "weights.pt knows 5 classes, toy has 10"),
        ("weights.pt --n 31", "31"),
        ("weights.pt --eps -1", "--eps"),
        ("weights.pt --attacks nat magic", "magic"),
        ("--attacks nat weights.pt", "invalid choice: 'weights.pt'"),
        ("weights.pt --json nowhere/figures.json", "nowhere"),
        ("weights.pt --json weights.pt", "no .json"),
        ("damaged.pt --attacks nat", "is damaged"),
        ("short.pt --attacks nat", "is damaged (not all are of 30 images)"),
    ],
}


@pytest.fixture(scope="session")
def desk(data, straight, tmp_path_factory):
    """A folder with good and bad files."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(straight, folder / "run")
    shutil.copy(data, folder / "small.npz")
    shutil.copy(data.with_name("test.npz"), folder)
    arrays = dict(np.load(data))
    images, labels = arrays["x_train"], arrays["y_train"]
    bad = {
        "other_images": {"x_train": images ^ 1},
        "other_test": {"x_test": arrays["x_test"] ^ 1},
        "float_images": {"x_train": images.astype(np.float32)},
        "grey_images": {"x_train": images[..., :1]},
        "negative_labels": {"y_train": labels - 1},
        "unknown_labels": {"y_test": arrays["y_test"] + 1},
        "skipped_class": {"y_train": np.where(labels == 3, 2, labels)},
        "object_labels": {"y_train": np.array([RunsCode()] * 50, dtype=object)},
    }
    for name, change in bad.items():
        np.savez(folder / f"{name}.npz", **(arrays | change))
    (folder / "truncated.npz").write_bytes(data.read_bytes()[:1000])
    torch.save(models.build("wrn-10-1", 5).state_dict(), folder / "weights.pt")
    (folder / "truncated.pt").write_bytes((folder / "weights.pt").read_bytes()[:5000])
    shutil.copy(folder / "weights.pt", folder / "damaged.pt")
    words = [str(folder / "damaged.pt"), "--data", str(data), "--attacks", "nat", "--device", "cpu"]
    eval_attacks.main(words)
    (verdicts,) = folder.glob("damaged.pt.*.npz")
    verdicts.write_text("damaged")
    shutil.copy(folder / "weights.pt", folder / "short.pt")
    eval_attacks.main([str(folder / "short.pt"), *words[1:]])
    (short,) = folder.glob("short.pt.*.npz")
    with np.load(short) as file:
        np.savez(short, settings=file["settings"], nat=file["nat"][:5])
    (folder / "list").mkdir()
    (folder / "list" / "args.json").write_text("[]")
    (folder / "pile").mkdir()
    shutil.copy(folder / "weights.pt", folder / "pile")
    return folder


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [(program, *case) for program, cases in BAD.items() for case in cases],
)
def test_bad_input(program, words, message, desk, capsys, monkeypatch):
    """The program ends with one line, or argparse's two, and status 2, and touches no file."""
    monkeypatch.chdir(desk)
    before, words = contents(desk), words.split()
    settings = {"--data": "small.npz", "--device": "cpu"}
    if program is clirat:
        settings |= {"--arch": "wrn-10-1", "--batch-size": "20", "--steps": "2", "--epochs": "3"}
        settings |= {"--eval-size": "20", "--burn-in": "1"}
    defaults = [word for pair in settings.items() if pair[0] not in words for word in pair]
    with pytest.raises(SystemExit) as stop:
        program.main([*words, *defaults])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err.splitlines()[-1]
    assert len(err.splitlines()) <= 1 + err.startswith("usage: ")
    assert contents(desk) == before


def test_toy_data():
    x, y, x_test, y_test = clirat.load_data("toy")
    assert (x.shape, x_test.shape) == ((2000, 3, 16, 16), (500, 3, 16, 16))
    assert all(map(torch.equal, (x, y, x_test, y_test), clirat.load_data("toy")))
    assert all(map(torch.equal, (x_test, y_test), clirat.load_data("toy", ["test"])))
    assert torch.unique(torch.cat([x, x_test]), dim=0).shape[0] == 2500  # no image twice
    mean = torch.stack([x[y == k].double().mean((0, 2, 3)) for k in range(10)])  # (10, 3)
    torch.testing.assert_close(
        (mean - 127.5).norm(dim=1), torch.full((10,), 34.0).double(), atol=3, rtol=0
    )
    nearest = torch.cdist(x_test.double().mean((2, 3)), mean).argmin(1)
    assert (nearest == y_test).double().mean() > 0.9


def test_cifar10_files(tmp_path, monkeypatch):
    asked = []

    def fake(folder, train, download):
        asked.append((Path(folder), train, download))
        images = np.full((12 if train else 11, 8, 8, 3), train, np.uint8)
        return types.SimpleNamespace(data=images, targets=[i % 2 for i in range(len(images))])

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    x, y, x_test, y_test = clirat.load_data(str(tmp_path))
    assert [len(x), len(y), len(x_test), len(y_test)] == [12, 12, 11, 11]
    assert (x == 1).all()
    assert (x_test == 0).all()
    assert torch.equal(clirat.load_data(str(tmp_path), ["test"])[0], x_test)
    assert asked == [(tmp_path, True, True), (tmp_path, False, True), (tmp_path, False, True)]
    monkeypatch.chdir(tmp_path)  # where the default, and it alone, need not be there yet
    assert torch.equal(clirat.load_data("data")[0], x)
    with pytest.raises(ValueError, match="dota holds no CIFAR-10"):
        clirat.load_data("dota")


def test_cifar10_folders(tmp_path, monkeypatch):
    asked, errors = [], []

    def fake(folder, train, download):
        asked.append(Path(folder))
        raise errors[-1]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    for error in PermissionError("read-only"), OSError("no route"), RuntimeError("corrupted"):
        errors.append(error)
        with pytest.raises(OSError, match=f"no CIFAR-10 in .*{error}.*toy"):
            clirat.load_data(str(inner))
    assert asked == [tmp_path] * 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(20).astype("U2"), "integers from 0"),
        (np.uint8([*range(9), *[255] * 11]), "all classes 0..255"),
        (np.zeros(20, int), "all classes 0..1"),
    ],
)
def test_labels_that_are_none(labels, message, tmp_path):
    images = np.zeros((20, 8, 8, 3), np.uint8)
    names = {"x_train": images, "x_test": images, "y_train": labels, "y_test": labels}
    np.savez(tmp_path / "a.npz", **names)
    with pytest.raises(ValueError, match=message):
        clirat.load_data(str(tmp_path / "a.npz"))


def test_missing_classes_are_said(data, tmp_path, capsys):
    arrays = dict(np.load(data))
    order = {part: np.argsort(arrays[f"y_{part}"], kind="stable") for part in ("train", "test")}
    np.savez(tmp_path / "sorted.npz", **{k: v[order[k[2:]]] for k, v in arrays.items()})
    run(tmp_path / "sorted.npz", "--out", tmp_path, "--epochs", "1", "--train-size", "25")
    assert "note: the first 25 images are of 3 of 5 classes\n" in capsys.readouterr().err
    words = tmp_path / "last.pt", "--attacks", "nat", "--data"
    evaluate_files(*words, data)
    assert capsys.readouterr().err == ""
    evaluate_files(*words, tmp_path / "sorted.npz", "--n", "6")
    said = f"note: {tmp_path}/last.pt knows 5 classes, the 6 images are of 1\n"
    assert capsys.readouterr().err == said
    torch.save(models.build("wrn-10-1", 100).state_dict(), tmp_path / "last.pt")
    evaluate_files(*words, data)
    assert "knows 100 classes, the 30 images are of 5\n" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "said"), [
    ("--epochs 2 --burn-in 2", True), ("--epochs 2 --burn-in 1", False),
    ("--epochs 1 --method at", False), ("--epochs 1 --method at --exclude multi", True),
])  # fmt: skip
def test_a_run_that_ends_with_its_burn_in_is_said(options, said, data, tmp_path, capsys):
    run(data, "--out", tmp_path, *options.split())
    out, err = capsys.readouterr()
    burn_in = 2 if "2 --burn-in 2" in options else 1
    assert err == (f"note: all weights stay 1, burn-in takes {burn_in} epochs\n" if said else "")
    weighted = "at" not in options and not said
    assert ("PGD overstates what weighting gains; CW and AutoAttack tell.\n" in out) == weighted


def test_a_cpu_without_fast_bfloat16_is_said(monkeypatch, capsys):
    for cpu, amp, said in ("AVX2", True, True), ("AVX2", False, False), ("AVX512", True, False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda cpu=cpu: cpu)
        clirat.join_processes("cpu", amp)
        assert ("leave out --amp" in capsys.readouterr().err) == said


def test_any_device_of_pytorch():
    assert clirat.join_processes("meta", False) == torch.device("meta")
    with pytest.raises(ValueError, match="--device nowhere: "):
        clirat.join_processes("nowhere", False)


# ---- Evaluations ---------------------------------------------------------------------------------


def evaluate_files(*words):
    eval_attacks.main([*map(str, words), "--device", "cpu"])


def test_evaluation_files(data, straight, tmp_path, capsys):
    path, figures = tmp_path / "last.pt", tmp_path / "figures.json"
    shutil.copy(straight / "last.pt", path)
    options = ["--data", data.with_name("test.npz"), "--attacks", "nat", "pgd20", "--json", figures]
    for n, eps in ((10, "1/255"), (10, "8/255"), (30, "1/255")):
        evaluate_files(path, *options, "--n", n, "--eps", eps)
    first, _, *rows = capsys.readouterr().out.strip().splitlines()[-5:]
    assert first == f"{data.with_name('test.npz')}: 30 of 30 test images (3, 8, 8), on cpu"
    (told,), (net, _) = json.loads(figures.read_text()), models.load(path)
    x, y = clirat.load_data(str(data), ["test"])
    expected = eval_attacks.evaluate(net, x, y, ["nat", "pgd20"], eps=1 / 255)
    kept = [eval_attacks.read_verdicts(file) for file in tmp_path.glob("last.pt.*.npz")]
    assert sorted((s["n"], s["eps"]) for _, s in kept) == [
        (10, 1 / 255), (10, 8 / 255), (30, 1 / 255),
    ]  # fmt: skip
    (verdicts, settings), cells = next(item for item in kept if item[1]["n"] == 30), []
    for name in "nat", "pgd20":
        assert torch.equal(verdicts[name], expected[name])
        figures, k = told["attacks"][name], (expected[name] == 0).sum().item()
        low, high = (100 * end for end in eval_attacks.wilson(k, 30))
        assert figures == {"robust": k, "accuracy": 100 * k / 30, "interval": [low, high]}
        cells.append(f"{100 * k / 30:.2f} [{low:.1f}, {high:.1f}]")
    assert rows == [
        "| checkpoint | n | eps | NAT | PGD20 |",
        "| --- | --- | --- | --- | --- |",
        f"| {path} | 30 | 1/255 | {' | '.join(cells)} |",
    ]
    assert settings["training"]["method"] == "clirat"
    assert settings["training"]["lr_milestones"] == [2, 2]
    assert settings["dataset"] == "test.npz"
    assert eval_attacks.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # by a table


def test_what_verdicts_stand_for(monkeypatch):
    net, (x, y) = small_network(), small_images(9)
    x = (255 * x).byte()
    args = argparse.Namespace(n=9, eps=0.1, seed=0, amp=False, data="some/small.npz")

    def file(path="a.pt", x=x, y=y, **change):
        changed = argparse.Namespace(**vars(args) | change)
        found = eval_attacks.verdict_file(changed, Path("runs", path), net, {"epoch": 3}, x, y)
        return found[0], found[1]["dataset"]

    usual = file()[0]
    assert (usual.parent, usual.name[:5], usual.suffix) == (Path("runs"), "a.pt.", ".npz")
    assert file() == (usual, "small.npz")
    assert file(data="elsewhere/small.npz")[0] == usual  # the data is known by what it is
    others = [file("b.pt")[0], file(n=8)[0], file(eps=0.2)[0], file(seed=1)[0], file(amp=True)[0]]
    x[8, 2, 7, 7] += 1
    others.append(file()[0])
    x[8, 2, 7, 7] -= 1
    others.append(file(y=y.flip(0))[0])
    for t in net[4].bias.data, net[1].running_mean:  # parameters and buffers
        before = t.clone()
        t += 1
        others.append(file()[0])
        t.copy_(before)
    monkeypatch.setattr(eval_attacks, "VERSION", 0)
    others.append(file()[0])
    assert len({usual, *others}) == 11
    monkeypatch.setattr(eval_attacks, "CIFAR10", sum(zlib.crc32(image.numpy()) for image in x))
    assert [file(x=x)[1], file(x=x.flip(0))[1], file(x=x[1:])[1]] == [
        *["CIFAR-10"] * 2,
        "small.npz",
    ]


def test_what_was_asked_is_not_asked_again(data, straight, tmp_path, monkeypatch, capsys):
    shutil.copy(straight / "last.pt", tmp_path)
    words = [tmp_path / "last.pt", "--data", data, "--attacks", "nat", "pgd20"]
    evaluate_files(*words)
    first = capsys.readouterr().out
    for name in "nat", "pgd20":
        monkeypatch.setitem(eval_attacks.ATTACKS, name, None)  # cannot be called
    evaluate_files(*words)
    assert capsys.readouterr().out == first


def test_several_checkpoints(data, straight, tmp_path, monkeypatch, capsys):
    paths, figures = [tmp_path / f"{i}.pt" for i in range(2)], tmp_path / "figures.json"
    for path, trained_on in zip(paths, ("toy", str(data)), strict=True):
        checkpoint = load(straight / "last.pt")
        checkpoint["args"]["data"] = trained_on
        torch.save(checkpoint, path)
    monkeypatch.setattr(eval_attacks, "doubts", lambda model, x, y: [f"up to {x.max():.0f}"])
    monkeypatch.setattr(eval_attacks, "masking", lambda figures: [", ".join(figures)])
    words = ["--data", data, "--attacks", "pgd20", "nat", "--json", figures]
    evaluate_files(*paths, *words)
    out, err = capsys.readouterr()
    assert [row.split()[1] for row in out.splitlines()[-2:]] == [*map(str, paths)]
    told = json.loads(figures.read_text())
    assert [of["checkpoint"] for of in told] == [*map(str, paths)]
    warnings = ["up to 1", "pgd20, nat", f"trained on toy, evaluated on {data}"]
    assert [of["warnings"] for of in told] == [warnings, warnings[:2]]
    said = [f"warning: {of['checkpoint']}: {text}" for of in told for text in of["warnings"]]
    assert err.splitlines() == said


def test_a_new_attack_gets_its_column(data, straight, monkeypatch, capsys):
    grey = lambda model, x, y, *, eps, **_: x + (0.5 - x).clamp(-eps, eps)  # noqa: E731
    monkeypatch.setitem(eval_attacks.ATTACKS, "grey", grey)
    monkeypatch.setattr(eval_attacks, "COLUMNS", ["nat", "grey"])
    words = [str(straight / "last.pt"), "--data", str(data), "--attacks", "nat", "grey"]
    eval_attacks.main([*words, "--device", "cpu"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].endswith("| NAT | GREY |")
    assert rows[4].count("[") == 2


def test_which_state_dict_is_said(data, tmp_path, capsys):
    state, figures = models.build("wrn-10-1", 5).state_dict(), tmp_path / "figures.json"
    torch.save({"ema": state, "net": state}, tmp_path / "a.pt")
    evaluate_files(tmp_path / "a.pt", "--data", data, "--attacks", "nat", "--json", figures)
    said = "of the state dicts in the file this is ema, not net"
    assert f"warning: {tmp_path}/a.pt: {said}\n" in capsys.readouterr().err
    (told,) = json.loads(figures.read_text())
    assert told["training"]["state_dict"] == "ema, not net"
    assert said in told["warnings"]


def test_verdicts_that_cannot_be_kept(data, straight, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a b.pt"
    shutil.copy(straight / "last.pt", path)

    def read_only(*_):
        raise PermissionError("read-only folder")

    monkeypatch.setattr(clirat, "write", read_only)
    with pytest.warns(UserWarning, match="verdicts are not kept: read-only folder"):
        evaluate_files(path, "--data", data, "--attacks", "nat", "--n", "7", "--batch-size", "2")
    assert "a b.pt | 7 |" in capsys.readouterr().out


# ---- Processes, threads and pipes ----------------------------------------------------------------


def evaluate_at_once(rank, folder, checkpoint, data, barrier):
    torch.set_num_threads(1)
    attacks = ["nat", "pgd20", "cw"], ["nat", "fgsm", "pgd20"]
    for i in range(12):
        path = folder / f"{i}.pt"
        if rank == 0:
            shutil.copy(checkpoint, path)
        barrier.wait()
        with open(folder / f"{rank}.err", "a") as file, contextlib.redirect_stderr(file):
            words = ["--data", data, "--n", "12", "--batch-size", "3", "--attacks"]
            evaluate_files(path, *words, *attacks[rank if i % 2 else 0])


def test_two_evaluations_at_once_lose_nothing(data, straight, tmp_path, capfd):
    context = torch.multiprocessing.get_context("spawn")
    arguments = (tmp_path, straight / "last.pt", data, context.Barrier(2))
    torch.multiprocessing.spawn(evaluate_at_once, arguments, nprocs=2)
    assert (tmp_path / "0.err").read_text() == (tmp_path / "1.err").read_text() == ""
    found = [eval_attacks.read_verdicts(*tmp_path.glob(f"{i}.pt.*.npz"))[0] for i in range(12)]
    for i, verdicts in enumerate(found):
        assert verdicts.keys() == {"nat", "pgd20", "cw", *(["fgsm"] if i % 2 else [])}
        assert all((verdict >= 0).all() for verdict in verdicts.values())
        assert all(torch.equal(v, found[1][name]) for name, v in verdicts.items())
    assert not any(tmp_path.glob("*.tmp"))


def test_verdicts_wait_for_the_lock(tmp_path):
    path, verdicts = tmp_path / "a.npz", {"nat": torch.zeros(3, dtype=torch.int8)}
    held = clirat.locked(tmp_path / ".verdicts.lock")
    held.__enter__()
    thread = threading.Thread(target=eval_attacks.keep, args=(path, {}, verdicts))
    thread.start()
    thread.join(0.5)
    assert not path.exists()
    held.__exit__(None, None, None)
    thread.join(10)
    assert path.exists()


@pytest.mark.parametrize("processes", [2, 5])
def test_shares_of_an_evaluation(processes):
    net, (x, y), attacks = small_network().eval(), small_images(13), ["pgd20", "aa"]
    evaluate = functools.partial(eval_attacks.evaluate, net, (255 * x).byte(), y, attacks, eps=0.02)
    shares = [evaluate(share=(i, processes)) for i in range(processes)]
    for i, verdicts in enumerate(shares):
        others = torch.arange(13) % processes != i
        assert all((verdict[others] == -1).all() for verdict in verdicts.values())
    merged = {name: torch.stack([v[name] for v in shares]).amax(0) for name in shares[0]}
    assert same(merged, evaluate())
    for share in (2, 2), (-1, 2), (0, 0):
        with pytest.raises(ValueError, match="want share"):
            evaluate(share=share)


@pytest.mark.parametrize("stderr", [None, types.SimpleNamespace(write=print, flush=print)])
def test_without_a_stderr(stderr, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr", stderr)  # None: closed, as by 2>&-
    run(data, "--out", tmp_path, "--epochs", "1")
    evaluate_files(tmp_path / "last.pt", "--data", data, "--attacks", "nat", "pgd20")
    assert load(tmp_path / "last.pt")["epoch"] == 1


def test_in_a_thread(data, tmp_path):
    def work():
        run(data, "--out", tmp_path, "--epochs", "1")
        evaluate_files(tmp_path / "last.pt", "--data", data, "--attacks", "nat")

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert any(tmp_path.glob("last.pt.*.npz"))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_ctrl_c(data, straight, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    shutil.copy(straight / "last.pt", tmp_path)
    monkeypatch.setattr(eval_attacks, "evaluate", stop)
    with pytest.raises(SystemExit, match="130"):
        evaluate_files(tmp_path / "last.pt", "--data", data)
    said = "\neval_attacks.py: stopped: Ctrl-C; the same command goes on from there\n"
    assert capsys.readouterr().err == said
    figures = iter([(0.1, 0.1)])
    accuracy = lambda *_: next(figures, None) or stop()  # noqa: E731  in the second epoch
    monkeypatch.setattr(clirat, "nat_and_pgd20", accuracy)
    with pytest.raises(SystemExit, match="130"):
        run(data, "--out", tmp_path / "run")
    said = f"stopped: Ctrl-C; saved up to epoch 1: --resume --out {tmp_path}/run goes on\n"
    assert capsys.readouterr().err == f"\nclirat.py: {said}"
    assert load(tmp_path / "run" / "last.pt")["epoch"] == 1
    fork = "--out", tmp_path / "fork", "--method", "mail-at", "--init", tmp_path / "run" / "last.pt"
    with pytest.raises(SystemExit, match="130"):
        run(data, *fork, "--epochs", "3")
    said = "stopped: Ctrl-C; nothing is saved yet: run it again\n"
    assert capsys.readouterr().err == f"\nclirat.py: {said}"
    monkeypatch.undo()
    run(data, *fork, "--epochs", "3")  # as it says
    assert load(tmp_path / "fork" / "last.pt")["epoch"] == 3


def test_a_closed_pipe(data, tmp_path):
    common = ["--data", str(data), "--device", "cpu"]
    train = ["clirat.py", "--arch", "wrn-10-1", "--batch-size", "20", "--epochs", "9999", *common]
    attack = ["eval_attacks.py", str(tmp_path / "last.pt"), "--attacks", "nat", *common]
    for command, hint in (
        ([*train, "--out", str(tmp_path)], f"--resume --out {tmp_path} goes on"),
        (attack, "the same command goes on from there"),
    ):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        buffered = os.environ | {"PYTHONUNBUFFERED": ""}
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=buffered, **pipes)
        process.stdout.readline()
        process.stdout.close()  # as by | head -1
        err = process.stderr.read()
        assert process.wait() == 1
        assert f"{command[0]}: stopped: [Errno 32] Broken pipe" in err
        assert err.strip().endswith(hint)
        assert "ignored" not in err
        assert "Traceback" not in err


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
    options = {"eps": 0.02, "seed": 0, "batch_size": 4, "amp": False, "data": ""}
    asked = argparse.Namespace(attacks=["pgd20", "apgd"], **options)
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


def test_torchrun(data, tmp_path):
    def launched(*words):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
        command = [sys.executable, *command, *map(str, words), "--device", "cpu", "--data", data]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        return run.stdout

    train = "clirat.py --arch wrn-10-1 --batch-size 20 --steps 2 --epochs 2 --out"
    out = launched(*train.split(), tmp_path)
    assert [line.split()[0] for line in out.splitlines()] == [
        "clirat,", "epoch", "epoch", "NAT", "PGD", "Evaluate"
    ]  # fmt: skip
    names = {"args.json", "best.pt", "burnin.pt", "last.pt", "log.csv", ".run.lock"}
    assert {path.name for path in tmp_path.iterdir()} == names
    path, attacks = tmp_path / "last.pt", ["nat", "pgd20"]
    out = launched("eval_attacks.py", path, "--attacks", *attacks)
    assert [line.count("|") for line in out.splitlines()] == [0, 0, 6, 6, 6]
    verdicts, _ = eval_attacks.read_verdicts(*tmp_path.glob("last.pt.*.npz"))
    (net, _), images = models.load(path), clirat.load_data(str(data), ["test"])
    assert same(verdicts, eval_attacks.evaluate(net, *images, attacks, eps=8 / 255))
    figures = eval_attacks.summarise(verdicts, attacks)
    cells = [cell.split()[0] for cell in out.splitlines()[-1].split("|")[4:6]]
    assert cells == [f"{figures[name]['accuracy']:.2f}" for name in attacks]
