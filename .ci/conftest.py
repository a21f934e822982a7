"""What the tests of this folder share: small networks, small data, a finished run."""

import contextlib
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clirat
import eval_attacks
import models

torch.set_num_threads(1)  # enough for tensors of this size
ROOT = Path(clirat.__file__).parent


def small_network(k=10, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, k)]
    return nn.Sequential(*layers)


def small_images(n=12):
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, 8, 8, generator=generator).round(decimals=1)  # some at exactly 0 and 1
    return x, torch.arange(n) % 10


def linear_network(weight):
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    net[1].weight.data = weight
    return net


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OnesOwn(nn.Module):
    """Networks of somebody else's, whose BatchNorms do not simply follow convolutions."""

    def __init__(self, kind="plain", k=10):
        super().__init__()
        self.kind, self.mean, self.mask = kind, torch.full((3, 1, 1), 0.5), None
        self.conv1, self.conv2 = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        norms = {"subclass": Doubled(3), "no parameters": nn.BatchNorm2d(3, affine=False)}
        norms |= {"no statistics": nn.BatchNorm2d(3, track_running_stats=False)}
        self.bn1 = norms.get(kind, nn.BatchNorm2d(3, eps=0.1))  # registered after both convolutions
        self.bn2 = self.bn1 if kind == "two names" else nn.BatchNorm2d(3)
        self.last, self.fc = nn.BatchNorm1d(3), nn.Linear(3, k)
        if kind == "tied weight":
            self.conv2.weight = self.conv1.weight
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x):
        x = x - self.mean if self.kind == "plain tensor" else x  # that `to` does not move
        out = self.conv1(x.float() if self.kind == "half" else x)
        match self.kind:
            case "keeps a tensor":
                self.mask = torch.ones_like(x[:1, :1]) if self.mask is None else self.mask
                out = self.bn1(out).mul(self.mask)[:, self.order]
            case "keyword":
                out = self.bn2(input=self.bn1(input=out))
            case "reads":
                out = self.bn1(out).mul(self.bn1.weight.mean())
            case "output used twice":
                out = self.bn1(out).add(out)
            case "weight used twice":
                out = self.bn1(out).add(F.conv2d(x, self.conv1.weight, padding=1))
            case "before":
                out = self.conv2(self.bn2(self.bn1(x))).relu()
            case "values":
                out = out if x.mean() > 9 else self.bn1(out)
            case "types":  # what a tracer does not see
                out = self.bn1(out + 1 if isinstance(out, torch.Tensor) else out)
            case _:
                out = self.bn2(self.conv2(self.bn1(out).relu())).relu()
        return self.fc(self.last(out.mean((2, 3))))


SHORT_ATTACKS = eval_attacks.ATTACKS | {
    "apgd-t": partial(eval_attacks.apgd, loss="targeted", steps=20),
    "dlr": partial(eval_attacks.apgd, loss="dlr"),
    "fab-t": partial(eval_attacks.fab_t, steps=20),
    "square": partial(eval_attacks.square, queries=200),
}


@pytest.fixture
def shortened(monkeypatch):
    attacks = {name: SHORT_ATTACKS[name] for name in eval_attacks.ATTACKS}
    monkeypatch.setattr(eval_attacks, "ATTACKS", attacks)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of 50 training and 30 test images, 8 x 8, of five classes."""
    path, rng = tmp_path_factory.mktemp("data") / "small.npz", np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8), np.arange(80) % 5
    test = {"x_test": images[50:], "y_test": labels[50:]}
    np.savez(path, x_train=images[:50], y_train=labels[:50], **test)
    np.savez(path.with_name("test.npz"), **test)
    return path


def run(data, *words):
    options = "--arch wrn-10-1 --batch-size 20 --steps 2 --eval-size 20 --epochs 3 --burn-in 1"
    options = [*options.split(), "--device", "cpu", "--data", str(data)]
    clirat.main([*options, *map(str, words)])


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(data, "--out", out)
    return out


def evaluate(*words):
    eval_attacks.main([*map(str, words), "--device", "cpu"])


@pytest.fixture
def refused(capsys):
    """Whether a call ends with status 2 and one line, or argparse's two, that has `message`."""

    def check(message, program, *args):
        with pytest.raises(SystemExit, match="2"):
            program(*args)
        lines = capsys.readouterr().err.splitlines()
        said = [line for line in lines if not line.startswith("note: ")]
        assert message in said[-1]
        assert len(said) == 1 + said[0].startswith("usage: ")

    return check


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


load = partial(torch.load, weights_only=True)
TIMING = "seconds", "images_per_s"


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal bit for bit, but for their timing."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMING)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_run(one, other):
    ours, theirs = (load(folder / "last.pt") for folder in (one, other))
    return all(same(ours[k], theirs[k]) for k in ("model", "optimizer", "log", "epoch"))


class FakeGraph:
    """Keeps the last call of a function before it is recorded, and makes it again to replay it."""

    @contextlib.contextmanager
    def record(self, *_, **__):
        yield
        self.function, self.inputs, self.outputs = FakeGraph.last
        FakeGraph.shapes.append(tuple(self.inputs[0].shape))

    def replay(self):
        for old, new in zip(self.outputs, self.function(*self.inputs), strict=True):
            old.copy_(new)


@pytest.fixture
def fake_cuda(monkeypatch):
    """All runs on the CPU, but through the code for CUDA graphs: the shapes it is recorded for."""
    fakes = dict.fromkeys(["Stream", "current_stream", "graph_pool_handle"], mock.MagicMock())
    fakes |= {"stream": contextlib.nullcontext, "CUDAGraph": FakeGraph, "graph": FakeGraph.record}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphed, FakeGraph.shapes = models.graphed, []

    def on_cuda(function, device):
        def noted(*inputs):
            FakeGraph.last = function, inputs, function(*inputs)
            return FakeGraph.last[2]

        return graphed(noted, torch.device("cuda"))

    monkeypatch.setattr(models, "graphed", on_cuda)
    monkeypatch.setattr(eval_attacks, "graph_device", lambda model: torch.device("cuda"))
    return FakeGraph.shapes
