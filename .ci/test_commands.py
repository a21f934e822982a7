"""Flags, defaults, bounds, data, and input that is wrong."""

import functools
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import clirat
import eval_attacks
import models
from conftest import ROOT, TIMING, contents, evaluate, load, run, same


def test_defaults(monkeypatch):
    for cuda, device, sizes in (False, "cpu", (64, 64)), (True, "cuda", (128, 512)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert vars(clirat.parse_args([])) == {
            "method": "clirat", "arch": "resnet18", "gamma": 10, "beta": -0.5, "trade_off": None,
            "data": "data", "train_size": None, "epochs": 120, "burn_in": 75,
            "lr_milestones": [75, 90], "batch_size": 128, "lr": 0.01, "weight_decay": 3.5e-3,
            "eps": 8 / 255, "step_size": 2 / 255, "steps": 10, "seed": 1, "init": None,
            "exclude": None, "weight_norm": "batch", "amp": False, "eval_every": 1,
            "eval_size": 1000, "out": "runs/clirat-resnet18-s1", "resume": False, "compile": False,
            "device": device,
        }  # fmt: skip
        usual = {"checkpoints": [Path("a.pt")], "arch": None, "data": "data", "n": None}
        usual |= {"attacks": ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]}  # the paper's columns
        usual |= {"eps": 8 / 255, "seed": 0, "json": None, "device": device}
        for flag, size in ([], sizes[0]), (["--amp"], sizes[1]):
            found = vars(eval_attacks.parse_args(["a.pt", *flag]))
            assert found == usual | {"amp": bool(flag), "batch_size": size}
    args = clirat.parse_args(["--method=trades", "--arch=wrn-32-10", "--seed=7", "--epochs=16"])
    assert (args.trade_off, args.out) == (5, "runs/trades-wrn-32-10-s7")
    assert (args.burn_in, args.lr_milestones) == (10, [10, 12])
    assert (args.lr, args.weight_decay) == (0.1, 7e-4)


BOUNDS = [  # flags, the first and last values that are taken, and those beside them that are not
    (clirat, "--trade-off --lr --weight-decay --step-size", "0", "-1e-9"),
    (clirat, "--burn-in --lr-milestones --eval-every", "0", "-1"),
    (clirat, "--train-size --epochs --steps --eval-size", "1", "0"),
    (clirat, "--batch-size", "2", "1"),
    (clirat, "--gamma", "0 1e6", "-1e-9 1000001"),
    (clirat, "--beta", "-1e6 1e6 -1/3", "inf nan 1e999 8/0 1000001 -1000001"),
    (clirat, "--eps", "0 1", "-1e-9 1.01"),
    (clirat, "--seed", "0 400000", "-1 400001"),
    (eval_attacks, "--n --batch-size", "1", "0"),
    (eval_attacks, "--eps", "0 1", "-1e-9 1.01"),
    (eval_attacks, "--seed", f"0 {2**31}", f"-1 {2**31 + 1}"),
]


@pytest.mark.parametrize(("program", "flags", "good", "bad"), BOUNDS)
def test_bounds(program, flags, good, bad, refused):
    for flag in flags.split():
        words = ["a.pt"] if program is eval_attacks else ["--method", "clir-trades"]
        for value in good.split():
            program.parse_args([*words, f"{flag}={value}"])
        for value in bad.split():
            said = f"argument {flag}: invalid finite"
            refused(said, program.parse_args, [*words, f"{flag}={value}"])
    assert clirat.parse_args(["--lr-milestones"]).lr_milestones == []  # none


TRAIN = [  # the first epoch whose row of the log flags change, and columns they change there
    (1, "loss", "--arch wrn-10-2, --trade-off 2, --data other_images.npz, --train-size 40"),
    (1, "loss", "--batch-size 25, --weight-decay 0.5, --eps 4/255, --step-size 1/255, --steps 3"),
    (1, "loss", "--seed 2, --amp"),
    (1, "lr loss", "--lr 0.05"),
    (1, "nat pgd20", "--eval-every 2, --eval-size 7"),
    (2, "loss ess", "--method mail-at, --gamma 3, --beta 0, --burn-in 2"),
    (2, "loss", "--weight-norm mail"),
    (2, "loss weight_single_cl", "--exclude single"),
    (2, "lr", "--epochs 4, --lr-milestones 2"),  # with more epochs it drops later
]
TRAIN = [(flag, *case) for *case, flags in TRAIN for flag in flags.split(", ")]
BATCHES = (4, 221), (4, 140), (1, 5)  # sizes, and the first pixel
EVALUATE = [  # a flag, and what changes of what attacks are called with, one after another
    ("--attacks pgd20 cw", [{}, {"name": "cw"}]),
    ("--data other_test.npz", [{"first": 220}]),
    ("--n 7", [{"n": 7}]),
    ("--batch-size 4", [{"batch_size": 4, "n": n, "first": i} for n, i in BATCHES]),
    ("--eps 4/255", [{"eps": 4 / 255}]),
    ("--seed 5", [{"seed": 5}]),
    ("--amp", [{"dtype": torch.bfloat16}]),
]
# --resume, --init: test_run_resume_and_init. --compile: test_amp_and_compile. --out: everywhere.
# --device: test_bad_input. An evaluation's --arch, --json: test_models.py, test_evaluation.py.


def test_the_tables_have_every_flag(capsys):
    for program, table, elsewhere in (
        (clirat, TRAIN, {"--resume", "--init", "--compile", "--out", "--device"}),
        (eval_attacks, EVALUATE, {"--arch", "--device", "--json"}),
    ):
        with pytest.raises(SystemExit, match="0"):
            program.parse_args(["--help"])
        flags = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
        assert {case[0].split()[0] for case in table} | elsewhere == flags


@pytest.fixture(scope="session")
def rows_of(desk, tmp_path_factory):
    """A function of flags: the rows of the log that a run of two epochs with them has."""

    @functools.cache
    def rows(*flags):
        out = tmp_path_factory.mktemp("run")
        run(desk / "small.npz", "--epochs", "2", *flags, "--out", out)
        return load(out / "last.pt")["log"]

    return rows


@pytest.mark.parametrize(("flag", "epoch", "columns"), TRAIN)
def test_flags_of_training(flag, epoch, columns, rows_of, desk, monkeypatch, refused):
    monkeypatch.chdir(desk)
    if "--data" not in flag:  # which may have moved
        words = ["--resume", "--out", "run", *flag.split()]
        refused("run was started with", clirat.parse_args, words)
    common = ["--method", "trades"] if "trade-off" in flag else []
    usual, changed = rows_of(*common), rows_of(*common, *flag.split())
    assert same(changed[: epoch - 1], usual[: epoch - 1])
    before, now = usual[epoch - 1], changed[epoch - 1]
    differing = {name for name in before if before[name] != now[name]} - {*TIMING}
    assert {*columns.split()} <= differing
    assert ("lr" in differing) == ("lr" in columns)
    if "--eval" in flag:
        assert {*columns.split()} == differing
        assert changed[1]["loss"] == usual[1]["loss"]
    assert len(changed) == 2 + 2 * ("--epochs" in flag)


@pytest.mark.parametrize(("flag", "changes"), EVALUATE)
def test_flags_of_evaluation(flag, changes, desk, tmp_path, monkeypatch):
    monkeypatch.chdir(desk)
    seen = []

    def attack(model, x, y, *, judge, index, **options):
        first, dtype = round(255 * x[0, 0, 0, 0].item()), next(model.parameters()).dtype
        seen.append(options | {"n": len(x), "first": first, "dtype": dtype})
        return x

    for name in "pgd20", "cw":
        monkeypatch.setitem(eval_attacks.ATTACKS, name, partial(attack, name=name))
    common = ["--data=small.npz", "--n=9", "--batch-size=64", "--attacks=pgd20"]
    evaluate(shutil.copy("run/last.pt", tmp_path / "usual.pt"), *common)
    evaluate(shutil.copy("run/last.pt", tmp_path / "changed.pt"), *common, *flag.split())
    usual, *changed = seen
    assert changed == [usual | change for change in changes]


def test_another_module_named_models(tmp_path):
    (tmp_path / "models").mkdir()  # as in TRADES' tree
    (tmp_path / "models" / "__init__.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import eval_attacks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *_, said = done.stderr.splitlines()
    assert said.startswith("ImportError: cannot import name 'Folded'")
    assert str(tmp_path / "models" / "__init__.py") in said


def test_all_scripts_without_docstrings():
    paths = [p for p in (*ROOT.glob("*.py"), *ROOT.glob(".*/*.py")) if "test_" not in p.name]
    scripts = [path for path in paths if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    code = """import os, runpy, sys
for path in sys.argv[1:]:
    sys.argv, sys.path[0] = [path, "--help"], os.path.dirname(path)
    try: runpy.run_path(path, run_name="__main__")
    except SystemExit as end: print("ended with", end.code)"""
    command = [sys.executable, "-OO", "-c", code, *scripts]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("usage: ") == said.count("ended with 0") == len(scripts) > 5


BAD = {
    clirat: [
        ("--method magic", "magic"),
        ("--method at --gamma 2", "--gamma does nothing"),
        ("--arch wrn-11-1", "wrn-11-1"),
        ("--batch-size 51", "51"),
        ("--device cuda:99", "--device cuda:99"),
        ("--data nowhere.npz", "nowhere.npz"),
        ("--data truncated.npz", "truncated.npz"),
        ("--data test.npz", "x_train"),
        ("--data float_images.npz", "uint8"),
        ("--data grey_images.npz", "(50, 8, 8, 1)"),
        ("--data negative_labels.npz", "-1"),
        ("--data unknown_labels.npz", "0..5"),
        ("--data skipped_class.npz", "all classes 0..4 in y_train"),
        ("--data object_labels.npz", "object_labels.npz"),
        ("--data text_labels.npz", "integers from 0"),
        ("--data byte_labels.npz", "all classes 0..255"),
        ("--data one_class.npz", "all classes 0..1"),
        ("--data other_size.npz", "not uint8 (30, 8, 6, 3)"),
        ("--data svhn", "svhn holds no CIFAR-10"),
        ("--data run", "run holds no CIFAR-10"),
        ("--init nowhere.pt", "nowhere.pt"),
        ("--init weights.pt", "no training checkpoint"),
        ("--init run/burnin.pt --method trades", "want trades, wrn-10-1, seed 1"),
        ("--init run/burnin.pt --method fat", "want fat"),
        ("--init run/burnin.pt --seed 2", "want at, wrn-10-1, seed 2"),
        ("--init run/burnin.pt --burn-in 0", "no epoch after 0"),
        ("--init run/burnin.pt --epochs 1", "no epoch after 0"),
        ("--init run/last.pt --epochs 4 --method mail-at", "no epoch after 1"),
        ("--init run/last.pt --epochs 9 --burn-in 5", "no epoch after 1"),
        ("--out small.npz", "small.npz"),
        ("--out pile", "already holds a run: choose another --out, or --resume"),
        ("--out nothing --resume", "no run to resume"),
        ("--out list --resume", "list holds no run to resume"),
        ("--out run --resume --gamma 3", "started with gamma 10.0, not 3.0"),
        ("--out run --resume --init nowhere.pt", "started with init None, not nowhere.pt"),
        ("--out run --resume --data other_images.npz", "other data than run was started with"),
    ],
    eval_attacks: [
        ("nowhere.pt", "nowhere.pt"),
        ("run", "no file run"),
        ("truncated.pt", "truncated.pt"),
        ("weights.pt nowhere.pt", "nowhere.pt"),  # before the first is evaluated
        ("weights.pt --arch resnet18", "layer1.0.conv1.weight"),
        ("weights.pt --arch bogus", "unknown architecture 'bogus'"),
        ("weights.pt --data toy", "weights.pt knows 5 classes, toy has 10"),
        ("weights.pt --n 31", "31"),
        ("weights.pt --device cuda:99", "--device cuda:99"),
        ("--attacks nat weights.pt", "invalid choice: 'weights.pt'"),
        ("weights.pt --json nowhere/figures.json", "nowhere"),
        ("weights.pt --json weights.pt", "no .json"),
        ("damaged.pt --attacks nat", "is damaged"),
        ("short.pt --attacks nat", "is damaged (not all are of 30 images)"),
    ],
}


@pytest.fixture(scope="session")
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
        "other_test": {"x_test": arrays["x_test"] ^ 1},
        "float_images": {"x_train": images.astype(np.float32)},
        "grey_images": {"x_train": images[..., :1]},
        "negative_labels": {"y_train": labels - 1},
        "unknown_labels": {"y_test": arrays["y_test"] + 1},
        "skipped_class": {"y_train": np.where(labels == 3, 2, labels)},
        "other_size": {"x_test": arrays["x_test"][:, :, 1:-1]},
        "object_labels": {"y_train": np.array([print] * 50, dtype=object)},
        "text_labels": {"y_train": labels.astype("U2")},
        "byte_labels": {"y_train": np.where(labels == 4, 255, labels).astype(np.uint8)},
        "one_class": {"y_train": 0 * labels, "y_test": 0 * arrays["y_test"]},
    }
    for name, change in bad.items():
        np.savez(folder / f"{name}.npz", **(arrays | change))
    (folder / "truncated.npz").write_bytes(data.read_bytes()[:1000])
    torch.save(models.build("wrn-10-1", 5).state_dict(), folder / "weights.pt")
    (folder / "truncated.pt").write_bytes((folder / "weights.pt").read_bytes()[:5000])
    for name in "damaged.pt", "short.pt":
        shutil.copy(folder / "weights.pt", folder / name)
        evaluate(folder / name, "--data", data, "--attacks", "nat", "fgsm")
    next(folder.glob("damaged.pt.*.npz")).write_text("damaged")
    short = next(folder.glob("short.pt.*.npz"))
    with np.load(short) as file:
        np.savez(short, settings=file["settings"], nat=file["nat"], fgsm=file["fgsm"][:5])
    (folder / "list").mkdir()
    (folder / "list" / "args.json").write_text("[]")
    (folder / "pile").mkdir()
    shutil.copy(folder / "weights.pt", folder / "pile")
    return folder


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [(program, *case) for program, cases in BAD.items() for case in cases],
)
def test_bad_input(program, words, message, desk, refused, monkeypatch):
    """The program ends with one line, or argparse's two, and status 2, and touches no file."""
    monkeypatch.chdir(desk)
    before, common = contents(desk), "--data small.npz --device cpu"
    if program is clirat:
        common += " --arch wrn-10-1 --batch-size 20 --steps 2 --epochs 3 --eval-size 20 --burn-in 1"
    refused(message, program.main, f"{common} {words}".split())
    assert contents(desk) == before


def test_missing_classes_are_said(data, tmp_path, capsys):
    arrays = dict(np.load(data))
    order = {part: np.argsort(arrays[f"y_{part}"], kind="stable") for part in ("train", "test")}
    np.savez(tmp_path / "sorted.npz", **{k: v[order[k[2:]]] for k, v in arrays.items()})
    run(tmp_path / "sorted.npz", "--out", tmp_path, "--epochs", "1", "--train-size", "25")
    out, err = capsys.readouterr()
    assert "25 training and 30 test images" in out
    assert "note: the first 25 images are of 3 of 5 classes\n" in err
    words = tmp_path / "last.pt", "--attacks", "nat", "--data"
    evaluate(*words, data)
    assert capsys.readouterr().err == ""
    evaluate(*words, tmp_path / "sorted.npz", "--n", "6")
    said = f"note: {tmp_path}/last.pt knows 5 classes, the 6 images are of 1\n"
    assert capsys.readouterr().err == said
    torch.save(models.build("wrn-10-1", 100).state_dict(), tmp_path / "last.pt")
    evaluate(*words, data)
    assert "knows 100 classes, the 30 images are of 5\n" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "burn_in"), [
    ("--epochs 2 --burn-in 2", 2), ("--epochs 2 --burn-in 1", None),
    ("--epochs 1 --method at", None), ("--epochs 1 --method at --exclude multi", 1),
])  # fmt: skip
def test_a_run_that_ends_with_its_burn_in_is_said(options, burn_in, data, tmp_path, capsys):
    run(data, "--out", tmp_path, *options.split())
    out, err = capsys.readouterr()
    said = f"note: all weights stay 1, burn-in takes {burn_in} epochs\n"
    assert err == (said if burn_in else "")
    assert ("PGD overstates what weighting gains" in out) == (options == "--epochs 2 --burn-in 1")


def test_devices(monkeypatch, capsys):
    assert clirat.join_processes("meta", False) == torch.device("meta")  # any of PyTorch
    with pytest.raises(ValueError, match="--device nowhere: "):
        clirat.join_processes("nowhere", False)
    for cpu, amp, said in ("AVX2", True, True), ("AVX2", False, False), ("AVX512", True, False):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda cpu=cpu: cpu)
        clirat.join_processes("cpu", amp)
        assert ("leave out --amp" in capsys.readouterr().err) == said


def test_toy_data():
    x, y, x_test, y_test = clirat.load_data("toy")
    assert (x.shape, x_test.shape) == ((2000, 3, 16, 16), (500, 3, 16, 16))
    assert all(map(torch.equal, (x, y, x_test, y_test), clirat.load_data("toy")))
    assert all(map(torch.equal, (x_test, y_test), clirat.load_data("toy", ["test"])))
    assert torch.unique(torch.cat([x, x_test]), dim=0).shape[0] == 2500  # no image twice
    mean = torch.stack([x[y == k].double().mean((0, 2, 3)) for k in range(10)])  # (10, 3)
    assert ((mean - 127.5).norm(dim=1) - 34).abs().max() < 3
    nearest = torch.cdist(x_test.double().mean((2, 3)), mean).argmin(1)
    assert (nearest == y_test).double().mean() > 0.9


def test_cifar10(tmp_path, monkeypatch):
    def files(folder, train, download):
        images = np.full((12 if train else 11, 8, 8, 3), train, np.uint8)
        return types.SimpleNamespace(data=images, targets=[i % 2 for i in range(len(images))])

    fake = mock.Mock(side_effect=files)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fake)
    x, y, x_test, y_test = clirat.load_data(str(tmp_path))
    assert [len(x), len(y), len(x_test), len(y_test)] == [12, 12, 11, 11]
    assert (x.unique(), x_test.unique()) == (1, 0)
    assert torch.equal(clirat.load_data(str(tmp_path), ["test"])[0], x_test)
    train, test = (mock.call(tmp_path, train=part, download=True) for part in (True, False))
    assert fake.mock_calls == [train, test, test]
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    for error in PermissionError("read-only"), OSError("no route"), RuntimeError("corrupted"):
        fake.side_effect = error
        with pytest.raises(OSError, match=f"no CIFAR-10 in .*{error}.*toy"):
            clirat.load_data(str(inner))
        assert fake.mock_calls[-1] == train
    fake.side_effect = files
    monkeypatch.chdir(tmp_path)  # where the default, and it alone, need not be there yet
    assert torch.equal(clirat.load_data("data")[0], x)
