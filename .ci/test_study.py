"""The table over runs, and the study that makes them."""

import datetime
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import clirat
import eval_attacks
import models
from clirat import METHODS
from conftest import ROOT, small_network

sys.path.insert(0, str(ROOT / ".paper"))
import study
import table


def verdict_file(folder, method, seed, robust, /, *, n=None, more=None, **settings):
    """A file of verdicts of a made-up run: {attack: robust (n,) bool}."""
    n = n or len(next(iter(robust.values())))
    training = {"method": method, "seed": seed, "arch": "resnet18", "epoch": 120, "init": f"{seed}"}
    training |= {k: getattr(METHODS[method], k) for k in ("gamma", "beta", "trade_off")}
    usual = {"n": n, "amp": False, "eps": 8 / 255, "seed": 0, "version": 5, "data": "a"}
    usual |= {"dataset": "CIFAR-10", "training": training | (more or {})}
    usual["weights"] = f"of {method}, {seed}"
    verdicts = {name: torch.from_numpy(1 - np.int8(r)) for name, r in robust.items()}
    path = folder / f"{len([*folder.iterdir()])}.npz"
    eval_attacks.keep(path, usual | settings, verdicts)
    return path


def test_table_by_hand(tmp_path, capsys):
    rng, n, files, robust = np.random.default_rng(0), 150, [], {}
    for place, method in enumerate(("clirat", "at", "mail-at", "trades")):
        for seed in 1, 2, 3:
            robust[method, seed] = rng.random(n) < 0.4 + 0.1 * place
            own = robust[method, seed]
            columns = {"nat": own} | dict.fromkeys(("apgd", "apgd-t", "fab-t"), own)
            columns["square"] = own & (np.arange(n) % 3 > 0)
            files.append(verdict_file(tmp_path, method, seed, columns))
    table.main([*map(str, files)])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["%", "seeds", "NAT", "APGD", "AA"]
    assert rows[2] == ["test images", "", "150", "150", "150"]
    names = [row[0] for row in rows[3::2]]
    assert names == [
        "at", "trades", "mail-at", "clirat", "mail-at - at", "clirat - at", "clirat - mail-at"
    ]  # fmt: skip
    assert {row[0] for row in rows[4::2]} == {"the paper's"}
    assert rows[4][2:] == ["85.64 ± 0.25", "48.53 ± 0.19", "46.87 ± 0.62"]
    assert rows[-1][2:] == ["-0.14", "+3.13", "-0.97"]  # 83.60 - 83.74, ..., 45.50 - 46.47

    for row in rows[3:11:2]:
        shares = [100 * robust[row[0], seed].mean() for seed in (1, 2, 3)]
        assert row[1:3] == ["3", f"{np.mean(shares):.2f} ± {np.std(shares, ddof=1):.2f}"]
    for row in rows[11::2]:
        ours, theirs = ([robust[m, s] for s in (1, 2, 3)] for m in row[0].split(" - "))
        gaps = 100.0 * (np.int8(ours) - np.int8(theirs))  # (seeds, images)
        mean, over_seeds = gaps.mean(), gaps.mean(1).std(ddof=1)
        half = 1.96 * gaps.mean(0).std(ddof=1) / n**0.5
        interval = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
        assert row[1:3] == ["3", f"{mean:+.2f} ± {over_seeds:.2f} {interval}"]


def test_table_compares_like_with_like(tmp_path, capsys, refused):
    some, make = np.arange(40) < 20, partial(verdict_file, tmp_path)
    two = [make("at", 1, {"nat": some}), make("clirat", 1, {"nat": some})]
    for what in {"eps": 0.5}, {"data": "b"}, {"seed": 1}, {"version": 4}:  # a table for each
        files = *two, make("mail-at", 1, {"nat": some}, **what)
        table.main([*map(str, files)])
        one, other = capsys.readouterr().out.split("\ndataset CIFAR-10, ")[1:]
        assert "| clirat - at | 1 |" in one
        assert "mail-at" not in one
        assert f"{next(iter(what))} {next(iter(what.values()))}" in other
        assert "| mail-at | 1 | 50.00 |" in other
    theirs = make("at", 1, {"nat": some}, more={"method": "theirs"})
    refused("not of a run", table.main, [str(theirs)])

    rows = lambda *files: table.table([table.read(file) for file in files])  # noqa: E731
    apart = make("clirat", 2, {"nat": some}, more={"gamma": 7.0})
    names = [row[0] for row in rows(*two, apart)[2:]]
    own = [name for name in names if name != "the paper's"]
    assert own == ["at", "clirat, gamma 10.0", "clirat, gamma 7.0", "clirat, gamma 10.0 - at"]
    assert len(names) - len(own) == 3  # the paper has no gamma 7 but in a figure
    for change in {"exclude": "single"}, {"train_size": 100}:
        other = make("clirat", 1, {"nat": some}, more=change)
        assert [row[0] for row in rows(other)[2:]] == ["clirat"]  # not in the paper's tables
    longer = make("clirat", 1, {"nat": some}, more={"epoch": 121, "epochs": 121})
    assert not any(" - " in row[0] for row in rows(two[0], longer))
    best = {"selected_by": "PGD-20"}
    bests = [make("at", s, {"nat": some}, more=best | {"epoch": 80 + s}) for s in (1, 2)]
    assert rows(*bests)[2][1] == "2"

    # several files of a checkpoint: what most runs share; what is not through does not count
    begun = np.where(np.arange(50) < 49, 0, 2)  # the last one is -1, not asked, then
    files = [*two, make("at", 1, {"nat": np.ones(60)})]
    files.append(make("at", 1, {"nat": np.ones(50), "cw": begun}, n=50))
    files += [make("clirat", 1, {"pgd20": some}), make("clirat", 1, {"pgd20": some[:9]}, amp=True)]
    found = rows(*files)
    assert found[0] == ["%", "seeds", "NAT", "PGD20"]
    assert found[1] == ["test images", "", "40", "40"]
    assert found[2][2:] == ["50.00", ""]
    assert found[-2] == ["clirat - at", "1", "+0.00", ""]  # none differs: no interval of no width
    in_bfloat16 = make("mart", 1, {"nat": some}, amp=True)
    assert rows(in_bfloat16)[1] == ["test images", "", "40 (--amp)"]
    nat_alone = make("at", 2, {"nat": some}), make("at", 1, {"pgd20": some})
    assert rows(two[0], *nat_alone)[2] == ["at", "2", "50.00 ± 0.00", "50.00 (1 of the seeds)"]
    stopped = make("at", 3, {"nat": some}, more={"epoch": 60})
    names = [row[0] for row in rows(two[0], stopped)[2:]]
    assert {"at, epoch 120", "at, epoch 60"} <= {*names}
    points = torch.zeros(1, 100)
    for differing, shown in (9, False), (10, True):
        points[0, :differing] = 100
        assert ("[" in table.cell(points, "+")) == shown

    another = make("at", 1, {"nat": some}, weights="others")
    damaged = tmp_path / "damaged.npz"
    np.savez(damaged, settings=np.array("[]"))
    for file, message in (another, "two networks are at, seed 1"), (damaged, "or is damaged"):
        refused(message, table.main, [*map(str, two), str(file)])


def test_the_papers_rows():
    training = {"method": "clirat", "arch": "resnet18", "gamma": 10, "beta": -0.5}
    settings = {"dataset": "CIFAR-10", "eps": 8 / 255}
    row = table.paper
    assert row(settings, training, ["aa", "fgsm"]) == ["45.50 ± 0.90", ""]
    for arch in "wrn-32-10", "wrn-34-10":  # the same network, counted differently
        assert row(settings, training | {"arch": arch}, ["aa"]) == ["50.04 ± 0.10"]
    for other in {"dataset": "toy"}, {"eps": 4 / 255}:
        assert row(settings | other, training, ["aa"]) == []
    assert row(settings, training | {"arch": "wrn-10-1"}, ["aa"]) == []


WORDS = "--methods clirat at fat mail-at --epochs 3 --arch wrn-10-1 --n 6 --n-long 4 --n-aa 2"


def test_study(data, tmp_path, monkeypatch, capsys, refused):
    commands, programs = [], {"clirat.py": clirat.main, "eval_attacks.py": eval_attacks.main}
    lost = set()

    def here(command, until):  # in this process
        commands.append(" ".join(command).replace(str(tmp_path), "D"))
        if any(word in commands[-1] for word in lost):
            return None
        assert not programs[command[0]](command[1:])
        return 0

    monkeypatch.setattr(study, "run", here)
    monkeypatch.setattr(study, "foretell", lambda *_: None)
    options = ["--", "--batch-size", "20", "--steps", "2", "--eval-size", "9", "--burn-in", "1"]
    words = [*WORDS.split(), "--data", str(data), "--out", str(tmp_path), *options]
    lost |= {"--method mail-at", "--attacks aa"}
    assert study.main(words) == 1
    said = capsys.readouterr().out
    attacks = "NAT, PGD20, CW 4 x 6; AA 4 x 2; PGD100, APGD 4 x 4"
    assert (
        f"to come: 4 x training, 10 epochs; test images in float32: {attacks}\n" in said
    )  # 3 2 2 3
    assert f"missing in {tmp_path}/mail-at-wrn-10-1-s1: training (epoch 0 of 3)" in said
    assert f"missing in {tmp_path}/clirat-wrn-10-1-s1: AA on 2" in said
    kinds = [re.sub(" --(arch|data).*", "", command) for command in commands]
    kinds = [kind.split("--attacks ")[-1] for kind in kinds]
    methods = [f"clirat.py --method {m}" for m in ("at", "mail-at", "clirat", "fat")]
    assert kinds == [*methods, "nat pgd20 cw", "aa", "pgd100 apgd"]
    forks = [command.endswith("--init D/at-wrn-10-1-s1/burnin.pt") for command in commands[:4]]
    assert forks == [False, True, True, False]
    assert not any("--amp" in command for command in commands)

    folder = tmp_path / "at-wrn-10-1-s1"
    verdicts, settings = eval_attacks.read_verdicts(next(folder.glob("last.pt.*.npz")))
    wrong = {name: 1 - verdict for name, verdict in verdicts.items()}  # others' beside last.pt
    eval_attacks.keep(folder / "last.pt.0.npz", settings | {"weights": "others"}, wrong)
    eval_attacks.keep(folder / "last.pt.1.npz", settings | {"eps": 0.5}, wrong)
    lost.clear()
    commands.clear()
    assert study.main(words) == 0
    said = capsys.readouterr().out
    attacks = "AA 4 x 2; NAT, PGD20, CW 1 x 6; PGD100, APGD 1 x 4"
    assert f"to come: 1 x training, 2 epochs; test images in float32: {attacks}\n" in said
    rows = [row for row in said.splitlines() if row.startswith("| ")]
    assert len(commands) == 4  # mail-at, its evaluation, and AutoAttack
    assert "D/at" not in commands[1].replace("D/at-wrn-10-1-s1/burnin.pt", "")
    names = ["at", "mail-at", "clirat", "fat"]
    names += ["mail-at - at", "clirat - at", "clirat - mail-at", "fat - at"]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[-8:]] == names
    commands.clear()
    assert study.main(words) == 0
    assert not commands
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "to come: 0 x training, 0 epochs; test images in float32: none"
    assert [row for row in said if row in rows[-8:]] == rows[-8:]
    assert "| % | seeds | NAT | PGD20 | PGD100 | CW | APGD | AA |" in said
    moved = tmp_path / "moved"  # a run knows its own start
    shutil.copytree(tmp_path, moved, ignore=lambda folder, names: {"moved"} & {*names})
    (moved / "clirat-wrn-10-1-s1" / "log.csv").unlink()
    assert study.main([word.replace(str(tmp_path), str(moved)) for word in words]) == 0
    assert commands[0].endswith("--resume")
    capsys.readouterr()
    two_seeds = WORDS.replace("clirat at fat mail-at", "at --seeds 1 2 1").split()
    assert study.main([*two_seeds, *words[len(WORDS.split()) :]]) == 0
    row = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| at |")][-1]
    assert row.startswith("| at | 2 | ")
    new = [word.replace(str(tmp_path), str(tmp_path / "new")) for word in words]
    for command, option, message in (
        (words, "--lr 0.5", "was started with lr 0.1, not 0.5"),
        (new, "--seed 2", "leave --seed out"),
        (new, "--meth at", "leave --method out"),
        (words, "--init elsewhere.pt", "leave --init out"),
    ):
        refused(message, study.main, [*command, *option.split()])
    own, given = [*words[: words.index("--")], "--methods", "clirat", "gairat"], tmp_path / "d.npz"
    refused("batch_size, burn_in, steps: runs in", study.main, own)
    arrays = dict(np.load(data))
    np.savez(given, **arrays | {"x_train": arrays["x_train"] // 2})
    elsewhere = [str(given) if word == str(data) else word for word in words]
    refused("at-wrn-10-1-s1 was started with other data", study.main, elsewhere)
    (folder / "args.json").write_text("[]")
    refused("holds no run to resume", study.main, words)


def test_what_a_study_starts(data, tmp_path, monkeypatch, capsys):
    words = ["--methods", "at", "clirat", "--seeds", "1", "2", "--seconds", "1000"]
    words += ["--data", str(data), "--out", str(tmp_path)]
    status, started = [0], []
    run = lambda command, until: started.append((command, until)) or status[0]  # noqa: E731
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "foretell", lambda *_: None)
    args = study.parse_args(words)
    assert (args.n, args.n_aa, args.n_long) == (30, 30, 30)  # all there are
    assert study.study(args, 0) == 1  # nothing came of it
    named = [[c[c.index(name) + 1] for name in ("--method", "--seed")] for c, _ in started]
    assert named == [["at", "1"], ["at", "2"]]  # clirat's start is not there
    assert [until for _, until in started] == [pytest.approx(850)] * 2
    status[0] = 2  # a program's own words say why
    assert study.study(args, 0) == 2
    assert len(started) == 3

    monkeypatch.setattr(study, "trained", lambda args, folder: True)
    monkeypatch.setattr(models, "load", lambda path: (small_network(5), {}))
    assert study.study(args, 0) == 2
    assert len(started) == 4
    status[0] = 0
    elsewhere, files = ["--device", "cuda:7"], {study.verdict_file(args, tmp_path, 5)}
    for options, amps in (["--eps", "1/30"], [False] * 3), (["--amp", *elsewhere], [True] * 3):
        started.clear()
        args = study.parse_args([*words, "--", *options])
        capsys.readouterr()
        study.study(args, 0)
        assert f"test images in {'bfloat16' if amps[0] else 'float32'}: " in capsys.readouterr().out
        assert [until for _, until in started] == [1000] * 6
        assert ["--amp" in command for command, _ in started] == amps * 2
        files.add(study.verdict_file(args, tmp_path, 5))
        assert all((" ".join(elsewhere) in " ".join(c)) == amps[0] for c, _ in started)
        given = [c[c.index("--eps") + 1] for c, _ in started if "--eps" in c]
        assert [*map(float, given)] == ([1 / 30] * 6 if "--eps" in options else [])
    assert len(files) == 3  # eps and precision are part of their names

    for burn_in in "0", "120":  # none that could be shared
        args = study.parse_args([*words, "--", "--burn-in", burn_in])
        command = study.training(args, "clirat", args.runs[1], args.options)
        assert "--init" not in command

    args = study.parse_args(words)
    folder = args.runs[1]["at"]  # 80 epochs without burnin.pt: it will not come any more
    folder.mkdir()
    for rows, there, forks in (70, False, True), (80, False, False), (80, True, True):
        (folder / "log.csv").write_text("epoch\n" + "1\n" * rows)
        (folder / "burnin.pt").touch() if there else None
        command = study.training(args, "clirat", args.runs[1], [])
        assert ("--init" in command) == forks


def test_time_of_a_study(data, tmp_path, monkeypatch, capsys):
    """By hand, from the first epoch that is logged."""
    rows = ["1,9,1", "2,9,1", "3,99,1", "4,20,4"]  # the third compiles
    epochs = iter([3, 4])
    monkeypatch.setattr(time, "sleep", lambda seconds: log(*rows[: next(epochs)]))
    folder = tmp_path / "at-wrn-10-1-s1"
    folder.mkdir()

    def log(*rows):
        (folder / "log.csv").write_text("\n".join(["epoch,seconds,images_per_s", *rows, ""]))

    log(*rows[:2])
    words = f"--methods at clirat --epochs 6 --arch wrn-10-1 --data {data} --out {tmp_path} --n 20"
    words += " --n-long 8 --n-aa 2 -- --compile --steps 4 --eval-every 2 --eval-size 5"
    args = study.parse_args(words.split())
    before = {*threading.enumerate()}
    study.announce(args)
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
    # 4 + 2 epochs of 20 s; 4 images/s at 5 passes an image make 20 passes/s
    passes = 2 * (20 * (1 + 20 + 20) + 2 * 1000 + 8 * (100 + 100)) + 21 * (3 * 5 + 2 * 30)
    times = [datetime.timedelta(seconds=round(s)) for s in (120 + passes / 20, 120, passes / 20)]
    expected = "to come: about {}, {} of it training, {} evaluation\n".format(*times)
    assert capsys.readouterr().out.endswith(expected)


def test_help_of_study(capsys):
    with pytest.raises(SystemExit):
        study.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("(default: ") == said.count(" --") - 1  # but --help's own


def test_study_bounds_its_parts(tmp_path, monkeypatch, capfd):
    (tmp_path / "waits.py").write_text("import time\nprint('on', flush=True)\ntime.sleep(60)")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    assert study.run(["waits.py"], time.monotonic() + 14) is None  # not started
    monkeypatch.setattr(study, "SHORTEST", 1)
    assert study.run(["fails.py"], math.inf) == 3
    begun = time.monotonic()
    assert study.run(["waits.py"], begun + 3) is None
    assert 3 < time.monotonic() - begun < 30
    said = capfd.readouterr().out
    assert said.count("on\n") == said.count("time is up") == 1


RUNS = ROOT / ".paper" / "runs"


def kept(folder):
    """[(verdicts, settings)] of the files of a run's last.pt."""
    return [eval_attacks.read_verdicts(path) for path in folder.glob("last.pt.*.npz")]


def test_kept_runs(straight):
    columns = (straight / "log.csv").read_text().splitlines()[0]
    folders = [*RUNS.iterdir()]
    for folder in folders:
        settings, log = json.loads((folder / "args.json").read_text()), folder / "log.csv"
        assert log.read_text().splitlines()[0] == columns
        assert len(study.logged(folder)) == settings["epochs"]
        for name, value in settings.items():
            assert all(s["training"][name] == value for _, s in kept(folder)), (folder, name)
    networks = [folder / "last.pt" for folder in folders if (folder / "last.pt").exists()]
    assert len(networks) >= 3
    for path in networks:
        weights = clirat.digest(*models.load(path)[0].state_dict().values())
        assert {s["weights"] for _, s in kept(path.parent)} == {weights}


# the study's first test images; whoever has them elsewhere says so
CIFAR10 = Path(os.environ.get("CIFAR10", ROOT / "../shared/data/cifar10_subset.npz"))


@pytest.mark.skipif(not CIFAR10.exists(), reason="CIFAR-10 is not there")
def test_kept_network_under_attack():
    """Attacked once more, it gives the verdicts that are kept beside it."""
    folder = RUNS / "clirat-wrn-10-1-s1"
    net, _ = models.load(folder / "last.pt")
    x, y = (t[:64] for t in clirat.load_data(str(CIFAR10), ["test"]))
    found = eval_attacks.evaluate(net, x, y, ["nat", "pgd20", "cw"], eps=8 / 255)
    files = [v for v, s in kept(folder) if s["data"] == "52b4e2a339967078"]  # the study's own
    for name, verdict in [item for verdicts in files for item in verdicts.items()]:
        assert verdict[:64].tolist() == found.get(name, verdict)[:64].tolist()
    assert len(files) == 3
