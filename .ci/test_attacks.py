"""Attacks against loops, closed forms and each other."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import eval_attacks
from clirat import pgd, pm
from conftest import SHORT_ATTACKS, linear_network, small_images, small_network

X, Y = small_images()


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


def test_each_target_of_apgd_has_its_own_noise():
    net, x, y, seen = stubborn_network()
    eval_attacks.apgd(net, x, y, eps=0.1, loss="targeted", steps=2)
    starts = torch.cat(seen[2::3])  # after the checks; a start and two steps a target
    assert len(starts.flatten(1).unique(dim=0)) == 9


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


@pytest.mark.parametrize("size", [(4, 20), (20, 4)])
def test_square_reaches_all_of_an_oblong_image(size):
    x, seen = torch.full((1, 3, *size), 0.5), []

    def model(x):  # never fooled, never better off
        seen.append(x.clone())
        return torch.tensor([[1.0, 0.0]])

    eval_attacks.square(model, x, torch.tensor([0]), eps=0.1, queries=300)
    _, start, *tried = seen
    touched = torch.cat([(z != start).any(1) for z in tried]).any(0)  # (H, W)
    along = touched.any(size.index(4))  # (20,)
    assert along[:-1].all()
    assert not along[-1]  # as published: the last place is never drawn
    assert touched.any(size.index(20)).sum() >= 3
    colours = [(z[0] > 0.5)[:, (z != start).any(1)[0]] for z in tried]  # (3, M) each
    assert any((c != c[:1]).any() for c in colours)  # a sign for each channel


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
def test_noise_is_of_a_seed_and_an_images_number(name):
    x, net = X.double(), small_network().double().eval()
    y, attack = net(x).argmax(1), (eval_attacks.ATTACKS | {"aa": eval_attacks.autoattack})[name]
    one, two = (attack(net, x, y, eps=0.3, seed=seed) for seed in (0, 1))  # fools them at once
    assert ((one != two).flatten(1).any(1)).all()
    y[6] = (y[6] + 1) % 10  # wrong from the start: autoattack leaves it out
    some = attack(net, x[5:], y[5:], eps=0.3, index=torch.arange(5, 12))
    torch.testing.assert_close(some[2:], one[7:])


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
    case = x, other.eval()(x).argmax(1)  # what `other` has right, the judge has not
    _, wrong = eval_attacks.attack_and_judge("nat", other, *case, judge=net, eps=0, batch_size=5)
    assert wrong.any()


@pytest.mark.filterwarnings("ignore:the gradient")
@pytest.mark.parametrize("name", SHORT_ATTACKS)
@pytest.mark.parametrize(("n", "eps"), [(12, 0.03), (1, 0.03), (12, 0.0), (3, 1.0)])
def test_attack_invariants(name, n, eps):
    (x, y), net = small_images(n), small_network().train()
    net(x).sum().backward()
    tensors = [*net.state_dict().values(), *(p.grad for p in net.parameters())]
    before = [t.clone() for t in tensors]
    x_adv = SHORT_ATTACKS[name](
        net, x.clone().requires_grad_(), y.to(torch.uint8), eps=eps, batch_size=5
    )
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
    alone = SHORT_ATTACKS[name](net, x[-1:], y[-1:], eps=eps, index=last)
    assert (net(alone).argmax(1) != y[-1:]) == wrong[-1:]


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


def test_attacks_refuse_models():
    net = small_network().eval()
    for model, error, message in (
        (lambda x: (net(x),), TypeError, "tuple"),
        (lambda x: net(x).argmax(1), TypeError, "logits"),
        (small_network().half(), TypeError, "does not take"),
        (small_network(k=9), ValueError, "labels in 0..8"),
    ):
        for name in {*SHORT_ATTACKS} - {"nat"}:
            with pytest.raises(error, match=message):
                SHORT_ATTACKS[name](model, X, Y, eps=0.1)
    with pytest.raises(ValueError, match="unknown loss 'mse'"):
        eval_attacks.apgd(net, X, Y, eps=0.1, loss="mse")
    for attack in partial(pgd, step_size=0.1, steps=1), *SHORT_ATTACKS.values():
        if attack is not SHORT_ATTACKS["nat"]:
            with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
                attack(net, X, Y, eps=0.1)


def test_graphs_of_attacks(request):
    net, (x, y) = small_network(), small_images(7)
    attacks = [SHORT_ATTACKS[name] for name in eval_attacks.STAGES]
    plain = [attack(net, x, y, eps=0.03, batch_size=20) for attack in attacks]
    recorded = request.getfixturevalue("fake_cuda")
    replayed = [attack(net, x, y, eps=0.03, batch_size=20) for attack in attacks]
    assert {shape[0] for shape in recorded} <= {3, 6, 9}  # a few sizes, padded
    for ours, theirs in zip(replayed, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_defaults_of_pytorch_change_no_verdict(shortened):
    net, images = small_network().eval(), (X * 255).round().byte()
    names = [*eval_attacks.ATTACKS]
    labels = net(images / 255).argmax(1)
    expected = eval_attacks.evaluate(net, images, labels, names, eps=0.02)
    attacks = eval_attacks.ATTACKS | {"aa": eval_attacks.autoattack}
    made = {k: attack(net, images / 255, labels, eps=0.1) for k, attack in attacks.items()}
    for change, back in (
        (partial(torch.set_default_dtype, torch.float64), torch.float32),
        (partial(torch.set_default_device, "meta"), None),
    ):
        change()
        try:
            found = eval_attacks.evaluate(net, images, labels, names, eps=0.02)
            for k, attack in attacks.items():
                assert torch.equal(attack(net, images.float() / 255, labels, eps=0.1), made[k])
        finally:
            change.func(back)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
