"""What the README and the pages of the folders say, held against code and files."""

import argparse
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import clirat
import eval_attacks
import models
from conftest import ROOT, small_network

sys.path.insert(0, str(ROOT / ".paper"))
import study

FOLDERS = ROOT, ROOT / ".paper", ROOT / ".ci"
PAGES = {path: path.read_text(encoding="utf-8") for path in (f / "README.md" for f in FOLDERS)}
README = PAGES[ROOT / "README.md"]


def commands_of(program):
    """The words after python PROGRAM on the pages, for each time that it is called there."""
    text = "\n".join(PAGES.values()).replace("\\\n", "")
    commands = re.findall(rf"python {re.escape(program)} ([^`;\n]*)", text)
    for variable, value in zip("mesgb", ("at", "multi", "1", "7", "-0.2"), strict=True):
        commands = [command.replace(f"${variable}", value) for command in commands]
    return [shlex.split(command.replace("[CKPT ...]", "")) for command in commands]


def python_blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)


def test_what_people_copy():
    """The functions are those of clirat.py, and below them are the losses of AT and of TRADES."""
    functions, losses, _ = python_blocks(README)
    sources = [inspect.getsource(function) for function in (clirat.cl_pm, clirat.instance_weights)]
    plain = [re.sub(r'    """.*?"""\n', "", source, flags=re.S) for source in sources]
    assert functions == "\n\n".join(["import torch\nimport torch.nn.functional as F\n", *plain])
    torch.manual_seed(0)
    x, x_adv, y = *(3 * torch.randn(2, 64, 10)), torch.arange(64) % 10
    copied = {"model": torch.nn.Identity(), "x": x, "x_adv": x_adv, "y": y}
    exec(functions, copied)
    at, trades = losses.split("\n\n")

    before = at.partition(" becomes")[0].removeprefix("# AT: ")
    margins = clirat.cl_pm(x_adv.softmax(1), y)
    for code, name in (before, "at"), (at, "clirat"), (trades, "clir-trades"):
        exec(code, copied)
        method = clirat.METHODS[name]
        weights = method.margin and clirat.instance_weights(margins, method.gamma, method.beta)
        expected = clirat.LOSSES[method.loss](x, x_adv, y, method.trade_off, weights)
        torch.testing.assert_close(copied["loss"], expected)


def test_evaluation_from_python(monkeypatch, capsys):
    """The snippet as it stands, with fewer and smaller images and a small network."""
    data = clirat.toy_data(size=8)
    monkeypatch.setattr(clirat, "toy_data", lambda: data)
    monkeypatch.setattr(models, "load", lambda path: (small_network().eval(), {}))
    names = {}
    exec(python_blocks(README)[2].replace(":20]", ":3]"), names)
    assert {*names["verdicts"]} == {"nat", "pgd20", "cw", *eval_attacks.STAGES}
    assert "accuracy" in capsys.readouterr().out
    assert (names["x_adv"] - names["x"][:3] / 255).abs().max() <= 8 / 255 + 1e-6


def test_figures_by_hand():
    """Weights, the epochs of Table 1, and what MAIL's code calls otherwise."""
    assert "(margin -0.9) among 127 right (0.9) gets 127.99" in README
    margins = torch.tensor([-0.9] + [0.9] * 127)
    assert f"{clirat.instance_weights(margins, 10.0, -0.5)[0].item():.2f}" == "127.99"
    of_logits = clirat.instance_weights(torch.tensor([-2.0, -9.0, 5.0]), 10.0, -0.5)
    torch.testing.assert_close(of_logits[0], of_logits[1])
    three_losses_and_seeds = 9 * (75 + 3 * 45)
    assert f"leaves {three_losses_and_seeds:,} epochs" in PAGES[ROOT / ".paper" / "README.md"]

    logits, y = torch.randn(50, 4, dtype=torch.float64), torch.arange(50) % 4
    bias, slope, names = -0.5, 10.0, {**vars(clirat), "clirat": clirat}
    names |= {"logits": logits, "y": y, "slope": slope, "bias": bias}
    weights = re.search(r"becomes `(instance_weights\(cl_pm.*?\))`", README)[1]
    margin = re.search(r"`PM\(logits, y\)` is `(.*?)`", README)[1]
    probs = logits.softmax(1)
    others = probs.masked_fill(F.one_hot(y, 4).bool(), 0).amax(1)
    theirs = others - probs[torch.arange(50), y]  # MAIL's PM
    torch.testing.assert_close(eval(margin, names), theirs)
    like_theirs = weights.replace("cl_pm", "pm").replace("bias)", 'bias, "mail")')
    expected = 3 * ((theirs + bias) * slope).sigmoid()
    torch.testing.assert_close(eval(like_theirs, names), expected)
    assert eval(weights, names).mean().item() == pytest.approx(1)


def test_tables():
    """Each table that follows a command is what the command prints."""
    pattern = r"^    python (\.paper/table\.py \.paper/runs/.+)\n\n((?:\|.*\n)+)"
    found = [match for text in PAGES.values() for match in re.findall(pattern, text, re.M)]
    for command, shown in found:
        words = [word for part in command.split() for word in sorted(map(str, ROOT.glob(part)))]
        output = subprocess.check_output([sys.executable, *words], text=True, encoding="utf-8")
        assert shown.replace("**", "") in output
    assert len(found) > 1


def test_pictures(tmp_path):
    """Each picture has a command on a page that draws it."""
    pytest.importorskip("matplotlib")
    drawn = set()
    for program in "curves.py", "fig2.py":
        for words in commands_of(f".paper/{program}"):
            if ".paper/" in words[-1]:
                words = [f".paper/{program}", *words[:-1], tmp_path / Path(words[-1]).name]
                line = " ".join(map(str, [sys.executable, *words]))
                subprocess.run(["bash", "-c", line], check=True, cwd=ROOT)
                drawn.add(words[-1].name)
    kept = {path.name for path in (ROOT / ".paper").glob("*.[ps][nv]g")}
    assert drawn == kept == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("program", [clirat, eval_attacks])
def test_commands(program):
    """Their flags and choices exist."""
    commands = commands_of(Path(program.__file__).name)
    assert len(commands) > 2
    for words in commands:
        program.parse_args(words)


def test_commands_of_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clirat, "load_data", lambda *_: [torch.zeros(10)] * 4)
    commands = commands_of(".paper/study.py")
    assert len(commands) > 2
    for words in commands:
        study.parse_args(words)


@pytest.mark.parametrize("name", ["peer", "released", "speed"])
def test_commands_of_comparisons(name, monkeypatch):
    """Their flags exist; nothing of them is run."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, words):
        raise InterruptedError(parse_args(parser, words))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    commands = commands_of(f".ci/{name}.py")
    assert commands
    for words in commands:
        with pytest.raises(InterruptedError):
            importlib.import_module(name).main(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_links(page):
    def anchors(path):
        headings = re.findall(r"^#+ (.*)$", PAGES[path], re.M)
        found = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        return found | set(re.findall(r'<a id="(.*?)">', PAGES[path]))

    targets = re.findall(r'(?:\]\(|src=")(?!https?:)(.*?)[)"]', PAGES[page])
    for target in targets:
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        path = path / "README.md" if path.is_dir() else path
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
    assert len(targets) > 1
