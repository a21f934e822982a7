"""Verdicts, their files, and the rows and warnings of eval_attacks.py."""

import argparse
import json
import shutil
import threading
import warnings
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

import clirat
import eval_attacks
import models
from conftest import OnesOwn, evaluate, load, same, small_images, small_network

X, Y = small_images()
BYTES = (X * 255).round().byte()


@pytest.mark.filterwarnings("ignore:no APGD")
def test_evaluate_keeps_and_reuses_verdicts(shortened):
    torch.manual_seed(0)
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
    save = lambda verdicts: shown.append(dict(verdicts))  # noqa: E731
    evaluate(net, x, y, ["apgd"], batch_size=1, verdicts=first, save=save)
    assert torch.equal(first["apgd"], asked["apgd"])
    assert len(shown) == (asked["apgd"][8:] >= 0).sum() > 2  # the others were spared
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
    assert (evaluate(net, x, y, ["aa"], verdicts=known)["square"] == -1).all()
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


@pytest.mark.parametrize("processes", [2, 5])
def test_shares_of_an_evaluation(processes):
    net, (x, y), attacks = small_network().eval(), small_images(13), ["pgd20", "aa"]
    judged = partial(eval_attacks.evaluate, net, (255 * x).byte(), y, attacks, eps=0.02)
    shares = [judged(share=(i, processes)) for i in range(processes)]
    for i, verdicts in enumerate(shares):
        others = torch.arange(13) % processes != i
        assert all((verdict[others] == -1).all() for verdict in verdicts.values())
    merged = {name: torch.stack([v[name] for v in shares]).amax(0) for name in shares[0]}
    assert same(merged, judged())
    for share in (2, 2), (-1, 2), (0, 0):
        with pytest.raises(ValueError, match="want share"):
            judged(share=share)


def test_networks_that_a_copy_would_miss_are_attacked_themselves():
    odd = OnesOwn("types").eval()
    odd.bn1.running_var += 2
    assert eval_attacks.stand_in(odd, X) is odd
    for change in (
        lambda net: net.register_forward_hook(print),
        lambda net: net[1].register_forward_pre_hook(print),
        lambda net: setattr(net, "forward", net.forward),  # a copy would run the original's
    ):
        other = small_network().eval()
        change(other)
        assert eval_attacks.stand_in(other, X) is other


def test_what_is_attacked(monkeypatch):
    met = {}

    def spy(model, x, y, *, name, judge, **_):
        met[name] = model, judge
        return x

    for name in eval_attacks.ATTACKS:
        monkeypatch.setitem(eval_attacks.ATTACKS, name, partial(spy, name=name))
    net = small_network().eval()
    labels = net(BYTES / 255).argmax(1)
    eval_attacks.evaluate(net, BYTES, labels, ["aa", "cw"], eps=0.01, amp=True)
    assert all(judge is net for _, judge in met.values())
    dtypes = {name: next(model.parameters()).dtype for name, (model, _) in met.items()}
    assert dtypes.pop("square") == torch.float32  # it wants exact gains
    assert dtypes == dict.fromkeys(("nat", "cw", "apgd", "apgd-t", "fab-t"), torch.bfloat16)
    met.clear()
    eval_attacks.autoattack(net, BYTES / 255, labels, eps=0.01)
    assert list(met) == ["nat", *eval_attacks.STAGES]
    assert all(isinstance(model, models.Folded) and judge is net for model, judge in met.values())


def test_which_networks_are_recorded():
    careful = type("Careful", (models.ResNet18,), {})  # may read a value
    for kind, recorded in (models.ResNet18, "meta"), (careful, "cpu"):
        copy = models.Folded(kind()).to("meta")
        assert eval_attacks.graph_device(copy) == torch.device(recorded)
    with pytest.warns(UserWarning, match="amp does nothing"):
        eval_attacks.evaluate(lambda x: small_network()(x), BYTES, Y, ["nat"], eps=0.1, amp=True)


@pytest.mark.parametrize("kind", ["half", "plain tensor"])
def test_amp_where_there_is_no_copy_in_bfloat16(kind, shortened):
    torch.manual_seed(0)
    net = OnesOwn(kind)
    for _ in range(30):
        net(X)  # moves the statistics
    net.eval()
    labels, names = net(BYTES / 255).argmax(1), ["pgd20", "apgd", "square"]
    expected = eval_attacks.evaluate(net, BYTES, labels, names, eps=0.03)
    with pytest.warns(UserWarning, match="amp does nothing: this model has no copy in bfloat16"):
        found = eval_attacks.evaluate(net, BYTES, labels, names, eps=0.03, amp=True)
    assert same(found, expected)
    assert 0 < (expected["apgd"] == 1).sum() < 12


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


def test_what_is_no_doubt():
    x, y = small_images(64)
    for dead, found in (1, 0), (2, 1):  # 1.6% and 3.1%
        alive = (torch.arange(64) >= dead)[:, None]
        net = small_network().eval()
        model = lambda x, net=net, alive=alive: torch.where(alive, net(x), 0.5)  # noqa: E731
        assert len(eval_attacks.doubts(model, x, y)) == found
    random_in_training = nn.Sequential(nn.Dropout(), small_network())
    assert eval_attacks.doubts(random_in_training, x, y) == []


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


def test_evaluation_files(data, straight, tmp_path, capsys):
    path, figures = shutil.copy(straight / "last.pt", tmp_path), tmp_path / "figures.json"
    options = ["--data", data.with_name("test.npz"), "--attacks", "nat", "pgd20", "--json", figures]
    for n, eps in ((10, "1/255"), (10, "8/255"), (30, "1/255")):
        evaluate(path, *options, "--n", n, "--eps", eps)
    first, _, *rows = capsys.readouterr().out.strip().splitlines()[-5:]
    assert first == f"{data.with_name('test.npz')}: 30 of 30 test images (3, 8, 8), on cpu"
    (told,), (net, _) = json.loads(figures.read_text()), models.load(path)
    x, y = clirat.load_data(str(data), ["test"])
    expected = eval_attacks.evaluate(net, x, y, ["nat", "pgd20"], eps=1 / 255)
    kept = [eval_attacks.read_verdicts(file) for file in tmp_path.glob("last.pt.*.npz")]
    asked = {(settings["n"], 255 * settings["eps"]) for _, settings in kept}
    assert asked == {(10, 1), (10, 8), (30, 1)}
    (verdicts, settings), cells = next(item for item in kept if item[1]["n"] == 30), []
    for name in "nat", "pgd20":
        assert torch.equal(verdicts[name], expected[name])
        figures, k = told["attacks"][name], (expected[name] == 0).sum().item()
        low, high = (100 * end for end in eval_attacks.wilson(k, 30))
        assert figures == {"robust": k, "accuracy": 100 * k / 30, "interval": [low, high]}
        cells.append(f"{100 * k / 30:.2f} [{low:.1f}, {high:.1f}]")
    assert rows == [
        "| checkpoint | n | eps | NAT | PGD20 |",
        "| --- | --- | --- | --- | --- |",
        f"| {path} | 30 | 1/255 | {' | '.join(cells)} |",
    ]
    assert settings["training"]["method"] == "clirat"
    assert settings["training"]["lr_milestones"] == [2, 2]
    assert settings["dataset"] == "test.npz"
    assert eval_attacks.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # by a table


def test_what_verdicts_stand_for(monkeypatch):
    net, x, y = small_network(), BYTES[:9], Y[:9]
    usual = {"n": 9, "eps": 0.1, "seed": 0, "amp": False, "data": "some/small.npz"}

    def file(path="a.pt", x=x, y=y, **change):
        args = argparse.Namespace(**usual | change)
        found, settings = eval_attacks.verdict_file(args, Path("runs", path), net, {}, x, y)
        return found, settings["dataset"]

    path, _ = file()
    assert (path.parent, path.name[:5], path.suffix) == (Path("runs"), "a.pt.", ".npz")
    assert file(data="elsewhere/small.npz") == (path, "small.npz")  # known by what it is
    other = x.clone()
    other[8, 2, 7, 7] ^= 1
    changes = [{"path": "b.pt"}, {"n": 8}, {"eps": 0.2}, {"seed": 1}, {"amp": True}]
    others = [file(**change)[0] for change in [*changes, {"x": other}, {"y": y.flip(0)}]]
    for t in net[4].bias.data, net[1].running_mean:  # parameters and buffers
        t += 1
        others.append(file()[0])
    monkeypatch.setattr(eval_attacks, "VERSION", 0)
    others.append(file()[0])
    assert len({path, *others}) == 11
    monkeypatch.setattr(eval_attacks, "CIFAR10", sum(zlib.crc32(image.numpy()) for image in x))
    assert [file(x=of)[1] for of in (x, x.flip(0))] == ["CIFAR-10"] * 2
    assert file(x=x[1:])[1] == "small.npz"


def test_what_was_asked_is_not_asked_again(data, straight, tmp_path, monkeypatch, capsys):
    path = shutil.copy(straight / "last.pt", tmp_path)
    words = [path, "--data", data, "--attacks", "nat", "pgd20"]
    evaluate(*words)
    first = capsys.readouterr().out
    for name in "nat", "pgd20":
        monkeypatch.setitem(eval_attacks.ATTACKS, name, None)  # cannot be called
    evaluate(*words)
    assert capsys.readouterr().out == first


def test_several_checkpoints(data, straight, tmp_path, monkeypatch, capsys):
    first, second, figures = (tmp_path / name for name in ("1.pt", "2.pt", "figures.json"))
    checkpoint = load(straight / "last.pt")
    torch.save(checkpoint | {"args": checkpoint["args"] | {"data": "toy"}}, first)
    torch.save({"ema": checkpoint["model"], "net": checkpoint["model"]}, second)
    monkeypatch.setattr(eval_attacks, "doubts", lambda model, x, y: [f"up to {x.max():.0f}"])
    monkeypatch.setattr(eval_attacks, "masking", lambda figures: [", ".join(figures)])
    evaluate(first, second, "--data", data, "--attacks", "pgd20", "nat", "--json", figures)
    out, err = capsys.readouterr()
    assert [row.split()[1] for row in out.splitlines()[-2:]] == [str(first), str(second)]
    told = json.loads(figures.read_text())
    assert [of["checkpoint"] for of in told] == [str(first), str(second)]
    assert told[1]["training"]["state_dict"] == "ema, not net"
    own = (
        f"trained on toy, evaluated on {data}",
        "of the state dicts in the file this is ema, not net",
    )
    assert [of["warnings"] for of in told] == [["up to 1", "pgd20, nat", said] for said in own]
    said = [f"warning: {of['checkpoint']}: {text}" for of in told for text in of["warnings"]]
    assert err.splitlines() == said


def test_a_new_attack_gets_its_column(data, straight, tmp_path, monkeypatch, capsys):
    grey = lambda model, x, y, *, eps, **_: x + (0.5 - x).clamp(-eps, eps)  # noqa: E731
    monkeypatch.setitem(eval_attacks.ATTACKS, "grey", grey)
    monkeypatch.setattr(eval_attacks, "COLUMNS", ["nat", "grey"])
    path = shutil.copy(straight / "last.pt", tmp_path)
    evaluate(path, "--data", data, "--attacks", "nat", "grey")
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].endswith("| NAT | GREY |")
    assert rows[4].count("[") == 2


def test_verdicts_that_cannot_be_kept(data, straight, tmp_path, monkeypatch, capsys):
    path = shutil.copy(straight / "last.pt", tmp_path / "a b.pt")
    full = mock.Mock(side_effect=PermissionError("read-only folder"))
    monkeypatch.setattr(clirat, "write", full)
    with pytest.warns(UserWarning, match="verdicts are not kept: read-only folder"):
        evaluate(path, "--data", data, "--attacks", "nat", "--n", "7", "--batch-size", "2")
    assert "a b.pt | 7 |" in capsys.readouterr().out


def test_verdicts_of_another_process_are_kept(tmp_path):
    """What it wrote before this one got the lock, and not a moment earlier, is read and merged."""
    settings = dict.fromkeys([*eval_attacks.SETTINGS, "dataset"], 0) | {"n": 3, "training": {}}
    path, elsewhere = tmp_path / "a.npz", tmp_path / "elsewhere" / "a.npz"
    elsewhere.parent.mkdir()
    verdict = partial(torch.tensor, dtype=torch.int8)
    eval_attacks.keep(elsewhere, settings, {"nat": verdict([0, 1, -1]), "cw": verdict([1, 1, 1])})
    ours = {"nat": verdict([0, -1, 1]), "fgsm": verdict([-1, -1, 0])}
    with clirat.locked(tmp_path / ".verdicts.lock"):
        thread = threading.Thread(target=eval_attacks.keep, args=(path, settings, ours))
        thread.start()
        thread.join(0.5)
        assert not path.exists()
        shutil.copy(elsewhere, path)
    thread.join(10)
    merged = {"nat": verdict([0, 1, 1]), "cw": verdict([1, 1, 1]), "fgsm": verdict([-1, -1, 0])}
    assert same(ours, merged)
    assert same(eval_attacks.read_verdicts(path)[0], merged)
