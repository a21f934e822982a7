"""python -m pytest -q    margins on vectors small enough to check by hand, then Algorithm 1.

Weights, losses and PGD against loops and closed forms; `train` against a second Algorithm 1 that
spells every step out. The attacks and the programs are tested in .ci/test_*.py.
"""

import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clirat
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
    learnt = (torch.tensor(value, requires_grad=True) for value in (10.0, -0.5))
    assert torch.equal(found := instance_weights(margins, *learnt), weights)
    assert not found.requires_grad
    assert instance_weights(torch.tensor([math.nan, 0.9, 0.9]), 10.0, -0.5)[0].isnan()
    usual = {"margins": torch.rand(3), "gamma": 10.0, "beta": -0.5, "norm": "batch"}
    wrong = [{"margins": torch.rand(3, 1)}, {"norm": "l2"}, {"gamma": -1.0}]
    wrong += [{name: value} for name in ("gamma", "beta") for value in (math.nan, math.inf)]
    for change in wrong:
        with pytest.raises(ValueError, match="margins"):
            instance_weights(**usual | change)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 1e4, 1e6, 1e30])
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


def small_network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)]
    return nn.Sequential(*layers)


X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X, Y = X.round(decimals=1), torch.arange(12) % 4  # some pixels are exactly 0 and 1


def test_pgd_by_hand():
    weight = torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])  # margin x_1 - 2 x_2
    net = lambda x: x.flatten(1) @ weight.T  # noqa: E731
    x, y = torch.tensor([[[[0.5, 0.2, 0.5]]]]).repeat(2, 1, 1, 1), torch.tensor([0, 1])
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
    x, net = X.clone(), small_network().train(training)
    net[1].train(training and init != "none")  # now and then with a mode of its own
    modes = [module.training for module in net.modules()]
    net(x).sum().backward()
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    before = [t.clone() for t in tensors]
    x_adv = pgd(net, x.requires_grad_(), Y, eps=0.1, step_size=0.02, steps=10, loss=loss, init=init)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert not x_adv.requires_grad
    assert [module.training for module in net.modules()] == modes
    assert all(p.requires_grad for p in net.parameters())
    assert all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_pgd_starts_alike_in_any_memory_format(init):
    starts = []
    for memory_format in torch.contiguous_format, torch.channels_last:
        torch.manual_seed(0)
        starts.append(clirat.pgd_start(X.to(memory_format=memory_format), init, 0.1))
    assert torch.equal(*starts)


def test_pgd_starts_inside_the_ball():
    x_adv = pgd(small_network(), X, Y, eps=0.1, step_size=0.1, steps=0, init=X + 0.5)
    torch.testing.assert_close(x_adv, (X + 0.1).clamp(max=1))


def test_pgd_refuses():
    options = {"eps": 0.1, "step_size": 0.1, "steps": 1}
    for wrong in ({"steps": -1}, {"loss": "mse"}, {"init": "zero"}, {"init": X[:, :, 1:]}):
        with pytest.raises(ValueError, match="want"):
            pgd(small_network(), X, Y, **options | wrong)


def test_augment_crops_and_flips():
    x = torch.arange(1, 3 * 6 * 5 + 1).view(1, 3, 6, 5).repeat(64, 1, 1, 1).byte()
    padded = F.pad(x[0], (4, 4, 4, 4))
    crops = [padded[:, i : i + 6, j : j + 5] for i in range(9) for j in range(9)]
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
    net, ours = small_network(), small_network()
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
    net, args = small_network(), clirat.parse_args(["--batch-size", "8"])
    net[4].weight.data[:] = net[4].bias.data[:] = 0
    x, y = torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 4
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    attack = clirat.inner_attack(args, net)
    row = clirat.train_epoch(args, 76, net, attack, optimizer, x, y)
    assert (row["adv_correct"], row["weight_adv_correct"]) == (1, 1)
    assert row["ess"] == pytest.approx(1)


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
