"""What only a GPU can show, the most valuable first; each test takes less than a minute there.

    python -m pytest -x -q .ci/test_cuda.py
    DEVICE=cpu python -m pytest -q .ci/test_cuda.py    tries this file without a GPU, on small sizes

All tests but these run on a GPU's machine as on any other.
"""

import functools
import importlib.util
import os
from unittest import mock

import pytest
import torch

import clirat
import eval_attacks
import models
import peer
import speed
from conftest import load
from test_kills import ended, logged, start, waits_for
from test_training import torchrun

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
CUDA = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no GPU")
needs_cuda = pytest.mark.skipif(not CUDA, reason="DEVICE=cpu")
TOY = ["--data=toy", "--train-size=300", "--arch=wrn-10-1", "--steps=2"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """No TF32, and the same algorithms each time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")


def trained(words, data):
    """The log's row and the network's state after an epoch past the burn-in."""
    args, net, optimizer, attack, x, y = speed.prepare(words, data, DEVICE)
    torch.manual_seed(0)
    row = clirat.train_epoch(args, args.epochs, net, attack, optimizer, x, y)
    return row, net.state_dict()


WRN = "--arch=wrn-10-1 --steps=5"
CASES = [f"{WRN} --method={method}" for method in clirat.METHODS]
if CUDA:
    CASES += ["--arch=resnet18", "--arch=resnet18 --amp", *(f"{case} --amp" for case in CASES)]


@pytest.mark.parametrize("words", CASES)
def test_graphs_equal_plain_pytorch(words):
    """Losses, weights, parameters and statistics bit for bit."""
    size, steps = (64, 20) if CUDA else (8, 3)
    words = [*words.split(), f"--batch-size={size}", "--lr=0.01"]
    data = speed.images(steps * size - size // 2 + 1)  # the last batch is smaller
    recorded = trained(words, data)
    with mock.patch.object(models, "graphed", lambda function, device: function):
        plain = trained(words, data)
    assert recorded[0] == plain[0]
    assert all(map(torch.equal, recorded[1].values(), plain[1].values()))


@needs_cuda
@pytest.mark.parametrize("method", clirat.METHODS)
@pytest.mark.parametrize("words", ["", "--amp --exclude=multi --weight-norm=mail"])
def test_no_step_waits_for_the_device(method, words):
    words = [*WRN.split(), f"--method={method}", *words.split(), "--batch-size=64"]
    args, net, optimizer, attack, x, y = speed.prepare(words, speed.images(64), DEVICE)
    net.train()

    def step():
        case = clirat.augment(x), y
        return clirat.train_step(args, args.epochs, net, attack, optimizer, *case)

    step()  # records
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_recorded_anew(tmp_path):
    """Neither for a drop of the learning rate nor for the end of the burn-in."""
    words = ["--epochs=8", "--eval-size=128", "--lr=0.1"]
    with mock.patch.object(torch.cuda, "graph", wraps=torch.cuda.graph) as graph:
        clirat.main([*TOY, *words, f"--device={DEVICE}", f"--out={tmp_path}"])
    # batches of 128 and 44 in training, of 128 and, at the end, 500 - 3 * 128 in evaluation
    assert graph.call_count == (4 if CUDA else 0)
    rates = [row["lr"] for row in load(tmp_path / "last.pt")["log"]]
    assert rates == pytest.approx([0.1] * 5 + [0.01] + [0.001] * 2)


def test_torchrun(tmp_path):
    """With NCCL, on all GPUs."""
    words = ["--batch-size=64", "--epochs=2", f"--device={DEVICE}"]
    processes = torch.cuda.device_count() if CUDA else 1
    torchrun(processes, clirat, *TOY, *words, f"--out={tmp_path}")
    assert logged(tmp_path) == 2


@functools.cache
def attacked():
    """A network that withstands some attacks, images (N, 3, 32, 32) and labels."""
    n, steps, size = (128, 150, 128) if CUDA else (4, 3, 16)
    arrays = clirat.toy_data(steps * size, n, size=32)
    data = [torch.from_numpy(a.transpose(0, 3, 1, 2) if a.ndim == 4 else a) for a in arrays]
    words = ["--arch=resnet18" if CUDA else "--arch=wrn-10-1", "--method=at", "--amp"]
    args, net, *rest = speed.prepare([*words, f"--batch-size={size}"], data, DEVICE)
    optimizer, attack, x, y = rest
    clirat.train_epoch(args, 1, net, attack, optimizer, x, y)
    return net.eval(), data[2].to(DEVICE), data[3].to(DEVICE)


@functools.cache
def robust(amp):
    options = {"eps": 8 / 255, "batch_size": 512 if amp else 128, "amp": amp}
    return eval_attacks.robust_in(eval_attacks.evaluate(*attacked(), ["aa"], **options), "aa")


def test_autoattack_in_bfloat16():
    assert 0 < robust(amp=False).sum() < 128 or not CUDA
    assert (robust(amp=True) != robust(amp=False)).float().mean() <= 0.02


@pytest.mark.skipif(not importlib.util.find_spec("pyautoattack"), reason="no pyautoattack")
def test_autoattack_against_pyautoattack():
    assert torch.equal(peer.theirs(*attacked(), eps=8 / 255), robust(amp=False))


def test_killed_and_resumed(tmp_path):
    words = [*TOY, "--epochs=9", "--eval-every=0", f"--out={tmp_path}"]
    process = start(clirat, *words, device=str(DEVICE))
    assert waits_for(lambda: logged(tmp_path) >= 2, process)
    process.kill()
    process.communicate()
    assert logged(tmp_path) < 9
    assert ended(start(clirat, "--resume", f"--out={tmp_path}", device=str(DEVICE)), 0) == ""
    assert [row["epoch"] for row in load(tmp_path / "last.pt")["log"]] == [*range(1, 10)]
