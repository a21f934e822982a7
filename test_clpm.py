"""python -m pytest -q    margins on vectors small enough to check by hand, then the rest.

Formulas and attacks against loops, closed forms and a second Algorithm 1; runs, resuming, bad
input. What the programs do with other people's files, command lines and several processes is
tested in .ci/test_programs.py.
"""

import inspect
import json
import math
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import clirat
import eval_attacks
import models
from clirat import METHODS, at_loss, cl_pm, instance_weights, mart_loss, pgd, pm, trades_loss

torch.set_num_threads(1)  # enough for tensors of this size

# ---- Margins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "label", "expected_pm", "expected_cl_pm"),
    [
        ([0.3, 0.5, 0.2], 0, -0.2, -0.2),  # Fig. 2 A: one confused label
        ([0.3, 0.5, 0.4], 0, -0.2, -0.3),  # Fig. 2 B: a second one at -0.1
        ([0.7, 0.2, 0.1], 0, 0.5, 0.5),  # correct: the other classes do not add up
        ([0.4, 0.4, 0.2], 0, 0.0, 0.0),  # a tie is no confusion
        ([0.2, 0.2, 0.6], 0, -0.4, -0.4),  # nor is a tie with a class that is not the largest
        ([1.0, 0.0], 0, 1.0, 1.0),
        ([1.0, 0.0], 1, -1.0, -1.0),
        ([0.3, math.nan, 0.4], 0, math.nan, math.nan),
    ],
)
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8])
def test_margins_by_hand(probs, label, expected_pm, expected_cl_pm, integers):
    probs, labels = torch.tensor([probs]), torch.tensor([label], dtype=integers)
    close = partial(torch.testing.assert_close, equal_nan=True)
    close(pm(probs, labels), torch.tensor([expected_pm]))
    close(cl_pm(probs, labels), torch.tensor([expected_cl_pm]))


def random_logits(n, k):
    generator = torch.Generator().manual_seed(n + k)
    return 2 * torch.randn(n, k, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_margins_against_loops(k):
    probs, labels = random_logits(200, k).softmax(1), torch.arange(200) % k
    pms, cl_pms = pm(probs, labels), cl_pm(probs, labels)
    for row, y, m, c in zip(probs.tolist(), labels.tolist(), pms, cl_pms, strict=True):
        gaps = [row[y] - p for j, p in enumerate(row) if j != y]
        confused = [gap for gap in gaps if gap < 0]
        assert m.item() == pytest.approx(min(gaps), abs=1e-12)
        assert c.item() == pytest.approx(sum(confused) if confused else min(gaps), abs=1e-12)
        assert -1 <= c <= m <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_margins_keep_dtype(dtype):
    probs, labels = random_logits(64, 10).softmax(1), torch.arange(64) % 10
    margins, exact = cl_pm(probs.to(dtype), labels), cl_pm(probs, labels)
    assert margins.dtype == dtype
    torch.testing.assert_close(margins.double(), exact, atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize("margin", [pm, cl_pm])
@pytest.mark.parametrize("shapes", [((4,), (4,)), ((4, 1), (4,)), ((4, 3), (3,)), ((4, 3), (4, 1))])
def test_margins_refuse_wrong_shapes(margin, shapes):
    with pytest.raises(ValueError, match="probs"):
        margin(torch.rand(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64))


def test_what_people_copy_stands_alone():
    copied = {"torch": torch, "F": F}
    exec(inspect.getsource(cl_pm) + inspect.getsource(instance_weights), copied)
    probs, labels = torch.tensor([[0.3, 0.5, 0.4], [0.6, 0.3, 0.1]]), torch.tensor([0, 0])
    margins = copied["cl_pm"](probs, labels)
    torch.testing.assert_close(margins, torch.tensor([-0.3, 0.3]))
    raw = [1 / (1 + math.exp(-10 * (-0.5 - m))) for m in (-0.3, 0.3)]  # Eq. 6
    expected = torch.tensor([2 * w / sum(raw) for w in raw])
    torch.testing.assert_close(copied["instance_weights"](margins, 10.0, -0.5), expected)


# ---- Weights and losses --------------------------------------------------------------------------


def test_weights():
    margins = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    weights = instance_weights(margins, 10.0, -0.5)
    raw = [1 / (1 + math.exp(-10 * (-0.5 - m))) for m in margins.tolist()]  # Eq. 6
    expected = torch.tensor([9 * w / sum(raw) for w in raw], dtype=torch.float64)  # l.14
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad
    assert instance_weights(torch.tensor([math.nan, 0.9, 0.9]), 10.0, -0.5)[0].isnan()
    usual = {"margins": torch.rand(3), "gamma": 10.0, "beta": -0.5, "norm": "batch"}
    wrong = {"margins": torch.rand(3, 1)}, {"norm": "l2"}, {"gamma": -1.0}, {"gamma": math.nan}
    for change in wrong:
        with pytest.raises(ValueError, match="margins"):
            instance_weights(**usual | change)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 1e4, 1e30, 1e300])
@pytest.mark.parametrize("beta", [-0.5, 0.0, 1e6, -1e6])
@pytest.mark.parametrize("margins", [[-0.9, 0.0, 0.7], [0.3, 0.3, 0.3], [-0.5], [1.0, -1.0]])
def test_weights_are_finite(gamma, beta, margins):
    weights = instance_weights(torch.tensor(margins), gamma, beta)
    assert weights.isfinite().all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)


def losses_by_loops(method, nat, adv, labels, weights):
    """The three losses, example by example, in plain arithmetic on probabilities."""
    total = 0
    for z, z_adv, y, w in zip(nat, adv, labels.tolist(), weights, strict=True):
        p, q = (v.exp() / v.exp().sum() for v in (z, z_adv))
        divergence = (p * (p / q).log()).sum()
        others = torch.cat([q[:y], q[y + 1 :]])
        if method.loss == "at":
            loss = w * -q[y].log()
        elif method.loss == "trades":
            loss = -p[y].log() + method.trade_off * w * divergence
        else:
            bce = -q[y].log() - (1.0001 - others.max()).log()
            loss = w * bce + method.trade_off * divergence * (1 - p[y])
        total = total + loss
    return total / len(labels)


def test_losses():
    nat, adv = random_logits(6, 5).requires_grad_(), random_logits(6, 5).flip(1).requires_grad_()
    labels, weights = torch.arange(6) % 5, torch.arange(1.0, 7.0).double()
    losses = {
        "at": lambda n, a, w=None: at_loss(a, labels, w),
        "trades": lambda n, a, w=None: trades_loss(n, a, labels, 5, w),
        "mart": lambda n, a, w=None: mart_loss(n, a, labels, 6, w),
    }
    for name, loss in losses.items():
        for w in (weights, torch.ones(6).double()):
            expected = losses_by_loops(METHODS[name], nat, adv, labels, w)
            torch.testing.assert_close(loss(nat, adv, w), expected)
        torch.testing.assert_close(loss(nat, adv), expected)  # no weights: all 1
        assert torch.autograd.gradcheck(partial(loss, w=weights), (nat, adv))
        saturated = torch.tensor([[500.0, 0, -500.0, 0, 0]] * 6, requires_grad=True)
        value = loss(saturated, -saturated)
        assert torch.autograd.grad(value, saturated)[0].isfinite().all()
        for wrong in (weights[:, None], weights[:1]):
            with pytest.raises(ValueError, match="weights"):
                loss(nat, adv, wrong)
        if name != "at":
            with pytest.raises(ValueError, match="one shape"):
                loss(nat[:, :1], adv)


@pytest.mark.parametrize("label", [-100, 5])
def test_a_label_that_is_no_class_is_an_error(label):
    logits, labels = random_logits(6, 5), torch.tensor([0, 1, 2, 3, 4, label])
    trades, mart = partial(trades_loss, trade_off=5), partial(mart_loss, trade_off=6)
    for loss in at_loss, partial(trades, logits), partial(mart, logits):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            loss(logits_adv=logits, labels=labels)
        with pytest.raises(ValueError, match="labels"):
            loss(logits_adv=logits, labels=labels[:5])


# ---- PGD -----------------------------------------------------------------------------------------


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


def test_pgd_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])  # margin x_1 - 2 x_2
    net, image = linear_network(weight), torch.tensor([[[[0.5, 0.2, 0.5]]]])
    x, y = image.repeat(2, 1, 1, 1), torch.tensor([0, 1])
    options = {"eps": 0.1, "step_size": 0.04, "steps": 3, "init": "none"}
    for loss in "cw", "ce":
        x_adv, kappa = pgd(net, x, y, loss=loss, return_kappa=True, **options)
        expected = torch.tensor([[0.4, 0.3, 0.5], [0.6, 0.1, 0.5]])
        torch.testing.assert_close(x_adv.view(2, 3), expected)
    # margins of the first along the way: 0.1, then 0.1 - 3 * 0.04 = -0.02, then wrong for good
    assert kappa.tolist() == [1, 0]
    for tau, steps_made in (0, 1), (1, 2), (5, 2.5):  # FAT: stops after tau + 1 wrong iterates
        friendly = pgd(net, x[:1], y[:1], tau=tau, **options).view(3)
        torch.testing.assert_close(friendly[0], torch.tensor(0.5 - 0.04 * steps_made))


@pytest.mark.parametrize("loss", ["ce", "kl", "cw"])
@pytest.mark.parametrize("init", ["normal", "uniform", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_pgd_invariants(loss, init, training):
    (x, y), net = small_images(), small_network().train(training)
    net[1].train(training and init != "none")  # now and then with a mode of its own
    modes = [module.training for module in net.modules()]
    net(x).sum().backward()
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    before = [t.clone() for t in tensors]
    x_adv = pgd(net, x.requires_grad_(), y, eps=0.1, step_size=0.02, steps=10, loss=loss, init=init)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert not x_adv.requires_grad
    assert [module.training for module in net.modules()] == modes
    assert all(p.requires_grad for p in net.parameters())
    assert all(map(torch.equal, before, tensors))


X, Y = small_images()
BAD_INPUT = {  # what -> arguments of an attack, words of the message
    "bytes": ((X * 255).byte(), Y, 0.1, "float32/64 images"),
    "0..255": (X * 255, Y, 0.1, r"\[0, 1\].*255"),
    "normalised": (X - 0.5, Y, 0.1, r"\[0, 1\]"),
    "nan": (X * math.nan, Y, 0.1, r"\[0, 1\]"),
    "one image": (X[0], Y, 0.1, "float32/64 images"),
    "no images": (X[:0], Y[:0], 0.1, "N > 0"),
    "column": (X, Y[:, None], 0.1, "integer labels"),
    "float labels": (X, Y.float(), 0.1, "integer labels"),
    "-100": (X, Y - 100, 0.1, "0..K-1"),
    "eps": (X, Y, -0.1, "eps"),
    "eps nan": (X, Y, math.nan, "eps"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_attacks_refuse(what):
    x, y, eps, message = BAD_INPUT[what]
    for attack in [partial(pgd, step_size=0.1, steps=1), eval_attacks.autoattack]:
        with pytest.raises(ValueError, match=message):
            attack(small_network(), x, y, eps=eps)


def test_pgd_starts_inside_the_ball():
    x_adv = pgd(small_network(), X, Y, eps=0.1, step_size=0.1, steps=0, init=X + 0.5)
    torch.testing.assert_close(x_adv, (X + 0.1).clamp(max=1))


def test_pgd_refuses():
    options = {"eps": 0.1, "step_size": 0.1, "steps": 1}
    for wrong in ({"steps": -1}, {"loss": "mse"}, {"init": "zero"}, {"init": X[:, :, 1:]}):
        with pytest.raises(ValueError, match="want"):
            pgd(small_network(), X, Y, **options | wrong)


def test_augment_crops_and_flips():
    x = torch.arange(1, 3 * 6 * 6 + 1).view(1, 3, 6, 6).repeat(64, 1, 1, 1).byte()
    padded = F.pad(x[0], (4, 4, 4, 4))
    crops = [padded[:, i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    crops = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(2))}
    torch.manual_seed(0)
    images = (clirat.augment(x) * 255).round().int()
    seen = {tuple(image.flatten().tolist()) for image in images}
    assert seen <= crops
    assert len(seen) > 30


# ---- Algorithm 1 ---------------------------------------------------------------------------------


def algorithm_1(args, net, x_train, y_train):
    """Algorithm 1 once more, example by example, with every step spelled out. Rows of the log."""
    row, m, rows = METHODS[args.method], args.batch_size, []
    velocity = {p: torch.zeros_like(p) for p in net.parameters()}
    for epoch in range(1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_007 + epoch)
        lr = args.lr * 0.1 ** len([e for e in args.lr_milestones if epoch > e])
        tau = {1: 0, 2: 1}[epoch]  # of FAT, 50 and 90 of 120 epochs scaled to 2
        seen = []
        order = torch.randperm(len(x_train)).tolist()
        for batch in (order[i : i + m] for i in range(0, len(order), m)):
            corners = torch.randint(9, (2, len(batch))).tolist()
            flips, images = torch.rand(len(batch), 1, 1, 1), []
            for i, top, left, flip in zip(batch, *corners, flips.flatten(), strict=True):
                canvas = torch.zeros(3, 16, 16)
                canvas[:, 4:12, 4:12] = x_train[i] / 255
                image = canvas[:, top : top + 8, left : left + 8]
                images.append(image.flip(2) if flip < 0.5 else image)
            x, y = torch.stack(images), y_train[batch]

            net.eval()
            x_adv = (x + 0.001 * torch.randn(x.shape)).clamp(x - args.eps, x + args.eps).clamp(0, 1)
            right = torch.zeros(len(batch), args.steps)
            for t in range(args.steps):
                x_adv.requires_grad_()
                z = net(x_adv)
                right[:, t] = z.argmax(1) == y
                if row.loss == "trades":
                    p, q = net(x).softmax(1).detach(), z.softmax(1)
                    value = (p * (p / q).log()).sum()
                else:
                    value = -z.softmax(1)[range(len(batch)), y].log().sum()
                step = args.step_size * torch.autograd.grad(value, x_adv)[0].sign()
                for i in range(len(batch)):
                    if args.method == "fat" and (1 - right[i, : t + 1]).sum() > tau:
                        step[i] = 0
                x_adv = (x_adv + step).clamp(x - args.eps, x + args.eps).clamp(0, 1).detach()

            net.train()
            nat = net(x) if row.loss != "at" else torch.zeros(len(batch), 4)
            adv = net(x_adv)
            raw, confused = [], []
            for q, i in zip(adv.softmax(1).tolist(), range(len(batch)), strict=True):
                gaps = [q[y[i]] - other for j, other in enumerate(q) if j != y[i]]
                confused.append(len([gap for gap in gaps if gap < 0]))
                margin = min(gaps)
                if row.margin == "cl-pm" and confused[i]:
                    margin = sum(gap for gap in gaps if gap < 0)
                if row.margin == "lps":
                    kappa = right[i].sum().item()
                    raw.append((1 + math.tanh(-1 + 5 * (1 - 2 * kappa / args.steps))) / 2)
                elif row.margin and epoch > args.burn_in:
                    raw.append(1 / (1 + math.exp(-args.gamma * (args.beta - margin))))
                else:
                    raw.append(1.0)
            if epoch > args.burn_in:
                gone = {"single": [1], "multi": [2, 3], None: []}[args.exclude]
                raw = [0.0 if c in gone else w for w, c in zip(raw, confused, strict=True)]
                factor = 3 if args.weight_norm == "mail" else len(raw) / sum(raw)
                weights = torch.tensor([factor * w for w in raw])
            else:
                weights = torch.ones(len(raw))
            loss = losses_by_loops(row._replace(trade_off=args.trade_off), nat, adv, y, weights)
            grads = torch.autograd.grad(loss, list(net.parameters()))
            for p, grad in zip(net.parameters(), grads, strict=True):
                velocity[p] = 0.9 * velocity[p] + grad + args.weight_decay * p.data
                p.data -= lr * velocity[p]
            seen += [(loss.item(), w, c) for w, c in zip(weights.tolist(), confused, strict=True)]
        figures, total = {"lr": lr, "loss": np.mean([s[0] for s in seen])}, sum(s[1] for s in seen)
        groups = {"adv_correct": [0], "single_cl": [1], "multi_cl": [2, 3]}
        for name, counts in groups.items():
            group = [s for s in seen if s[2] in counts]
            figures[name] = len(group) / len(seen)
            figures[f"weight_{name}"] = sum(s[1] for s in group) / total
        figures["ess"] = total**2 / sum(s[1] ** 2 for s in seen) / len(seen)
        rows.append(figures)
    return rows


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


VARIANTS = ["clirat --exclude single", "clirat --exclude multi", "at --exclude multi"]
VARIANTS += ["mail-at --weight-norm mail", "clirat --exclude multi --weight-norm mail"]


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS])
def test_algorithm_1(method, float64, tmp_path):
    words = f"--method {method} --epochs 2 --batch-size 16 --steps 3 --eps 0.01 --step-size 0.004 "
    words += "--lr 0.05 --weight-decay 0.1 --eval-every 0 --device cpu --seed 3 --out"
    args = clirat.parse_args([*words.split(), str(tmp_path)])
    assert (args.burn_in, args.lr_milestones) == (1, [1, 2])
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8))
    y = torch.arange(40) % 4
    net, ours = small_network(4), small_network(4)
    optimizer = torch.optim.SGD(ours.parameters(), 1.0, momentum=0.9, weight_decay=0.1)
    state = {"epoch": 0, "best": -1.0, "log": []}
    clirat.train(args, (x, y, x, y), ours, optimizer, state)
    rows = algorithm_1(args, net, x, y)
    for expected, row in zip(rows, state["log"], strict=True):
        ours_there = {name: row[name] for name in expected}
        assert ours_there == pytest.approx(expected, rel=1e-9, abs=1e-12)
    states = zip(ours.state_dict().values(), net.state_dict().values(), strict=True)
    for mine, theirs in states:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert all(0.1 < rows[0][name] < 0.9 for name in ("adv_correct", "single_cl", "multi_cl"))


def test_a_tie_is_no_confusion():
    net, args = small_network(4), clirat.parse_args(["--batch-size", "8"])
    net[4].weight.data[:] = net[4].bias.data[:] = 0
    x, y = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    attack = clirat.fast_pgd(net, eps=args.eps, step_size=args.step_size, steps=args.steps)
    row = clirat.train_epoch(args, 76, net, attack, optimizer, x, y)
    assert (row["adv_correct"], row["weight_adv_correct"]) == (1, 1)
    assert row["ess"] == pytest.approx(1)


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


def test_methods_and_schedule():
    at, trades, mart = (None, None, None), (None, None, 5), (None, None, 6)  # gamma, beta, lambda
    expected = {"at": at, "fat": at, "trades": trades, "mart": mart, "gairat": (20, 0.4, None)}
    for name in "mail", "clir":
        expected[f"{name}-at" if name == "mail" else "clirat"] = 10, -0.5, None
        expected |= {f"{name}-trades": (2, 0, 5), f"{name}-mart": (2, 0, 6)}
    assert {name: row[2:] for name, row in METHODS.items()} == expected
    args = clirat.parse_args([])
    assert (args.burn_in, args.lr_milestones, args.gamma, args.beta) == (75, [75, 90], 10, -0.5)
    assert (args.lr, args.weight_decay, args.eps, args.steps) == (0.01, 3.5e-3, 8 / 255, 10)
    args = clirat.parse_args(["--epochs", "16", "--arch", "wrn-10-1", "--beta=-1/2"])
    assert (args.burn_in, args.lr_milestones, args.beta) == (10, [10, 12], -0.5)
    assert (args.lr, args.weight_decay) == (0.1, 7e-4)


def test_resnet18_is_torchvisions():
    net, peer = models.build("resnet18"), torchvision.models.resnet18(num_classes=10)
    peer.conv1, peer.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    state, x = net.state_dict(), torch.rand(2, 3, 16, 16)
    names = [k.replace("shortcut", "downsample").replace("linear", "fc") for k in state]
    peer.load_state_dict(dict(zip(names, state.values(), strict=True)))
    torch.testing.assert_close(net(x), peer(x))


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
def test_folding_changes_nothing(arch, float64):
    net, x = models.build(arch), torch.rand(4, 3, 16, 16)
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
    assert kinds.count(models.Affine) == (0 if arch == "resnet18" else 4)  # that follow a sum
    x = x[:, :, :5]
    torch.testing.assert_close(models.pooled(x), F.adaptive_avg_pool2d(x, 1).flatten(1))


# ---- Runs ----------------------------------------------------------------------------------------


def run(data, *words):
    options = "--arch wrn-10-1 --batch-size 20 --steps 2 --eval-size 20 --epochs 3 --burn-in 1"
    options = [*options.split(), "--device", "cpu", "--data", str(data)]
    clirat.main([*options, *map(str, words)])


def same(a, b):
    if isinstance(a, dict):
        timing = ("seconds", "images_per_s")
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in timing)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


load = partial(torch.load, weights_only=True)


def same_run(one, other):
    ours, theirs = (load(folder / "last.pt") for folder in (one, other))
    return all(same(ours[k], theirs[k]) for k in ("model", "optimizer", "log", "epoch"))


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    run(data, "--out", out)
    return out


def stopped_run(data, out, monkeypatch, after):
    """A run that dies when the given epoch is in last.pt, but not in log.csv."""
    save = clirat.save_log
    with monkeypatch.context() as patch:
        dying = lambda path, rows: save(path, rows) if len(rows) < after else 1 / 0  # noqa: E731
        patch.setattr(clirat, "save_log", dying)
        with pytest.raises(ZeroDivisionError):
            run(data, "--out", out)


def test_run_resume_and_init(data, straight, tmp_path, monkeypatch):
    names = {"args.json", "best.pt", "burnin.pt", "last.pt", "log.csv"}
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
    assert same_run(straight, tmp_path / "resumed")
    assert same_run(straight, tmp_path / "init")
    assert same_run(burn, tmp_path / "init-at")

    (burn / "burnin.pt").rename(moved)
    copy = str(shutil.copy(data, tmp_path / "copy.npz"))  # the data is known by what it is
    clirat.main([*resume, str(tmp_path / "init"), "--data", copy])  # needs --init's file no longer
    kept = json.loads((tmp_path / "init" / "args.json").read_text())
    assert (kept["init"], kept["data"]) == (str(burn / "burnin.pt"), copy)
    torch.save(load(moved) | {"best": 1.0}, moved)
    run(data, "--out", tmp_path / "other", "--init", moved, "--weight-decay", "0.1")
    forked = load(tmp_path / "other" / "last.pt")
    assert forked["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    assert forked["best"] == max(row["pgd20"] for row in forked["log"][1:])  # its own

    stopped_run(data, tmp_path / "early", monkeypatch, after=0)  # at once: nothing is saved yet
    for path in (tmp_path / "early").glob("*.pt"):
        path.unlink()
    run(data, "--out", tmp_path / "early", "--lr", "0.01")  # such a folder is free


# ---- AutoAttack ----------------------------------------------------------------------------------


def test_square_side_by_hand():
    queries = (0, 10, 11, 51, 201, 501, 1001, 2001, 4001)
    sides = [eval_attacks.square_side(query, 32, 32) for query in queries]
    assert sides == [29, 29, 20, 14, 10, 7, 5, 4, 3]


def test_dlr_by_hand():
    z, y, t = torch.tensor([[4.0, 1.0, 3.0, 0.0]]), torch.tensor([0]), torch.tensor([3])
    assert eval_attacks.dlr_loss(z, y).item() == pytest.approx(-1 / 3)  # -(4 - 3) / (4 - 1)
    assert eval_attacks.dlr_loss(z, t).item() == pytest.approx(4 / 3)  # -(0 - 4) / (4 - 1)
    targeted = -4 / 3.5  # -(4 - 0) / (4 - (1 + 0) / 2)
    for logits in (z, 5 * z + 7):  # shift, scale invariant
        assert eval_attacks.dlr_targeted_loss(logits, y, t).item() == pytest.approx(targeted)


def test_projection_against_a_search():
    rng = torch.Generator().manual_seed(0)
    t, w = (torch.rand(200, 12, generator=rng, dtype=torch.float64) for _ in range(2))
    t, w = (1.4 * t - 0.2).clamp(0, 1), 2 * w - 1  # some pixels at 0 and 1
    w[:20, :6], w[0] = 0, 0
    b = (w * t).sum(1) + 6 * torch.rand(200, generator=rng).double() - 3  # many out of reach
    for t_, w_, b_, d in zip(t, w, b, eval_attacks.project(t, w, b), strict=True):
        sign = 1 if w_ @ t_ >= b_ else -1
        low, high = 0.0, 1.0
        for _ in range(60):  # the smallest level whose step, cut at the box, reaches the plane
            level = (low + high) / 2
            reached = (t_ - level * sign * w_.sign()).clamp(0, 1)
            low, high = (level, high) if sign * (w_ @ reached - b_) > 0 else (low, level)
        expected = (t_ - high * sign * w_.sign()).clamp(0, 1) - t_
        torch.testing.assert_close(d, expected, atol=1e-12, rtol=0)


def test_linear_network_has_a_known_radius():
    torch.manual_seed(0)
    x = 0.5 + 0.05 * torch.randn(60, 3, 3, 3).double()  # in mid-box
    net = linear_network(torch.randn(10, 27).double())
    z, weight = net(x), net[1].weight
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z  # (N, K)
    norms = (weight[y][:, None] - weight).abs().sum(2)  # (N, K)
    radius = (gaps / norms).scatter(1, y[:, None], torch.inf).amin(1)  # (N,)
    eps = radius.median().item() * 1.0001
    fooled = net(eval_attacks.apgd(net, x, y, eps=eps, loss="targeted")).argmax(1) != y
    assert torch.equal(fooled, radius < eps)
    x_adv = eval_attacks.fab_t(net, x, y, eps=eps)
    assert torch.equal(net(x_adv).argmax(1) != y, 1.0052 * radius <= eps)  # a little beyond it


def stubborn_network(seed=0):
    """A network that nothing fools, an image of the class it holds to, and what it is fed."""
    net, seen = small_network(seed=seed).double().eval(), []
    x = 0.1 + 0.8 * torch.rand(1, 3, 8, 8, dtype=torch.float64)
    net[-1].bias.data[3] += 5
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    return net, x, torch.tensor([3]), seen


@pytest.mark.parametrize(("eps", "seed"), [(0.003, 0), (0.05, 0), (0.3, 0), (0.1, 26)])
def test_apgd_against_a_loop(eps, seed):
    net, x, y, seen = stubborn_network(seed)
    eval_attacks.apgd(net, x, y, eps=eps)
    iterates, halvings, by_best_alone = seen[1:], 0, 0  # after the check of the input

    def clip(z):
        return z.clamp(x - eps, x + eps).clamp(0, 1)

    def loss_and_gradient(z):
        z = z.clone().requires_grad_()
        loss = F.cross_entropy(net(z), y)
        return loss.item(), torch.autograd.grad(loss, z)[0]

    now = before = iterates[0]
    assert (now - x).abs().max() == pytest.approx(eps)  # the start is on the ball
    loss, gradient = loss_and_gradient(now)
    best, best_at_check, history = (loss, now, gradient), loss, [0.0]
    step, was_halved = 2 * eps, True
    windows = {21: 22, 40: 19, 56: 16, 69: 13, 79: 10, 86: 7, 92: 6, 98: 6}
    for i in range(100):
        a = 0.75 if i else 1.0
        ahead = clip(now + step * gradient.sign())
        now, before = clip(now + a * (ahead - now) + (1 - a) * (now - before)), now
        loss, gradient = loss_and_gradient(now)
        history.append(loss)
        reached, best = now, max(best, (loss, now, gradient), key=lambda it: it[0])
        if window := windows.get(i):
            rises = sum(history[-j] > history[-j - 1] for j in range(1, window + 1))
            few, stuck = rises <= 0.75 * window, not was_halved and best[0] <= best_at_check
            was_halved, best_at_check = few or stuck, best[0]
            by_best_alone += stuck and not few
            if was_halved:
                step, now, gradient, halvings = step / 2, *best[1:], halvings + 1
        torch.testing.assert_close(iterates[i + 1], reached)
    assert len(iterates) == 101
    assert 0 < halvings < 8
    assert by_best_alone == (seed == 26)


def test_square_goes_on_from_its_best():
    net, x, y, seen = stubborn_network()
    eval_attacks.square(net, x, y, eps=0.1, queries=300)
    best, *tried = seen[1:].copy()
    margins, accepted = [pm(net(z), y).item() for z in (best, *tried)], 0
    stripes = (best - x) / 0.1
    torch.testing.assert_close(stripes, stripes[:, :, :1].sign().expand_as(stripes))
    lowest = margins[0]
    for query, (z, margin) in enumerate(zip(tried, margins[1:], strict=True)):
        rows, columns = (z != best).any(1)[0].nonzero().T
        side = eval_attacks.square_side(query, 8, 8)
        assert not len(rows) or max(rows.max() - rows.min(), columns.max() - columns.min()) < side
        inside = ((z - best).abs() > 1e-9) & ((z - x).abs() < 0.1 - 1e-9)
        assert not inside.any()  # a window is set to the ball's side
        if margin < lowest:
            best, lowest, accepted = z, margin, accepted + 1
    assert 0 < accepted < 300


def test_fab_against_its_formulas():
    (x, y), net = small_images(1), small_network().double().eval()
    x, seen = x.double(), []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    eval_attacks.fab_t(net, x, y, eps=1e-4, steps=12)  # too small for any success
    target, iterates, wrongs = net(x).scatter(1, y[:, None], -torch.inf).argmax(1), seen[2:26], 0
    for i in range(0, 24, 2):
        now, moved = iterates[i].clone().requires_grad_(), iterates[i + 1]
        z = net(now)[0]
        f = z[target] - z[y]
        w = torch.autograd.grad(f, now)[0].flatten(1)
        b = (w * now.detach().flatten(1)).sum(1) - f.detach()
        d1, d2 = (eval_attacks.project(v.detach().flatten(1), w, b).view_as(x) for v in (now, x))
        a1, a2 = d1.abs().max(), d2.abs().max()
        alpha = min((a1 / (a1 + a2)).item(), 0.1)
        expected = (now + 1.05 * d1) * (1 - alpha) + (x + 1.05 * d2) * alpha
        torch.testing.assert_close(moved, expected.clamp(0, 1).detach())
        wrong = net(moved).argmax(1) != y
        wrongs += wrong.item()
        if i < 22:
            torch.testing.assert_close(iterates[i + 2], x + 0.9 * (moved - x) if wrong else moved)
    assert wrongs > 0


def test_attacks_by_name():
    (x, y), net, eps = small_images(), small_network().eval(), 0.03
    noise = eval_attacks.noise(x.shape[1:], torch.arange(12), 0)
    assert torch.equal(noise[5:6], eval_attacks.noise(x.shape[1:], torch.tensor([5]), 0))
    assert not torch.equal(noise, eval_attacks.noise(x.shape[1:], torch.arange(12), 1))
    options = {"eps": eps, "step_size": 0.003, "init": x + eps * (2 * noise - 1)}
    expected = {
        "pgd20": pgd(net, x, y, steps=20, **options),
        "pgd100": pgd(net, x, y, steps=100, **options),
        "cw": pgd(net, x, y, steps=20, loss="cw", **options),
        "fgsm": pgd(net, x, y, eps=eps, step_size=eps, steps=1, init="none"),
    }
    for name, images in expected.items():
        found = eval_attacks.ATTACKS[name](net, x, y, eps=eps, batch_size=5)
        torch.testing.assert_close(found, images)
        alone = eval_attacks.ATTACKS[name](net, x[7:8], y[7:8], eps=eps, index=torch.tensor([7]))
        torch.testing.assert_close(alone, images[7:8])
    assert eval_attacks.STAGES["apgd-t"].keywords == {"loss": "targeted"}
    with pytest.raises(ValueError, match="want index"):
        eval_attacks.apgd(net, x, y, eps=eps, index=torch.arange(3))
    with pytest.raises(RuntimeError, match="left the ball"):
        eval_attacks.verdict(net, x, y, (x + 0.1).clamp(max=1), 0.05, 5)


def test_points_leave_at_their_first_success():
    calls, ticks = [], []

    def attack(points, k, active):
        for step in 0, 1:
            calls.append((k, step, points[active].tolist()))
            images = torch.full((len(points), 3, 2, 2), 2 * k + step + 1.0)
            yield images, (points == k) | (step == 1) & (points == 3)

    x, y = torch.zeros(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64)
    options = {"targets": 3, "passes": 7, "tick": ticks.append}
    x_adv = eval_attacks.in_batches(attack, x, y, 3, **options)
    assert calls == [
        (0, 0, [0, 1, 2]), (0, 1, [1, 2]), (0, 0, [3, 4]), (0, 1, [3, 4]),
        (1, 0, [1, 2, 4]), (1, 1, [2, 4]), (2, 0, [2, 4]), (2, 1, [4]),
    ]  # fmt: skip
    assert x_adv[:, 0, 0, 0].tolist() == [1, 3, 5, 2, 0]
    assert ticks == [7 * len(points) for _, _, points in calls]


ATTACKS = eval_attacks.ATTACKS | eval_attacks.STAGES | {
    "apgd-t": partial(eval_attacks.apgd, loss="targeted", steps=20),
    "dlr": partial(eval_attacks.apgd, loss="dlr"),
    "fab-t": partial(eval_attacks.fab_t, steps=20),
    "square": partial(eval_attacks.square, queries=200),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the gradient")
@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "aa"])
@pytest.mark.parametrize(("n", "eps"), [(12, 0.03), (1, 0.03), (12, 0.0), (3, 1.0)])
def test_attack_invariants(name, n, eps):
    (x, y), net = small_images(n), small_network().train()
    net(x).sum().backward()
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    before = [t.clone() for t in tensors]
    x_adv = ATTACKS[name](net, x.clone().requires_grad_(), y.to(torch.uint8), eps=eps, batch_size=5)
    assert (x_adv - x).abs().max() <= eps + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert not x_adv.requires_grad
    assert all(map(torch.equal, before, tensors))
    assert net.training
    net.eval()
    wrong = net(x_adv).argmax(1) != y
    if name in (*eval_attacks.STAGES, "dlr"):
        assert torch.equal(x_adv[~wrong], x[~wrong])
    last = torch.tensor([n - 1])  # its noise is its own, whatever is beside it
    alone = ATTACKS[name](net, x[-1:], y[-1:], eps=eps, index=last)
    assert (net(alone).argmax(1) != y[-1:]) == wrong[-1:]


# ---- Bad input -----------------------------------------------------------------------------------

TRAIN = [
    ("--batch-size 51", "51"),
    ("--method at --gamma 2", "--gamma does nothing"),
    ("--device cuda:99", "--device cuda:99"),
    ("--data nowhere.npz", "nowhere.npz"),
    ("--data float_images.npz", "uint8"),
    ("--data skipped_class.npz", "all classes 0..4 in y_train"),
    ("--data object_labels.npz", "object_labels.npz"),
    ("--data svhn", "no folder svhn"),
    ("--data run", "holds args.json"),
    ("--init weights.pt", "no training checkpoint"),
    ("--init run/burnin.pt --method trades", "want trades, wrn-10-1, seed 1"),
    ("--init run/last.pt --epochs 4 --method mail-at", "no epoch after 1"),
    ("--out pile", "already holds a run: choose another --out, or --resume"),
    ("--out run --resume --gamma 3", "started with gamma 10.0, not 3.0"),
    ("--out run --resume --init nowhere.pt", "started with init None, not nowhere.pt"),
    ("--out run --resume --data other_images.npz", "other data than run was started with"),
    ("--out list --resume", "list holds no run to resume"),
]
EVAL = [
    ("run", "no file run"),
    ("truncated.pt", "truncated.pt"),
    ("weights.pt --data toy", "5 classes"),
    ("--attacks nat weights.pt", "invalid choice: 'weights.pt'"),
    ("weights.pt --json nowhere/figures.json", "nowhere"),
    ("damaged.pt --attacks nat", "is damaged"),
]


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.fixture(scope="module")
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
    (folder / "list").mkdir()
    (folder / "list" / "args.json").write_text("[]")
    (folder / "pile").mkdir()
    shutil.copy(folder / "weights.pt", folder / "pile")
    return folder


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(program, words, message, desk, capsys):
    """The program ends with one line, or argparse's two, and status 2, and touches no file."""
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


CASES = [(clirat, *case) for case in TRAIN] + [(eval_attacks, *case) for case in EVAL]


@pytest.mark.parametrize(("program", "words", "message"), CASES)
def test_bad_input(program, words, message, desk, capsys, monkeypatch):
    monkeypatch.chdir(desk)
    refused(program, words, message, desk, capsys)
