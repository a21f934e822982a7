"""Networks, their folded copies, other people's checkpoints."""

import argparse
import collections
import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import models
from conftest import OnesOwn, evaluate, load, run, same


def test_resnet18_is_torchvisions():
    net, peer = models.build("resnet18"), torchvision.models.resnet18(num_classes=10)
    peer.conv1, peer.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    state, x = net.state_dict(), torch.rand(2, 3, 16, 16)
    names = [k.replace("shortcut", "downsample").replace("linear", "fc") for k in state]
    peer.load_state_dict(dict(zip(names, state.values(), strict=True)))
    torch.testing.assert_close(net(x), peer(x))


SIZES = {"resnet18": 11_173_962, "wrn-28-10": 36_479_194, "wrn-34-10": 46_160_474}  # as published
SIZES |= {"wrn-32-10": SIZES["wrn-34-10"]}  # counted differently


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
    assert models.Folded(net, torch.bfloat16)(x).dtype == x.dtype
    kinds = [type(module) for module in folded.modules()]
    assert kinds.count(nn.BatchNorm2d) == 0
    assert kinds.count(models.Affine) == (0 if arch == "resnet18" else 3)  # that follow a sum
    x = x[:, :, :5]
    torch.testing.assert_close(models.pooled(x), F.adaptive_avg_pool2d(x, 1).flatten(1))


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
    left = {type(module) for module in folded.modules()} & {models.Affine, nn.BatchNorm2d}
    assert kind != "plain" or not left


@pytest.fixture
def own(monkeypatch):
    """The networks of `OnesOwn` can be built by their names."""
    build = models.build
    kinds = {"own": "plain", "types": "types", "half": "half"}

    def known(name, k=10):
        return OnesOwn(kinds[name], k) if name in kinds else build(name, k)

    monkeypatch.setattr(models, "build", known)


def test_a_copy_that_is_another_function_is_refused(own, data, tmp_path, refused):
    x = torch.rand(4, 3, 8, 8)
    for zeros in False, True:  # a last layer of zeros hides nothing
        net = OnesOwn("types")
        net.fc.weight.data *= not zeros
        with pytest.raises(ValueError, match="copy of OnesOwn to attack is another function"):
            models.check_folding(net, x)
    models.check_folding(OnesOwn("half"), x)
    with pytest.raises(ValueError, match=r"to attack fails in torch\.bfloat16 .*: does its"):
        models.check_folding(OnesOwn("half"), x, torch.bfloat16)
    with pytest.raises(ValueError, match=r"to attack fails .'Identity' object has"):
        models.check_folding(OnesOwn("reads"), x)
    for words in ["--arch", "types"], ["--arch", "half", "--amp"]:
        said = "clirat.py: error: the copy of OnesOwn to attack "
        refused(said, run, data, "--out", tmp_path / "run", *words)
        assert not (tmp_path / "run").exists()


def test_a_network_of_ones_own(own, data, tmp_path, capsys, refused):
    """A run says which network it is of; weights alone need --arch."""
    run(data, "--out", tmp_path, "--arch", "own")
    weights, words = load(tmp_path / "last.pt")["model"], ["--data", data, "--attacks", "nat"]
    torch.save(weights, tmp_path / "alone.pt")
    for file, *named in ["last.pt"], ["alone.pt", "--arch", "own"]:
        evaluate(tmp_path / file, *words, *named)
        assert f"| {tmp_path / file} | 30 | 8/255 |" in capsys.readouterr().out
    assert same(models.load(tmp_path / "last.pt")[0].state_dict(), weights)
    said = "other networks are evaluated from Python, or by --arch if models.build knows them"
    refused(said, evaluate, tmp_path / "alone.pt", *words)


def test_a_replay_leaves_earlier_results_alone(fake_cuda):
    double = models.graphed(lambda x: (2 * x,), torch.device("cuda"))
    results = [double(torch.full((3,), float(i)))[0] for i in range(3)]
    assert torch.stack(results).tolist() == [[0] * 3, [2] * 3, [4] * 3]
    assert len(fake_cuda) == 1


@pytest.mark.parametrize("name", ["resnet18", "wrn-10-2", "wrn-16-1"])
def test_other_peoples_checkpoints(name, tmp_path):
    net, path = models.build(name, 5), tmp_path / "theirs.pt"
    state, x = net.state_dict(), torch.rand(2, 3, 16, 16)
    expected = net.eval()(x)
    beside = {"epoch": 3, "best": np.float64(0.5), "path": Path("a/b"), "arch": "ResNet18"}
    beside |= {"rng": np.random.get_state(), "seen": np.int64(7)}
    beside |= {"optimizer": {"state": {}}, "args": argparse.Namespace(lr=0.1, out=Path("x"))}
    files = [{key: state} | beside for key in ("net", "model", "state_dict", "weights")]
    prefixes = ["1.", "module.", "model.", "_orig_mod.", "module.module.", "module._orig_mod."]
    prefixes += ["_orig_mod.module."]
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


def test_checkpoints_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    torch.save(WRN, tmp_path / "a.pt")
    assert same(models.load(tmp_path / "a.pt")[0].state_dict(), WRN)


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def archive():
    np.savez(file := io.BytesIO(), weights=np.zeros(3))
    return file.getvalue()


WRN = models.build("wrn-10-1").state_dict()
REFUSED = {
    "code": (RunsCode(), "module.*state_dict"),
    "module": (nn.Linear(2, 2), "defaultdict, module"),
    "defaultdict": (collections.defaultdict(int, WRN), "defaultdict.*torch.save"),
    "list": ([1, 2], "no state dict .*list"),
    "other keys": ({"model": {"a": torch.ones(1)}}, "no weights of ResNet-18"),
    "web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "safetensors": (b'\x40\0\0\0\0\0\0\0{"conv1.weight":', "safetensors"),
    "npz": (archive(), ".npz"),
    "empty": (b"", "damaged"),
    "nan": (WRN | {"fc.bias": torch.tensor([math.nan, *[0.0] * 9])}, "not finite"),
    "normalising": (WRN | {"mean": torch.ones(3)}, "mean is .3,., not known"),
    "deeper": (WRN | {"block1.conv3.weight": torch.ones(1)}, "WideResNet .block1.conv3.weight is"),
}


@pytest.mark.parametrize("what", [*REFUSED, "TorchScript"])
@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_refused_checkpoints(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = REFUSED.get(what, (None, what))
    path = tmp_path / "theirs.pt"
    if content is None:
        torch.jit.script(nn.Linear(2, 2)).save(path)
    else:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert "\n" not in str(error.value)
    assert not Path("hacked").exists()
