"""python -m pytest -q    margins first, on vectors small enough to check by hand; then everything built on them."""

import argparse
import contextlib
import inspect
import io
import json
import math
import os
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import clirat
import eval_attacks
import models
from clirat import at_loss, cl_pm, instance_weights, mart_loss, pgd, pm, trades_loss

# ---- Margins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "label", "expected_pm", "expected_cl_pm"),
    [
        ([0.3, 0.5, 0.2], 0, -0.2, -0.2),  # Fig. 2 A: one confused label
        ([0.3, 0.5, 0.4], 0, -0.2, -0.3),  # Fig. 2 B: a second one at -0.1
        ([0.7, 0.2, 0.1], 0, 0.5, 0.5),  # correct: the other classes do not add up
        ([0.1, 0.2, 0.3, 0.4], 0, -0.3, -0.6),
        ([0.4, 0.4, 0.2], 0, 0.0, 0.0),  # a tie is no confusion
        ([0.2, 0.2, 0.6], 0, -0.4, -0.4),  # nor is a tie with a class that is not the largest
        ([1.0, 0.0], 0, 1.0, 1.0),
        ([1.0, 0.0], 1, -1.0, -1.0),
    ],
)
def test_margins_by_hand(probs, label, expected_pm, expected_cl_pm):
    probs, label = torch.tensor([probs]), torch.tensor([label])
    torch.testing.assert_close(pm(probs, label), torch.tensor([expected_pm]))
    torch.testing.assert_close(cl_pm(probs, label), torch.tensor([expected_cl_pm]))


@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_margins_against_loops(k):
    probs, labels = random_logits(200, k).softmax(1), torch.arange(200) % k
    for row, y, m, c in zip(probs.tolist(), labels.tolist(), pm(probs, labels), cl_pm(probs, labels), strict=True):
        gaps = [row[y] - p for j, p in enumerate(row) if j != y]
        confused = [gap for gap in gaps if gap < 0]
        assert m.item() == pytest.approx(min(gaps), abs=1e-12)
        assert c.item() == pytest.approx(sum(confused) if confused else min(gaps), abs=1e-12)
        assert -1 <= c <= m <= 1
    classes = torch.randperm(k)  # renaming the classes changes nothing
    renamed = cl_pm(probs[:, classes], classes.argsort()[labels])
    torch.testing.assert_close(renamed, cl_pm(probs, labels))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_margins_keep_dtype(dtype):
    probs, labels = random_logits(64, 10).softmax(1), torch.arange(64) % 10
    margins = cl_pm(probs.to(dtype), labels)
    assert margins.dtype == dtype
    torch.testing.assert_close(margins.double(), cl_pm(probs, labels), atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(("probs", "labels"), [((4,), (4,)), ((4, 1), (4,)), ((4, 3), (3,)), ((4, 3), (4, 1))])
@pytest.mark.parametrize("margin", [pm, cl_pm])
def test_margins_refuse_wrong_shapes(margin, probs, labels):
    with pytest.raises(ValueError, match="probs"):
        margin(torch.rand(probs), torch.zeros(labels, dtype=torch.int64))


def test_cl_pm_stands_alone():
    copied = {"torch": torch}
    exec(inspect.getsource(cl_pm), copied)
    probs, labels = torch.tensor([[0.3, 0.5, 0.4]]), torch.tensor([0])
    assert copied["cl_pm"](probs, labels) == cl_pm(probs, labels)


# ---- Weights and losses --------------------------------------------------------------------------------------------


def random_logits(n, k, scale=2.0):
    return scale * torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(n + k))


def test_weights():
    margins = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    weights = instance_weights(margins, 10.0, -0.5)
    raw = [1 / (1 + math.exp(-10 * (-0.5 - m))) for m in margins.tolist()]  # Eq. 6
    torch.testing.assert_close(weights, torch.tensor([9 * w / sum(raw) for w in raw], dtype=torch.float64))  # l.14
    torch.testing.assert_close(instance_weights(margins, 10.0, -0.5, "mail"), 3 * torch.tensor(raw).double())
    assert (weights.diff() < 0).all()
    assert not weights.requires_grad


@pytest.mark.parametrize("gamma", [0.0, 2.0, 1e4, 1e30, 1e300])
@pytest.mark.parametrize("beta", [-0.5, 0.0, 1e6, -1e6])
@pytest.mark.parametrize("margins", [[-0.9, 0.0, 0.7], [0.3, 0.3, 0.3], [-0.5], [1.0, -1.0]])
def test_weights_are_finite(gamma, beta, margins):
    weights = instance_weights(torch.tensor(margins), gamma, beta)
    assert weights.isfinite().all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)


def test_gairat_is_eq_6():
    kappa, steps = torch.arange(11).double(), 10
    raw = (1 + torch.tanh(-1 + 5 * (1 - 2 * kappa / steps))) / 2
    row = clirat.METHODS["gairat"]
    torch.testing.assert_close(instance_weights(kappa / steps, row.gamma, row.beta), raw * len(raw) / raw.sum())


def test_losses_against_loops():
    nat, adv, labels = random_logits(6, 5), random_logits(6, 5), torch.arange(6) % 5
    adv, weights = adv.flip(1), torch.arange(1.0, 7.0).double()
    at, trades, mart = 0.0, 0.0, 0.0
    for z, z_adv, y, w in zip(nat.numpy(), adv.numpy(), labels.tolist(), weights.tolist(), strict=True):
        p, q = (np.exp(v) / np.exp(v).sum() for v in (z, z_adv))
        kl = sum(p * np.log(p / q))
        bce = -np.log(q[y]) - np.log(1.0001 - np.delete(q, y).max())
        at += w * -np.log(q[y]) / 6
        trades += (-np.log(p[y]) + 5 * w * kl) / 6
        mart += (w * bce + 6 * kl * (1 - p[y])) / 6
    assert at_loss(adv, labels, weights).item() == pytest.approx(at)
    assert trades_loss(nat, adv, labels, 5, weights).item() == pytest.approx(trades)
    assert mart_loss(nat, adv, labels, 6, weights).item() == pytest.approx(mart)
    ones = torch.ones(6).double()
    unweighted = [at_loss, partial(trades_loss, nat, trade_off=5), partial(mart_loss, nat, trade_off=6)]
    for loss in (partial(loss, logits_adv=adv, labels=labels) for loss in unweighted):
        assert loss().item() == pytest.approx(loss(weights=ones).item())


def test_loss_gradients_by_finite_differences():
    nat, adv = random_logits(4, 3).requires_grad_(), random_logits(4, 3).flip(1).requires_grad_()
    labels, weights = torch.tensor([0, 1, 2, 0]), torch.tensor([0.5, 2.0, 1.0, 0.5]).double()
    assert torch.autograd.gradcheck(lambda a: at_loss(a, labels, weights), adv)
    assert torch.autograd.gradcheck(lambda n, a: trades_loss(n, a, labels, 5, weights), (nat, adv))
    assert torch.autograd.gradcheck(lambda n, a: mart_loss(n, a, labels, 6, weights), (nat, adv))


def test_losses_survive_a_saturated_softmax():
    nat = torch.tensor([[500.0, 0.0, -500.0], [0.0, 500.0, 0.0]], requires_grad=True)
    adv, labels = (-nat).detach().requires_grad_(), torch.tensor([0, 0])
    for loss in (at_loss(adv, labels), trades_loss(nat, adv, labels, 5), mart_loss(nat, adv, labels, 6)):
        assert loss.isfinite()
        grads = torch.autograd.grad(loss, [nat, adv], allow_unused=True)
        assert all(grad is None or grad.isfinite().all() for grad in grads)


# ---- PGD -----------------------------------------------------------------------------------------------------------


def small_network(k=10, channels=3):
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, k)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("loss", ["ce", "kl", "cw"])
@pytest.mark.parametrize("init", ["normal", "uniform", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_pgd_invariants(loss, init, training):
    net = small_network().train(training)
    net[1].train(training and init != "none")  # now and then with a mode of its own, as in fine-tuning
    x, y = torch.rand(16, 3, 8, 8).round(decimals=1), torch.arange(16) % 10  # with images at exactly 0 and 1
    net(x).sum().backward()
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    before = [t.clone() for t in tensors]
    x_adv = pgd(net, x, y, eps=0.1, step_size=0.02, steps=10, loss=loss, init=init)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert not x_adv.requires_grad
    assert [m.training for m in net] == [training, training and init != "none", training, training, training]
    assert all(p.requires_grad for p in net.parameters())
    assert all(map(torch.equal, before, tensors))
    net.eval()
    if init != "none" or loss != "kl":  # KL has no gradient at x itself
        corner = (x + 0.1 * torch.randn_like(x).sign()).clamp(0, 1)
        objective = {
            "ce": lambda z: F.cross_entropy(z, y),
            "kl": lambda z: clirat.kl(net(x), z).mean(),
            "cw": lambda z: -pm(z, y).mean(),
        }[loss]
        assert objective(net(x_adv)) > objective(net(corner))


@pytest.mark.parametrize("arch", ["resnet18", "wrn-10-2"])
def test_folding_batchnorm_changes_nothing(arch):
    net, x = models.build(arch).double(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for t in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(t, 0.5, 1.5)
    folded = models.folded(net, torch.float64)
    assert net.training
    assert not any(p.requires_grad for p in folded.parameters())
    left = [sum(isinstance(module, kind) for module in folded.modules()) for kind in (nn.BatchNorm2d, models.Affine)]
    assert left == [0, 0 if arch == "resnet18" else 4]  # WRN's bn1 of each block and the last follow a sum
    torch.testing.assert_close(folded(x), net.eval()(x))


def linear_network(weight):
    net = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], len(weight), bias=False))
    net[1].weight.data = weight
    return net


def test_pgd_by_hand():
    net = linear_network(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]))  # margin x_1 - 2 x_2
    x, y = torch.tensor([[[[0.5, 0.2, 0.5]]], [[[0.5, 0.2, 0.5]]]]), torch.tensor([0, 1])
    x_adv, kappa = pgd(net, x, y, eps=0.1, step_size=0.04, steps=3, init="none", return_kappa=True)
    torch.testing.assert_close(x_adv.view(2, 3), torch.tensor([[0.4, 0.3, 0.5], [0.6, 0.1, 0.5]]))
    # margins of the first along the way: 0.1, then 0.1 - 3 * 0.04 = -0.02, then wrong for good
    assert kappa.tolist() == [1, 0]
    for tau, steps_made in ((0, 1), (1, 2), (5, 2.5)):  # FAT: it stops after tau + 1 misclassified iterates
        friendly = pgd(net, x[:1], y[:1], eps=0.1, step_size=0.04, steps=3, init="none", tau=tau).view(3)
        torch.testing.assert_close(friendly[0], torch.tensor(0.5 - 0.04 * steps_made))


# ---- Training ------------------------------------------------------------------------------------------------------


def test_schedule():
    _, args = clirat.parse_args([])
    assert (args.burn_in, args.lr_milestones, args.gamma, args.beta) == (75, [75, 90], 10, -0.5)
    rates = [clirat.learning_rate(epoch, args.lr, args.lr_milestones) for epoch in (1, 75, 76, 90, 91, 120)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    _, args = clirat.parse_args(["--epochs", "16", "--arch", "wrn-10-1"])
    assert (args.burn_in, args.lr_milestones, args.lr, args.weight_decay) == (10, [10, 12], 0.1, 7e-4)


@pytest.mark.parametrize("method", clirat.METHODS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_train_step(method, epoch):
    _, args = clirat.parse_args(f"--method {method} --epochs 2 --burn-in 1 --steps 2".split())
    net = small_network().train()
    before = [p.clone() for p in net.parameters()]
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8)
    sums = clirat.train_step(args, epoch, net, net, torch.optim.SGD(net.parameters(), 0.1), x, y, x)
    assert sums[1:4].sum() == 8
    assert sums[4:7].sum().item() == pytest.approx(8, rel=1e-5)
    assert all(p.grad.abs().sum() > 0 for i, p in enumerate(net.parameters()) if i != 1)  # 1: a bias before BatchNorm
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True) if p.ndim > 1)


@pytest.mark.parametrize("method", ["clirat", "clir-trades"])
def test_compiled_step_equals_the_plain_one(method):
    _, args = clirat.parse_args(["--method", method, "--steps", "2", "--compile"])
    nets, x, y = [small_network().train() for _ in range(2)], torch.rand(8, 3, 8, 8), torch.arange(8)
    for net, fast in zip(nets, (nets[0], torch.compile(nets[1], backend="eager")), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for epoch in (75, 76):
            clirat.train_step(args, epoch, fast, fast, optimizer, x, y, x + 0.001)
    assert all(map(torch.equal, nets[0].state_dict().values(), nets[1].state_dict().values()))


@pytest.mark.parametrize(
    ("method", "epoch", "loss", "tau"),
    [("clirat", 120, "ce", None), ("clir-trades", 1, "kl", None), ("clir-mart", 1, "ce", None)]
    + [("fat", epoch, "ce", tau) for epoch, tau in ((50, 0), (51, 1), (90, 1), (91, 2))],
)
def test_inner_attack(method, epoch, loss, tau, monkeypatch):
    calls = []
    monkeypatch.setattr(clirat, "pgd", lambda *args, **kwargs: calls.append(kwargs) or pgd(*args, **kwargs))
    _, args = clirat.parse_args(["--method", method])
    net, x = small_network().train(), torch.rand(4, 3, 8, 8)
    clirat.train_step(args, epoch, net, net, torch.optim.SGD(net.parameters(), 0.1), x, torch.arange(4), x)
    assert (calls[0]["loss"], calls[0]["tau"], calls[0]["steps"]) == (loss, tau, 10)
    assert (calls[0]["eps"], calls[0]["step_size"]) == (8 / 255, 2 / 255)


def test_exclude():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3], [0.2, 0.3, 0.5], [0.2, 0.5, 0.3]])  # 0, 1, 2, 2 CLs
    y, num_cl = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 2, 2])
    for exclude, dropped in (("single", [1]), ("multi", [2, 3])):
        _, args = clirat.parse_args(["--exclude", exclude])
        weights = clirat.batch_weights(args, probs, y, None, num_cl)
        kept = [i for i in range(4) if i not in dropped]
        assert weights[dropped].tolist() == [0] * len(dropped)
        expected = instance_weights(cl_pm(probs, y)[kept], 10, -0.5) * 4 / len(kept)
        torch.testing.assert_close(weights[kept], expected)
        everyone = torch.full_like(num_cl, len(dropped))  # one or two confused labels each
        assert clirat.batch_weights(args, probs, y, None, everyone).tolist() == [0] * 4


def test_a_step_without_examples_is_skipped():
    net = small_network(k=2)
    net[4].bias.data = torch.tensor([10.0, 0.0])  # all examples of class 1 have one confused label
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    _, args = clirat.parse_args(["--exclude", "single"])
    before = [p.clone() for p in net.parameters()]
    x, y = torch.rand(4, 3, 8, 8), torch.ones(4, dtype=torch.int64)
    sums = clirat.train_step(args, 76, net, net, optimizer, x, y, x)
    assert sums[1:7].tolist() == [0, 4, 0, 0, 0, 0]
    assert all(map(torch.equal, before, net.parameters()))
    clirat.train_step(args, 75, net, net, optimizer, x, y, x)  # but not during the burn-in
    assert not torch.equal(before[0], net[0].weight)


def test_pooled_is_the_mean():
    x = torch.rand(3, 4, 2, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(models.pooled(x), F.adaptive_avg_pool2d(x, 1).flatten(1))
    assert torch.autograd.gradcheck(models.pooled, x)


def test_augment_crops_and_flips():
    x = torch.arange(1, 3 * 6 * 6 + 1).view(1, 3, 6, 6).repeat(64, 1, 1, 1)
    padded = F.pad(x[0], (4, 4, 4, 4))
    crops = [padded[:, i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    crops = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(2))}
    torch.manual_seed(0)
    seen = {tuple(image.flatten().tolist()) for image in clirat.augment(x)}
    assert seen <= crops
    assert len(seen) > 30


def run(data, *words):
    options = f"--data {data} --arch wrn-10-1 --batch-size 20 --steps 2 --eval-size 20 --epochs 3 --burn-in 1"
    clirat.main([*options.split(), *map(str, words)])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("seconds", "images_per_s"))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 50 training and 30 test images, 8 x 8, of five classes."""
    path, rng = tmp_path_factory.mktemp("data") / "small.npz", np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (80, 8, 8, 3), dtype=np.uint8), np.arange(80) % 5
    np.savez(path, x_train=images[:50], y_train=labels[:50], x_test=images[50:], y_test=labels[50:])
    return path


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(data, "--out", out)
    return out


def test_run_resume_and_init(data, straight, tmp_path, monkeypatch, capsys):
    assert {p.name for p in straight.iterdir()} == {".lock", "args.json", "best.pt", "burnin.pt", "last.pt", "log.csv"}
    log = np.genfromtxt(straight / "log.csv", delimiter=",", names=True)
    assert log.dtype.names == tuple(clirat.LOG)
    np.testing.assert_allclose(log["adv_correct"] + log["single_cl"] + log["multi_cl"], 1, atol=1e-5)
    assert log["ess"][0] == 1  # weights from the epoch after the burn-in on
    assert (log["ess"][1:] < 1).all()
    net, metadata = models.load(straight / "last.pt")
    assert not net.training
    assert (metadata["arch"], metadata["method"], metadata["epoch"]) == ("wrn-10-1", "clirat", 3)

    save = clirat.save_log  # a resumed run equals one that was never stopped
    monkeypatch.setattr(clirat, "save_log", lambda path, rows: save(path, rows) if len(rows) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(data, "--out", tmp_path / "resumed")
    monkeypatch.undo()
    run(data, "--out", tmp_path / "resumed", "--resume")
    run(data, "--out", tmp_path / "burn", "--method", "at")  # and so does one that starts from another method's burn-in
    run(data, "--out", tmp_path / "init", "--init", tmp_path / "burn" / "burnin.pt")
    run(data, "--out", tmp_path / "init-at", "--init", tmp_path / "burn" / "burnin.pt", "--method", "at")
    for one, other in (("straight", "resumed"), ("straight", "init"), ("burn", "init-at")):
        folders = (straight if name == "straight" else tmp_path / name for name in (one, other))
        ours, theirs = (torch.load(folder / "last.pt", weights_only=True) for folder in folders)
        assert all(same(ours[k], theirs[k]) for k in ("model", "optimizer", "log", "epoch"))

    capsys.readouterr()
    (tmp_path / "burn" / "burnin.pt").rename(tmp_path / "moved.pt")
    run(data, "--out", tmp_path / "init", "--resume")  # needs the file of --init no longer
    assert capsys.readouterr().err == ""
    (tmp_path / "init" / "last.pt").unlink()  # without which only --init says where the run began
    with pytest.raises(SystemExit):
        run(data, "--out", tmp_path / "init", "--resume")
    assert "init was" in capsys.readouterr().err
    run(data, "--out", tmp_path / "other", "--init", tmp_path / "moved.pt", "--weight-decay", "0.1")
    err = capsys.readouterr().err
    assert err == f"note: {tmp_path / 'moved.pt'} was trained with other settings: weight_decay was 0.0007, not 0.1\n"


def test_nonfinite_loss_stops(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clirat, "at_loss", lambda logits, *_: logits.sum() * torch.nan)
    with pytest.raises(SystemExit) as stop:
        run(data, "--out", tmp_path / "run")
    assert stop.value.code == 1
    assert "epoch 1, batch 1: the loss is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "last.pt").exists()


# ---- AutoAttack ----------------------------------------------------------------------------------------------------


def test_schedules_by_hand():
    assert list(eval_attacks.apgd_checks(100)) == [21, 40, 56, 69, 79, 86, 92, 98]
    sides = [eval_attacks.square_side(q, 32, 32) for q in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001)]
    assert sides == [29, 29, 20, 14, 10, 7, 5, 4, 3]


def test_dlr_by_hand():
    z, y, t = torch.tensor([[4.0, 1.0, 3.0, 0.0]]), torch.tensor([0]), torch.tensor([3])
    assert eval_attacks.dlr_loss(z, y).item() == pytest.approx(-1 / 3)  # -(4 - 3) / (4 - 1)
    assert eval_attacks.dlr_loss(z, t).item() == pytest.approx(4 / 3)  # -(0 - 4) / (4 - 1)
    assert eval_attacks.dlr_targeted_loss(z, y, t).item() == pytest.approx(-4 / 3.5)  # -(4 - 0) / (4 - (1 + 0) / 2)
    assert eval_attacks.dlr_targeted_loss(5 * z + 7, y, t).item() == pytest.approx(-4 / 3.5)  # shift, scale invariant
    with pytest.raises(ValueError, match="4 classes"):
        eval_attacks.dlr_targeted_loss(z[:, :3], y, y)


def test_projection_against_a_search():
    rng = torch.Generator().manual_seed(0)
    t, w = (torch.rand(200, 12, generator=rng, dtype=torch.float64) for _ in range(2))
    t, w = (1.4 * t - 0.2).clamp(0, 1), 2 * w - 1  # some pixels at 0 and 1
    w[:20, :6], w[0] = 0, 0
    b = (w * t).sum(1) + 6 * torch.rand(200, generator=rng, dtype=torch.float64) - 3  # many out of reach
    for t_, w_, b_, d in zip(t, w, b, eval_attacks.project(t, w, b), strict=True):
        sign = 1 if w_ @ t_ >= b_ else -1
        low, high = 0.0, 1.0
        for _ in range(60):  # the smallest level whose step towards the plane, cut at the box, reaches it
            level = (low + high) / 2
            reached = (t_ - level * sign * w_.sign()).clamp(0, 1)
            low, high = (level, high) if sign * (w_ @ reached - b_) > 0 else (low, level)
        expected = (t_ - high * sign * w_.sign()).clamp(0, 1) - t_
        torch.testing.assert_close(d, expected, atol=1e-12, rtol=0)


def test_a_point_keeps_one_image_of_its_first_target():
    def everything_succeeds(point, rank, record):
        assert not record(point, rank >= 0, eval_attacks.widen(rank + 1.0).expand(-1, 3, 8, 8)).any()

    x_adv = eval_attacks.attack_pairs(everything_succeeds, torch.zeros(24, 3, 8, 8), 9, 128)
    assert (x_adv == 1).all()


def test_linear_network_has_a_known_radius():
    torch.manual_seed(0)
    net, x = linear_network(torch.randn(10, 27).double()), 0.5 + 0.05 * torch.randn(60, 3, 3, 3).double()  # in mid-box
    z, weight = net(x), net[1].weight
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z  # (N, K)
    norms = (weight[y][:, None] - weight).abs().sum(2)  # (N, K)
    radius = (gaps / norms).scatter(1, y[:, None], torch.inf).amin(1)  # (N,)
    eps = radius.median().item()
    fooled = net(eval_attacks.apgd(net, x, y, eps=eps * 1.0001, loss="targeted")).argmax(1) != y
    assert torch.equal(fooled, radius < eps * 1.0001)
    fooled = net(eval_attacks.fab_t(net, x, y, eps=eps * 1.0001)).argmax(1) != y
    assert torch.equal(fooled, 1.0052 * radius <= eps * 1.0001)  # FAB settles a little beyond the boundary


def stubborn_network():
    """A network that nothing fools, one image of the class that it holds to, and a list of what it is fed."""
    torch.manual_seed(0)
    net, x, seen = small_network().double().eval(), 0.1 + 0.8 * torch.rand(1, 3, 8, 8, dtype=torch.float64), []
    net[-1].bias.data[3] += 20
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return net, x, torch.tensor([3]), seen


@pytest.mark.parametrize("eps", [0.003, 0.05, 0.3])
def test_apgd_against_a_loop(eps):
    net, x, y, seen = stubborn_network()
    eval_attacks.apgd(net, x, y, eps=eps)
    iterates, halvings = list(seen), 0

    def clip(z):
        return z.clamp(x - eps, x + eps).clamp(0, 1)

    def loss_and_gradient(z):
        z = z.clone().requires_grad_()
        loss = F.cross_entropy(net(z), y)
        return loss.item(), torch.autograd.grad(loss, z)[0]

    now = before = iterates[0]
    loss, gradient = loss_and_gradient(now)
    best, step, was_halved, best_at_check, history = (loss, now, gradient), 2 * eps, True, loss, [0.0]
    for i in range(100):
        a = 0.75 if i else 1.0
        now, before = clip(now + a * (clip(now + step * gradient.sign()) - now) + (1 - a) * (now - before)), now
        loss, gradient = loss_and_gradient(now)
        history.append(loss)
        reached, best = now, max(best, (loss, now, gradient), key=lambda it: it[0])
        if window := {21: 22, 40: 19, 56: 16, 69: 13, 79: 10, 86: 7, 92: 6, 98: 6}.get(i):
            rises = sum(history[-j] > history[-j - 1] for j in range(1, window + 1))
            was_halved = rises <= 0.75 * window or (not was_halved and best[0] <= best_at_check)
            best_at_check = best[0]
            if was_halved:
                step, now, gradient, halvings = step / 2, *best[1:], halvings + 1
        torch.testing.assert_close(iterates[i + 1], reached)
    assert len(iterates) == 101
    assert 0 < halvings < 8


def test_square_goes_on_from_its_best():
    net, x, y, seen = stubborn_network()
    eval_attacks.square(net, x, y, eps=0.1, queries=300)
    best, *tried = seen.copy()
    margins, accepted = [pm(net(z), y).item() for z in (best, *tried)], 0
    lowest = margins[0]
    for query, (z, margin) in enumerate(zip(tried, margins[1:], strict=True)):
        rows, columns = (z != best).any(1)[0].nonzero().T
        side = eval_attacks.square_side(query, 8, 8)
        assert not len(rows) or max(rows.max() - rows.min(), columns.max() - columns.min()) < side
        if margin < lowest:
            best, lowest, accepted = z, margin, accepted + 1
    assert 0 < accepted < 300


ATTACKS = {**eval_attacks.ATTACKS, **eval_attacks.STAGES, "square": partial(eval_attacks.square, queries=200)}
ATTACKS["dlr"] = partial(eval_attacks.apgd, loss="dlr")
ATTACKS |= {f"{name} in bfloat16": partial(ATTACKS[name], amp=True) for name in ("apgd", "fab-t")}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "aa"])
@pytest.mark.parametrize(("n", "eps"), [(12, 0.03), (1, 0.03), (12, 0.0), (3, 1.0)])
def test_attack_invariants(name, n, eps):
    net = small_network().train()
    x, y = torch.rand(n, 3, 8, 8).round(decimals=1), torch.arange(n) % 10
    net(x).sum().backward()
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    before = [t.clone() for t in tensors]
    x_adv = ATTACKS[name](net, x, y, eps=eps, batch_size=40)
    assert (x_adv - x).abs().max() <= eps + 1e-6
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert all(map(torch.equal, before, tensors))
    assert net.training
    net.eval()
    wrong = net(x_adv).argmax(1) != y
    if name.split()[0] in (*eval_attacks.STAGES, "dlr"):
        assert torch.equal(x_adv[~wrong], x[~wrong])
    if "bfloat16" in name:  # whose rounding depends on the batch
        return
    alone = ATTACKS[name](net, x[-1:], y[-1:], eps=eps, index=torch.tensor([n - 1]))  # as in the batch
    assert (net(alone).argmax(1) != y[-1:]) == wrong[-1:]


def test_attacks_under_random_settings():
    rng = np.random.default_rng(0)
    attacks = {
        "pgd": lambda *a, steps, **k: pgd(*a, steps=steps, step_size=rng.uniform(0, 0.5), eps=k["eps"], init="uniform"),
        "fgsm": lambda *a, steps, **k: eval_attacks.fgsm(*a, **k),
        "apgd": eval_attacks.apgd,
        "apgd-t": partial(eval_attacks.apgd, loss="targeted"),
        "fab-t": eval_attacks.fab_t,
        "square": lambda *a, steps, **k: eval_attacks.square(*a, queries=steps, **k),
    }
    for setting in range(200):
        dtype = [torch.float32, torch.float64][setting % 2]
        net = small_network(k=int(rng.integers(4, 12))).to(dtype).train(bool(rng.integers(2)))
        for p in net.parameters():
            p.data *= 10 ** rng.uniform(-2, 2)  # from flat to saturated
        n, eps = int(rng.integers(1, 6)), float(rng.choice([0, 1, rng.uniform(0, 1), rng.uniform(0, 0.1)]))
        x, y = (1.5 * torch.rand(n, 3, 8, 8, dtype=dtype) - 0.25).clamp(0, 1), torch.randint(4, (n,))
        before, training = [t.clone() for t in net.state_dict().values()], net.training
        name = list(attacks)[setting % len(attacks)]
        x_adv = attacks[name](net, x, y, eps=eps, steps=int(rng.integers(1, 12)))
        assert x_adv.isfinite().all(), (setting, name)
        assert (x_adv - x).abs().max() <= eps + 1e-6, (setting, name)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert net.training == training
        assert all(map(torch.equal, before, net.state_dict().values()))
        assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.filterwarnings("ignore:3 classes are too few")
def test_evaluate_keeps_and_reuses_verdicts():
    x, y = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 3
    net = small_network(k=3).eval()
    asked = eval_attacks.evaluate(net, x, y, ["pgd20", "pgd100", "apgd"], eps=0.01)
    assert asked.keys() == {"nat", "pgd20", "pgd100", "apgd"}
    longer = eval_attacks.ATTACKS["pgd100"](net, x.float() / 255, y, eps=0.01)  # not by way of PGD-20
    assert torch.equal(net(longer).argmax(1) != y, asked["pgd100"].bool())
    alone = eval_attacks.evaluate(net, x, y, ["pgd20"], eps=0.01, batch_size=7)
    assert torch.equal(alone["pgd20"], asked["pgd20"])
    first = eval_attacks.evaluate(net, x, y, ["apgd"], n=8, eps=0.01, batch_size=3)
    assert (first["apgd"][8:] == -1).all()
    more = eval_attacks.evaluate(net, x, y, ["apgd"], eps=0.01, verdicts=first)
    assert torch.equal(more["apgd"], asked["apgd"])
    x_adv = eval_attacks.autoattack(net, x.float() / 255, y, eps=0.01)  # the same attacks in one call
    both = eval_attacks.evaluate(net, x, y, ["aa"], eps=0.01)
    assert torch.equal(net(x_adv).argmax(1) == y, eval_attacks.survivors(both, eval_attacks.chain("aa"), 20))
    known = {"nat": torch.ones(20, dtype=torch.int8)}  # all known to be wrong: nothing is left to attack
    with pytest.warns(UserWarning, match="3 classes are too few"):
        eval_attacks.evaluate(net, x, y, ["aa"], eps=0.01, verdicts=known)
    assert (known["square"] == -1).all()
    assert "apgd-t" not in known


def test_what_fools_only_the_copy_is_attacked_again(monkeypatch):
    x = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8)
    net, copy = small_network().eval(), small_network().eval()
    copy[4].weight.data += 0.02 * torch.randn_like(copy[4].weight)
    y = net(x.float() / 255).argmax(1)
    alone = eval_attacks.evaluate(net, x, y, ["apgd"], eps=0.01)["apgd"]
    monkeypatch.setattr(eval_attacks, "accelerate", lambda model, x: copy)
    by_copy = eval_attacks.evaluate(net, x, y, ["apgd"], eps=0.01)["apgd"]
    fooled = (eval_attacks.apgd(copy, x.float() / 255, y, eps=0.01) != x.float() / 255).flatten(1).any(1)
    assert (by_copy[fooled] >= alone[fooled]).all()
    assert alone[fooled].any()


@pytest.mark.parametrize(
    ("output", "figures", "message"),
    [
        (lambda z: z, {}, ""),
        (lambda z: z.softmax(1), {}, "the model seems to return probabilities"),
        (lambda z: z + torch.randn_like(z), {}, "the model is random"),
        (lambda z: 0 * z, {}, "the gradient is zero or NaN at 100%"),
        (lambda z: (z - z).sqrt() + z, {}, "the gradient is zero or NaN at 100%"),
        (lambda z: z, {"aa": {"accuracy": 46.0}}, "AutoAttack is 4.0 points under PGD"),
        (lambda z: z, {"fab-t": {"accuracy": 51.0}}, "Square takes 1.0 points more"),
    ],
)
def test_doubts(output, figures, message):
    net = small_network().eval()
    net.register_forward_hook(lambda module, inputs, logits: output(logits))
    x, y = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    figures = {name: {"accuracy": 50.0} for name in ("pgd20", "aa", "fab-t", "square")} | figures
    found = eval_attacks.doubts(net, x, y, figures)
    assert len(found) == bool(message)
    assert message in "".join(found)


# ---- Bad input -----------------------------------------------------------------------------------------------------


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def files(folder, good):
    """Bad files, by name, for the command lines below."""
    arrays = dict(np.load(good))
    images = arrays["x_train"]
    bad = {
        "missing_array": {"y_test": None},
        "float_images": {"x_train": images.astype(np.float32)},
        "grey_images": {"x_train": images[..., :1]},
        "flat_images": {"x_test": images.reshape(len(images), -1)},
        "no_images": {"x_test": images[:0], "y_test": arrays["y_test"][:0]},
        "other_size": {"x_train": images[:, :6]},
        "short_labels": {"y_train": arrays["y_train"][:-1]},
        "float_labels": {"y_train": arrays["y_train"] / 2},
        "negative_labels": {"y_train": arrays["y_train"] - 1},
        "unknown_labels": {"y_test": arrays["y_test"] + 1},
        "one_class": {"y_train": 0 * arrays["y_train"], "y_test": 0 * arrays["y_test"]},
        "object_labels": {"y_train": np.array([RunsCode()] * 50, dtype=object)},
    }
    for name, change in bad.items():
        np.savez(folder / f"{name}.npz", **{k: v for k, v in (arrays | change).items() if v is not None})
    (folder / "truncated.npz").write_bytes(good.read_bytes()[:1000])
    for name in ("empty.npz", "empty.pt"):
        (folder / name).touch()
    (folder / "text.pt").write_text("not a checkpoint\n")
    net = models.build("wrn-10-1", 5)
    torch.save(RunsCode(), folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"model": net.state_dict(), "args": {"arch": "wrn-10-1"}}, folder / "weights.pt")
    torch.save(net.state_dict(), folder / "bare.pt")
    torch.save(net.state_dict() | {"fc.bias": torch.full((5,), torch.nan)}, folder / "nan.pt")
    torch.save({"model": {"a": 1}, "args": {"arch": "wrn-10-1"}}, folder / "wrong_keys.pt")
    (folder / "truncated.pt").write_bytes((folder / "bare.pt").read_bytes()[:5000])


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "1/0", "-0.1", "0", "1.1", "2/1"])
def test_numbers(text):
    parse = clirat.number(float, 0, 1, above=True)
    with pytest.raises(argparse.ArgumentTypeError, match=r"finite|is not in"):
        parse(text)
    assert parse("8/255") == 8 / 255
    with pytest.raises(argparse.ArgumentTypeError, match="finite int"):
        clirat.number(int, 0)("1.5")


TRAIN = [
    ("--method magic", "magic"),
    ("--arch vgg16", "vgg16"),
    ("--arch wrn-11-1", "wrn-11-1"),
    ("--epochs 0", "epochs"),
    ("--batch-size 1", "batch-size"),
    ("--batch-size 51", "51"),
    ("--train-size 51", "51"),
    ("--lr 0", "--lr"),
    ("--exclude all", "exclude"),
    ("--weight-norm l2", "weight-norm"),
    ("--method at --gamma 2", "--gamma does nothing"),
    ("--trade-off 3", "--trade-off does nothing"),
    ("--device cuda:99", "cuda:99"),
    ("--device toaster", "toaster"),
    ("--data nowhere.npz", "nowhere.npz"),
    ("--data missing_array.npz", "y_test"),
    ("--data float_images.npz", "uint8"),
    ("--data grey_images.npz", "(50, 8, 8, 1)"),
    ("--data flat_images.npz", "uint8"),
    ("--data no_images.npz", "N > 0"),
    ("--data other_size.npz", "differ in size"),
    ("--data short_labels.npz", "50 integers"),
    ("--data float_labels.npz", "integers"),
    ("--data negative_labels.npz", "-1"),
    ("--data unknown_labels.npz", "0..4"),
    ("--data one_class.npz", "K > 1"),
    ("--data object_labels.npz", "object_labels.npz"),
    ("--data truncated.npz", "truncated.npz"),
    ("--data empty.npz", "empty.npz"),
    ("--data small.npz/folder", "toy"),
    ("--init nowhere.pt", "nowhere.pt"),
    ("--init weights.pt", "no training checkpoint"),
    ("--init code.pt", "not loaded"),
    ("--init run/burnin.pt --method trades", "burn-in"),
    ("--init run/burnin.pt --method fat", "burn-in"),
    ("--init run/burnin.pt --arch resnet18", "--arch"),
    ("--init run/last.pt --epochs 2", "--epochs 2"),
    ("--init run/last.pt --method at", "nothing is left"),
    ("--out pile", "already holds a run"),
    ("--out run", "--resume"),
    ("--out run --resume --gamma 3", "gamma was 10.0, not 3.0"),
    ("--out nothing --resume", "no run to resume"),
    ("--out small.npz", "small.npz"),
]
EVAL = [
    ("nowhere.pt", "nowhere.pt"),
    ("empty.pt", "empty.pt"),
    ("text.pt", "text.pt"),
    ("truncated.pt", "truncated.pt"),
    ("code.pt", "not loaded"),
    ("list.pt", "list"),
    ("wrong_keys.pt", "conv1.weight"),
    ("nan.pt --arch wrn-10-1", "not finite"),
    ("bare.pt", "--arch"),
    ("bare.pt --arch resnet18", "layer1.0.conv1.weight"),
    ("bare.pt --arch wrn-16-1", "block1.layer.1"),
    ("bare.pt --arch wrn-10-1 --data toy", "5 classes"),
    ("weights.pt --attacks magic", "magic"),
    ("weights.pt --n 31", "31"),
    ("weights.pt --n 0", "--n"),
    ("weights.pt --eps -1", "--eps"),
    ("weights.pt --device cuda:99", "cuda:99"),
    ("weights.pt --json nowhere/figures.json", "nowhere"),
    ("damaged.pt", "damaged.pt.eval.npz"),
    ("weights.pt --curves run --out curves.png", "either"),
    ("weights.pt --out curves.png", "either"),
]


@pytest.fixture(scope="module")
def desk(data, straight, tmp_path_factory):
    """A folder with good and bad files."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(straight, folder / "run")
    shutil.copy(data, folder / "small.npz")
    files(folder, data)
    shutil.copy(folder / "weights.pt", folder / "damaged.pt")
    (folder / "damaged.pt.eval.npz").write_text("damaged")
    (folder / "pile").mkdir()
    shutil.copy(folder / "weights.pt", folder / "pile")
    return folder


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [*((clirat.main, *case) for case in TRAIN), *((eval_attacks.main, *case) for case in EVAL)],
    ids=[case[0] for case in TRAIN + EVAL],
)
def test_bad_input(main, words, message, desk, capsys, monkeypatch):
    monkeypatch.chdir(desk)
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*") if path.is_file() and ".lock" not in path.name}
    words = words.split()
    defaults = [] if "--data" in words else ["--data", "small.npz"]
    if main is clirat.main:
        settings = {"--arch": "wrn-10-1", "--batch-size": "20", "--steps": "2", "--eval-size": "20", "--epochs": "3"}
        settings["--burn-in"] = "1"
        defaults += [word for pair in settings.items() if pair[0] not in words for word in pair]
    with pytest.raises(SystemExit) as stop:
        main([*defaults, *words] if main is clirat.main else [*words, *defaults])
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1
    after = {path: path.stat().st_mtime_ns for path in desk.rglob("*") if path.is_file() and ".lock" not in path.name}
    assert before == after
    assert not (desk / "hacked").exists()


# ---- Command lines -------------------------------------------------------------------------------------------------


def test_evaluation_files(data, straight, tmp_path, capsys):
    for seed in (1, 2):
        checkpoint = torch.load(straight / "last.pt", weights_only=True)
        checkpoint["args"]["seed"] = seed
        torch.save(checkpoint, tmp_path / f"s{seed}.pt")
    paths = [str(tmp_path / "s1.pt"), str(tmp_path / "s2.pt")]
    options = ["--data", str(data), "--attacks", "nat", "pgd20", "--json", str(tmp_path / "figures.json")]
    for n, eps in ((10, "1/255"), (10, "8/255"), (30, "1/255")):
        eval_attacks.main([*paths, *options, "--n", str(n), "--eps", eps])
    rows = capsys.readouterr().out.strip().splitlines()[-5:]
    assert rows[0] == "| checkpoint | n | eps | NAT | PGD20 |"
    assert rows[2].split("|")[2:] == rows[3].split("|")[2:]
    assert "mean ± std of 2 seeds | 30 | 1/255" in rows[4]
    assert "± 0.00" in rows[4]
    figures = json.loads((tmp_path / "figures.json").read_text())[0]["attacks"]
    net, _ = models.load(paths[0])
    x, y = clirat.load_data(str(data))[2:]
    expected = eval_attacks.evaluate(net, x, y, ["nat", "pgd20"], eps=1 / 255)
    assert [figures[name]["robust"] for name in expected] == [(v == 0).sum() for v in expected.values()]
    kept = np.load(paths[0] + ".eval.npz")
    assert sorted(len(kept[name]) for name in kept.files if "pgd20" in name) == [30, 30]
    assert sorted((kept[name] >= 0).sum() for name in kept.files if "pgd20" in name) == [10, 30]


def test_paired_difference_by_hand(data, straight, tmp_path, capsys):
    ours, theirs = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool(), torch.tensor([[1, 0, 0, 1], [0, 1, 1, 1]]).bool()
    # both seeds 25 points; images 50, 50, 0, 0 points, their standard deviation 25: 25 +- 1.96 * 25 / 2
    assert eval_attacks.paired_cell(ours, theirs) == "+25.00 ± 0.00 [+0.5, +49.5]"
    low, high = eval_attacks.wilson(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # as in tables of Wilson's interval

    checkpoint = torch.load(straight / "last.pt", weights_only=True)
    for method in ("mail-at", "clirat"):
        folder = tmp_path / f"{method}-s1"
        folder.mkdir()
        checkpoint["args"]["method"] = method
        torch.save(checkpoint, folder / "last.pt")
    paths = [str(tmp_path / f"{method}-s1" / "last.pt") for method in ("mail-at", "clirat")]
    eval_attacks.main([*paths, "--data", str(data), "--attacks", "nat"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| clirat/last.pt minus mail-at/last.pt, paired, seeds: 1 | 30 | 8/255 | +0.00 [+0.0, +0.0] |"


def test_curves(straight, tmp_path, monkeypatch, capsys):
    words = ["--curves", str(straight), str(straight), "--out", str(tmp_path / "curves.png")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(SystemExit, match="2"):
            eval_attacks.main(words)
    assert capsys.readouterr().err == "eval_attacks.py: error: --curves needs matplotlib: pip install matplotlib\n"
    pytest.importorskip("matplotlib")
    eval_attacks.main(words)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "log.csv").write_text("epoch,nat\n1,x\n")
    for run, message in ((tmp_path, "no log of clirat.py"), (tmp_path / "nowhere", "nowhere")):
        with pytest.raises(SystemExit, match="2"):
            eval_attacks.main(["--curves", str(run), "--out", str(tmp_path / "other.png")])
        err = capsys.readouterr().err
        assert message in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "other.png").exists()


def test_bench_writes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(data, "--bench", "2")
    figures = json.loads(capsys.readouterr().out)
    flop = figures["gflop_per_s"] * 1e9 * figures["ms_per_step"] / 1e3
    assert flop == pytest.approx((2 * 2 + 3) * 20 * 2 * 792_000, rel=0.2)  # wrn-10-1 on 8 x 8: 0.79 M multiply-adds
    assert figures["full_run_hours"] == pytest.approx(figures["ms_per_step"] * 3 * 3 / 3.6e6, abs=0.01)
    assert not list(tmp_path.iterdir())


# ---- Several processes ---------------------------------------------------------------------------------------------


def work(rank, world, folder):
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    net, x, y = small_network().eval(), torch.arange(13 * 192).view(13, 3, 8, 8).byte(), torch.arange(13) % 10
    verdicts = eval_attacks.evaluate(net, x, y, ["pgd100", "apgd"], eps=0.02, batch_size=4)
    if rank == 0:
        torch.save(verdicts, f"{folder}/verdicts-{world}.pt")
    for method in ("clirat", "clir-trades", "mail-mart"):
        torch.manual_seed(0)
        # no BatchNorm, of which each process would see half
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        model = DistributedDataParallel(net) if world > 1 else net
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        _, args = clirat.parse_args(["--method", method, "--burn-in", "1", "--steps", "3"])
        args.compile = method == "mail-mart"  # whose attack is then on the network itself, as on CUDA
        x, y = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8), torch.arange(24) % 5
        for images, labels, start in clirat.mini_batches(x, y, 8):
            clirat.train_step(args, 2, net, model, optimizer, images, labels, start)
        if rank == 0:
            torch.save(net.state_dict(), f"{folder}/{method}-{world}.pt")
    if world > 1:
        del model  # as in main
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    work(0, 1, tmp_path)
    torch.multiprocessing.spawn(work, (2, tmp_path), nprocs=2)
    one, two = (torch.load(tmp_path / f"verdicts-{world}.pt", weights_only=True) for world in (1, 2))
    assert same(one, two)
    for method in ("clirat", "clir-trades", "mail-mart"):
        one, two = (torch.load(tmp_path / f"{method}-{world}.pt", weights_only=True) for world in (1, 2))
        for key in one:
            torch.testing.assert_close(one[key], two[key], atol=1e-6, rtol=0)


def meet_bad_input(rank, folder):
    for bad_rank in 0, 1:
        store = f"file://{folder}/store-{bad_rank}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        device, error = "nowhere" if rank == bad_rank else "cpu", io.StringIO()
        with contextlib.redirect_stderr(error), pytest.raises(SystemExit, match="2"):
            clirat.main(["--data", "toy", "--device", device, "--out", f"{folder}/run"])
        assert error.getvalue().startswith("clirat.py: error: --device nowhere") == (rank == 0)
        assert error.getvalue().count("\n") == (rank == 0)


def test_bad_input_of_one_process_ends_all(tmp_path):
    torch.multiprocessing.spawn(meet_bad_input, (tmp_path,), nprocs=2)
    assert not (tmp_path / "run").exists()
