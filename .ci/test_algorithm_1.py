"""PGD by hand, and `clirat.train` against a second Algorithm 1 that spells every step out."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clirat
from clirat import METHODS, pgd
from conftest import linear_network, small_images, small_network
from test_clpm import losses_by_loops

X, Y = small_images()


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


def test_pgds_start():
    start = partial(pgd, small_network(), y=Y, eps=0.1, step_size=0.1, steps=0)
    torch.testing.assert_close(start(x=X, init=X + 0.5), (X + 0.1).clamp(max=1))  # in the ball
    for init in "normal", "uniform":
        starts = []
        for memory_format in torch.contiguous_format, torch.channels_last:
            torch.manual_seed(0)
            starts.append(start(x=X.to(memory_format=memory_format), init=init))
        assert torch.equal(*starts)


def test_pgd_refuses():
    options = {"eps": 0.1, "step_size": 0.1, "steps": 1}
    for wrong in ({"steps": -1}, {"loss": "mse"}, {"init": "zero"}, {"init": X[:, :, 1:]}):
        with pytest.raises(ValueError, match="want"):
            pgd(small_network(), X, Y, **options | wrong)
    net = small_network()
    with pytest.raises(RuntimeError, match="channels"):
        pgd(net, X[:, :1], Y, **options)
    assert all(module.training for module in net.modules())


def test_fats_tau():
    """Steps past the first wrong iterate: 0, from epoch 51 of 120 on 1, from epoch 91 on 2."""
    net = linear_network(torch.tensor([[1.0] * 12, [-1.0] * 12]))  # class 0, whatever it sees
    x, y, at = torch.full((1, 3, 2, 2), 0.5), torch.tensor([1]), {1: 4, 120: 4}  # eps is 4 steps
    for method, taus in ("fat", {1: 0, 50: 0, 51: 1, 90: 1, 91: 2, 120: 2}), ("at", at):
        attack = clirat.inner_attack(clirat.parse_args(["--method", method]), net)
        for epoch, tau in taus.items():
            x_adv, _ = attack(x, y, epoch)
            assert (x_adv - x).abs().mean() / (2 / 255) == pytest.approx(tau, abs=0.3)


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


def test_a_tie_is_no_confusion_and_exclude_can_drop_all():
    for logits, exclude, figures in (
        (torch.zeros(10), None, {"adv_correct": 1, "weight_adv_correct": 1, "ess": 1}),
        (-torch.arange(10.0), "multi", {"loss": 0, "multi_cl": 1, "weight_multi_cl": 0, "ess": 0}),
    ):
        net = small_network()
        net[4].weight.data[:] = 0
        net[4].bias.data = logits
        args = clirat.parse_args(["--batch-size", "8"])
        args.exclude = exclude
        optimizer, x = torch.optim.SGD(net.parameters(), 0.1), torch.zeros(8, 3, 8, 8).byte()
        attack = lambda x, y, epoch: (x, y)  # noqa: E731
        row = clirat.train_epoch(args, 76, net, attack, optimizer, x, torch.full((8,), 9))
        assert {name: row[name] for name in figures} == pytest.approx(figures, abs=1e-9)
