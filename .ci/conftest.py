"""What the tests of this folder share: small networks, small data, a finished run."""

import contextlib
import io
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import clirat
import eval_attacks
import models

torch.set_num_threads(1)  # enough for tensors of this size


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


def run(data, *words):
    options = "--arch wrn-10-1 --batch-size 20 --steps 2 --eval-size 20 --epochs 3 --burn-in 1"
    options = [*options.split(), "--device", "cpu", "--data", str(data)]
    clirat.main([*options, *map(str, words)])


TIMING = "seconds", "images_per_s"


def same(a, b):
    """Whether two checkpoints, or parts of them, are equal bit for bit, but for their timing."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMING)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


load = partial(torch.load, weights_only=True)


def same_run(one, other):
    ours, theirs = (load(folder / "last.pt") for folder in (one, other))
    return all(same(ours[k], theirs[k]) for k in ("model", "optimizer", "log", "epoch"))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A file of 50 training and 30 test images, 8 x 8, of five classes."""
    path, rng = tmp_path_factory.mktemp("data") / "small.npz", np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8), np.arange(80) % 5
    train, test = (
        {"x_train": images[:50], "y_train": labels[:50]},
        {"x_test": images[50:], "y_test": labels[50:]},
    )
    np.savez(path, **train, **test)
    np.savez(path.with_name("test.npz"), **test)
    return path


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(data, "--out", out)
    return out


class Terminal(io.StringIO):
    def isatty(self):
        return True


class FakeGraph:
    """Records what a function was called with, and calls it again to replay it."""

    recording = None

    def replay(self):
        function, inputs, outputs = self.call
        for old, new in zip(outputs, function(*inputs), strict=True):
            old.copy_(new)


@contextlib.contextmanager
def fake_recording(graph, *_, **__):
    FakeGraph.recording = graph
    yield
    FakeGraph.recording = None


@pytest.fixture
def fake_cuda(monkeypatch):
    """Everything runs on the CPU, but through the code for CUDA graphs."""
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"Stream": lambda device: stream, "current_stream": lambda device: stream}
    fakes |= {"stream": contextlib.nullcontext, "graph_pool_handle": lambda: None}
    fakes |= {"CUDAGraph": FakeGraph, "graph": fake_recording}
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphed, recorded = models.graphed, []

    def on_cuda(function, device):
        def noted(*inputs):
            outputs = function(*inputs)
            if FakeGraph.recording:
                FakeGraph.recording.call = function, inputs, outputs
                recorded.append([tuple(t.shape) for t in inputs])
            return outputs

        return graphed(noted, torch.device("cuda"))

    monkeypatch.setattr(models, "graphed", on_cuda)
    monkeypatch.setattr(eval_attacks, "graph_device", lambda model: torch.device("cuda"))
    return recorded
