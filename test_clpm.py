"""python -m pytest -q    margins, weights and losses on numbers small enough to check by hand.

Algorithm 1, the attacks and the programs are tested in .ci/test_*.py.
"""

import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from clirat import METHODS, at_loss, cl_pm, instance_weights, mart_loss, pm, trades_loss

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
    logits = random_logits(200, k) - 9  # PM of logits is CW's margin
    gaps = [
        min(row[y] - z for j, z in enumerate(row) if j != y)
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(pm(logits, labels), torch.tensor(gaps).double())


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


# ---- Weights -------------------------------------------------------------------------------------


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


# ---- Losses and methods --------------------------------------------------------------------------


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
    nat, adv = (logits.clone().requires_grad_() for logits in random_logits(12, 5).split(6))
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


def test_methods():
    # loss, margin, gamma, beta, lambda
    assert {name: tuple(row) for name, row in METHODS.items()} == {
        "at": ("at", None, None, None, None),
        "trades": ("trades", None, None, None, 5),
        "mart": ("mart", None, None, None, 6),
        "mail-at": ("at", "pm", 10, -0.5, None),
        "mail-trades": ("trades", "pm", 2, 0, 5),
        "mail-mart": ("mart", "pm", 2, 0, 6),
        "clirat": ("at", "cl-pm", 10, -0.5, None),
        "clir-trades": ("trades", "cl-pm", 2, 0, 5),
        "clir-mart": ("mart", "cl-pm", 2, 0, 6),
        "gairat": ("at", "lps", 20, 0.4, None),
        "fat": ("at", None, None, None, None),
    }
