"""python -m pytest -q .ci/test_attacks.py    attacks against loops, closed forms and each other."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import eval_attacks
import models
from clirat import pgd, pm
from conftest import linear_network, small_images, small_network

# ---- Formulas ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("classes", "targets"), [(12, 9), (10, 9), (4, 3)])
def test_targets(classes, targets):
    logits = torch.randn(20, classes, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20) % classes
    found = eval_attacks.targets_of(lambda x: logits[x], torch.arange(20), y, 20)
    for row, label, ours in zip(logits.tolist(), y.tolist(), found.T.tolist(), strict=True):
        others = sorted((-z, k) for k, z in enumerate(row) if k != label)
        assert ours == [k for _, k in others[:targets]]


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


# ---- Attacks against loops -----------------------------------------------------------------------


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


def test_square_reaches_all_of_a_wide_image():
    x, seen = torch.full((1, 3, 4, 20), 0.5), []

    def model(x):  # never fooled, never better off
        seen.append(x.clone())
        return torch.tensor([[1.0, 0.0]])

    eval_attacks.square(model, x, torch.tensor([0]), eps=0.1, queries=300)
    _, start, *tried = seen
    touched = torch.cat([(z != start).any(1) for z in tried]).any(0)  # (4, 20)
    assert touched[:, :-1].any(0).all()  # (published: the last place is never drawn)
    assert touched[:-1].any(1).all()


def test_square_leaves_a_tie_to_argmax():
    x, y = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 4, 4), torch.tensor([0, 1])

    def model(x):  # sure of the clean images, and at a loss about all others
        return torch.stack([(x == value).all((1, 2, 3)).float() for value in (0.2, 0.8)], 1)

    x_adv = eval_attacks.square(model, x, y, eps=0.1, queries=20)
    assert torch.equal(x_adv[0], x[0])  # argmax takes the first class: it stays right
    assert (x_adv[1] != x[1]).any()


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


def test_attacks_by_name(monkeypatch):
    (x, y), net, eps = small_images(), small_network().eval(), 0.3
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
    assert eval_attacks.ATTACKS["apgd-t"].keywords == {"loss": "targeted"}
    for index in torch.arange(3), torch.arange(12) - 1:
        with pytest.raises(ValueError, match="want index"):
            eval_attacks.apgd(net, x, y, eps=eps, index=index)
    monkeypatch.setitem(eval_attacks.ATTACKS, "far", lambda *_, **__: (x + 0.1).clamp(max=1))
    with pytest.raises(RuntimeError, match="left the ball"):
        eval_attacks.attack_and_judge("far", net, x, y, judge=net, eps=0.05, batch_size=5)


def test_points_leave_at_their_first_success():
    calls = []

    def attack(points, k, active):
        for step in 0, 1:
            calls.append((k, step, points[active].tolist()))
            images = torch.full((len(points), 3, 2, 2), 2 * k + step + 1.0)
            yield images, (points == k) | (step == 1) & (points == 3)

    x, y = torch.zeros(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64)
    x_adv = eval_attacks.in_batches(attack, x, y, 3, targets=3)
    assert calls == [
        (0, 0, [0, 1, 2]), (0, 1, [1, 2]), (0, 0, [3, 4]), (0, 1, [3, 4]),
        (1, 0, [1, 2, 4]), (1, 1, [2, 4]), (2, 0, [2, 4]), (2, 1, [4]),
    ]  # fmt: skip
    assert x_adv[:, 0, 0, 0].tolist() == [1, 3, 5, 2, 0]


def test_a_point_the_judge_keeps_goes_on():
    def attack(points, _, active):  # wrong at every step, it thinks
        for step in 1, 2, 3:
            yield torch.full((len(points), 3, 2, 2), step / 10), torch.ones_like(active)

    def judge(x):  # fooled from 0.2 on
        return torch.stack([x[:, 0, 0, 0] < 0.15, x[:, 0, 0, 0] > 0.15], 1).float()

    x, y = torch.zeros(2, 3, 2, 2), torch.tensor([0, 0])
    x_adv = eval_attacks.in_batches(attack, x, y, 2, judge=judge)
    assert (x_adv == 0.2).all()


@pytest.mark.parametrize("name", ["pgd20", "pgd100", "cw", "apgd", "apgd-t", "square", "aa"])
def test_seeds_differ(name):
    (x, _), net = small_images(), small_network().eval()
    y, attack = net(x).argmax(1), (eval_attacks.ATTACKS | {"aa": eval_attacks.autoattack})[name]
    one, two = (attack(net, x, y, eps=0.3, seed=seed) for seed in (0, 1))  # fools them at once
    assert ((one != two).flatten(1).any(1)).all()


def test_the_judge_has_the_last_word():
    (x, y), net, other = small_images(), small_network(), small_network()
    other[4].weight.data += 0.02 * torch.randn_like(other[4].weight)
    for name in ("apgd", "fab-t", "square"):
        before = [t.clone() for t in net.train().state_dict().values()]
        x_adv = eval_attacks.ATTACKS[name](other, x, y, eps=0.02, judge=net)
        assert all(map(torch.equal, before, net.state_dict().values()))
        net.eval()
        moved = (x_adv != x).flatten(1).any(1)
        assert moved.any()
        assert (net(x_adv[moved]).argmax(1) != y[moved]).all()


# ---- What every attack does ----------------------------------------------------------------------


ATTACKS = eval_attacks.ATTACKS | {
    "apgd-t": partial(eval_attacks.apgd, loss="targeted", steps=20),
    "dlr": partial(eval_attacks.apgd, loss="dlr"),
    "fab-t": partial(eval_attacks.fab_t, steps=20),
    "square": partial(eval_attacks.square, queries=200),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the gradient")
@pytest.mark.parametrize("name", ATTACKS)
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


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda x: (small_network()(x),), TypeError, "tuple"),
        (small_network().half(), TypeError, "does not take"),
        (small_network(k=5), ValueError, "labels in 0..4"),
        (lambda x: small_network().eval()(x).argmax(1), TypeError, "logits"),
    ],
)
def test_attacks_refuse_models(model, error, message):
    for attack in ATTACKS.values():
        if attack is not ATTACKS["nat"]:
            with pytest.raises(error, match=message):
                attack(model, X, Y, eps=0.1)


def test_graphs_of_attacks(request):
    net, (x, y) = small_network(), small_images(7)
    attacks = ATTACKS["apgd"], ATTACKS["apgd-t"], ATTACKS["fab-t"], ATTACKS["square"]
    plain = [attack(net, x, y, eps=0.03, batch_size=20) for attack in attacks]
    recorded = request.getfixturevalue("fake_cuda")
    replayed = [attack(net, x, y, eps=0.03, batch_size=20) for attack in attacks]
    assert {shapes[0][0] for shapes in recorded} <= {3, 6, 9}  # a few sizes, padded
    for ours, theirs in zip(replayed, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---- Evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def shortened(monkeypatch):
    monkeypatch.setattr(eval_attacks, "ATTACKS", {k: ATTACKS[k] for k in eval_attacks.ATTACKS})


@pytest.mark.filterwarnings("ignore:no APGD")
def test_evaluate_keeps_and_reuses_verdicts(shortened):
    x, y = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8), torch.arange(20) % 3
    net, evaluate = small_network(k=3).eval(), partial(eval_attacks.evaluate, eps=0.01)
    asked = evaluate(net, x, y, [*eval_attacks.ATTACKS])
    assert asked.keys() == eval_attacks.ATTACKS.keys()
    for name, attack in eval_attacks.ATTACKS.items():
        x_adv = attack(net, x / 255, y, eps=0.01)
        wrong = net(x_adv).argmax(1) != y
        assert torch.equal(wrong[asked[name] >= 0], asked[name][asked[name] >= 0].bool())
    shown, first = [], {name: v.clone() for name, v in asked.items() if name in ("nat", "apgd")}
    first["apgd"][8:] = -1  # as if stopped there
    evaluate(
        net, x, y, ["apgd"], batch_size=3, verdicts=first, save=lambda v: shown.append(dict(v))
    )
    assert torch.equal(first["apgd"], asked["apgd"])
    assert len(shown) == math.ceil((asked["apgd"][8:] >= 0).sum() / 3)  # the others were spared
    x_adv = eval_attacks.autoattack(net, x / 255, y, eps=0.01)  # the same attacks in one call
    both = evaluate(net, x, y, ["aa"])
    robust = net(x_adv).argmax(1) == y
    assert torch.equal(robust, both["square"] == 0)
    assert torch.equal(robust, eval_attacks.robust_in(both, "aa"))
    stages = torch.stack([both[name] for name in ("nat", *eval_attacks.STAGES)])
    assert ((stages == 1).sum(0) == ~robust).all()  # fooled once, then spared
    assert ((stages == -1) == ((stages == 1).cumsum(0) - (stages == 1).int() > 0)).all()
    assert not any(eval_attacks.to_ask(both, name).any() for name in both)
    known = {"nat": torch.ones(20, dtype=torch.int8)}  # all wrong: nothing is left to attack
    evaluate(net, x, y, ["aa"], verdicts=known)
    assert (known["square"] == -1).all()
    assert not eval_attacks.robust_in(known, "aa").any()
    with pytest.warns(UserWarning, match="needs 4 classes, not 3"):
        assert torch.equal(eval_attacks.ATTACKS["apgd-t"](net, x / 255, y, eps=0.01), x / 255)
    with pytest.warns(UserWarning, match="dlr needs 3 classes, not 2"):
        eval_attacks.apgd(small_network(k=2), x / 255, y % 2, eps=0.01, loss="dlr")
    half = evaluate(net, x, y, ["apgd"], amp=True)["apgd"]
    assert (half != asked["apgd"]).sum() <= 2
    with pytest.raises(TypeError, match="uint8"):
        evaluate(net, x / 255, y, ["nat"])
    for labels in y[:19], y + 1, y - 1:
        with pytest.raises(ValueError, match="labels"):
            evaluate(net, x, labels, ["nat"])
    with pytest.raises(ValueError, match="unknown attacks magic"):
        evaluate(net, x, y, ["magic"])


def test_what_is_attacked(monkeypatch):
    class Asks(nn.Module):  # a tracer sees another network
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3)
            nn.init.uniform_(self.bn.running_var, 2, 3)

        def forward(self, x):
            out = self.conv(x)
            return self.bn(out + 1 if isinstance(out, torch.Tensor) else out).flatten(1)

    (x, _), net, odd, met = small_images(), small_network().eval(), Asks().eval(), {}
    assert eval_attacks.stand_in(odd, x) is odd
    for change in (
        lambda net: net.register_forward_hook(print),
        lambda net: setattr(net, "forward", net.forward),  # a copy would run the original's
    ):
        other = small_network().eval()
        change(other)
        assert eval_attacks.stand_in(other, x) is other
    attack_and_judge = eval_attacks.attack_and_judge

    def spy(name, model, x, y, *, judge, **options):
        met[name] = model, judge
        return attack_and_judge("nat", model, x, y, judge=judge, **options)

    monkeypatch.setattr(eval_attacks, "attack_and_judge", spy)
    images = (x * 255).round().byte()
    labels = net(images / 255).argmax(1)
    eval_attacks.evaluate(net, images, labels, ["aa", "cw"], eps=0.01, amp=True)
    assert all(judge is net for _, judge in met.values())
    dtypes = {name: next(model.parameters()).dtype for name, (model, _) in met.items()}
    assert dtypes.pop("square") == torch.float32  # it wants exact gains
    assert dtypes == dict.fromkeys(("nat", "cw", "apgd", "apgd-t", "fab-t"), torch.bfloat16)
    met.clear()
    eval_attacks.autoattack(net, images / 255, labels, eps=0.01)
    assert list(met) == ["nat", *eval_attacks.STAGES]
    for model, judge in met.values():
        assert isinstance(model, models.Folded)
        assert judge is net


def test_which_networks_are_recorded():
    class Careful(models.ResNet18):  # may read a value
        pass

    for kind, recorded in (models.ResNet18, "meta"), (Careful, "cpu"):
        copy = models.Folded(kind()).to("meta")
        assert eval_attacks.graph_device(copy) == torch.device(recorded)
    with pytest.warns(UserWarning, match="amp does nothing"):
        eval_attacks.evaluate(
            lambda x: small_network()(x), (X * 255).byte(), Y, ["nat"], eps=0.1, amp=True
        )


class OnesOwn(nn.Module):
    """A network that has no copy in bfloat16: a plain tensor in it, or a forward that asks."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.mean, self.net = kind, torch.full((3, 1, 1), 0.5), small_network()

    def forward(self, x):
        return self.net(x.float() if self.kind == "asks" else x - self.mean)


@pytest.mark.parametrize("kind", ["asks", "plain tensor"])
def test_amp_where_there_is_no_copy_in_bfloat16(kind, shortened):
    net, images = OnesOwn(kind).eval(), (X * 255).round().byte()
    labels, names = net(images / 255).argmax(1), ["pgd20", "apgd", "square"]
    expected = eval_attacks.evaluate(net, images, labels, names, eps=0.02)
    with pytest.warns(UserWarning, match="amp does nothing: this model has no copy in bfloat16"):
        found = eval_attacks.evaluate(net, images, labels, names, eps=0.02, amp=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert 0 < (expected["apgd"] == 1).sum() < 12


def test_defaults_of_pytorch_change_no_verdict(shortened):
    net, images = small_network().eval(), (X * 255).round().byte()
    names = [*eval_attacks.ATTACKS]
    labels = net(images / 255).argmax(1)
    expected = eval_attacks.evaluate(net, images, labels, names, eps=0.02)
    x_adv = eval_attacks.autoattack(net, images / 255, labels, eps=0.02)
    found_by = {k: f(net, images / 255, labels, eps=0.1) for k, f in eval_attacks.ATTACKS.items()}
    for change, back in (
        (partial(torch.set_default_dtype, torch.float64), torch.float32),
        (partial(torch.set_default_device, "meta"), None),
    ):
        change()
        try:
            found = eval_attacks.evaluate(net, images, labels, names, eps=0.02)
            again = eval_attacks.autoattack(net, images.float() / 255, labels, eps=0.02)
            for k, attack in eval_attacks.ATTACKS.items():
                assert torch.equal(attack(net, images.float() / 255, labels, eps=0.1), found_by[k])
        finally:
            change.func(back)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert torch.equal(again, x_adv)


def test_inference_mode_is_named():
    attacks = partial(pgd, step_size=0.1, steps=1), eval_attacks.apgd, eval_attacks.autoattack
    for attack in attacks:
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
            attack(small_network(), X, Y, eps=0.1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda z: z, None),
        (lambda z: z.softmax(1), "probabilities"),
        (lambda z: z + torch.randn_like(z), "random"),
        (lambda z: (z * 0).round(), "zero or NaN at 100%"),
        (lambda z: (z - z).sqrt() + z, "zero or NaN at 100%"),
    ],
)
def test_doubts_reach_python_users(output, message, monkeypatch):
    monkeypatch.setattr(eval_attacks, "STAGES", ["apgd"])
    (x, y), net = small_images(2), small_network().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eval_attacks.autoattack(lambda x: output(net(x)), x, torch.zeros_like(y), eps=0.0)
    texts = [str(w.message) for w in caught]
    assert [text for text in texts if message and message in text] or not message
    assert len(texts) == bool(message)


def test_few_zero_gradients_are_no_doubt():
    x, y = small_images(64)
    for dead, found in (1, 0), (2, 1):  # 1.6% and 3.1%
        alive = (torch.arange(64) >= dead)[:, None]
        net = small_network().eval()
        model = lambda x, net=net, alive=alive: torch.where(alive, net(x), 0.5)  # noqa: E731
        assert len(eval_attacks.doubts(model, x, y)) == found


def test_masking():
    def sentences(n, **robust):
        usual = {"pgd20": 0.50, "aa": 0.48, "fab-t": 0.48, "square": 0.48}
        figures = {}
        for name, share in (usual | robust).items():
            k = round(share * n)
            interval = [100 * end for end in eval_attacks.wilson(k, n)]
            figures[name] = {"robust": k, "accuracy": 100 * k / n, "interval": interval}
        return eval_attacks.masking(figures)

    assert sentences(1000) == []
    assert sentences(20, pgd20=0.6) == []  # two images of twenty are no evidence
    assert sentences(10_000, pgd20=0.505) == []  # nor is what is usual
    (under,) = sentences(1000, pgd20=0.6)
    assert under.startswith("AutoAttack is 12.0 points under PGD20 (")
    (under,) = sentences(1000, pgd100=0.6)
    assert under.startswith("AutoAttack is 12.0 points under PGD100 (")
    assert "12.0 points under PGD20, 11.0 points" in sentences(1000, pgd20=0.6, pgd100=0.59)[0]
    assert "Square takes 1.0" in sentences(1000, **{"fab-t": 0.49})[0]
    figures = {"pgd20": {"accuracy": 60.0, "interval": [59, 61]}}
    assert eval_attacks.masking(figures) == []  # AutoAttack was not asked for
