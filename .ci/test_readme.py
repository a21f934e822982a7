"""What the README says, held against the code and the files that it speaks of."""

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
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_people_copy():
    """The functions are those of clirat.py, and the loop below them has `at_loss`'s loss."""
    functions, before, after = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)[:3]
    sources = [inspect.getsource(function) for function in (clirat.cl_pm, clirat.instance_weights)]
    plain = [re.sub(r'    """.*?"""\n', "", source, flags=re.S) for source in sources]
    assert functions == "\n\n".join(["import torch\nimport torch.nn.functional as F\n", *plain])
    torch.manual_seed(0)
    x_adv, y = 3 * torch.randn(64, 10), torch.arange(64) % 10
    copied = {"model": torch.nn.Identity(), "x_adv": x_adv, "y": y}
    exec(functions, copied)
    exec(before, copied)
    torch.testing.assert_close(copied["loss"], clirat.at_loss(x_adv, y))
    exec(after, copied)
    weights = clirat.instance_weights(clirat.cl_pm(x_adv.softmax(1), y), 10.0, -0.5)
    torch.testing.assert_close(copied["loss"], clirat.at_loss(x_adv, y, weights))


def test_figures_by_hand():
    """The largest of 128 weights, and what MAIL's code calls otherwise."""
    assert "(margin -0.9) among 127 right (0.9) gets 127.99" in README
    margins = torch.tensor([-0.9] + [0.9] * 127)
    assert f"{clirat.instance_weights(margins, 10.0, -0.5)[0].item():.2f}" == "127.99"

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
    commands = re.findall(r"^    python (\.paper/table\.py \.paper/runs/\S+)$", README, re.M)
    for command in commands:
        words = [word for part in command.split() for word in sorted(map(str, ROOT.glob(part)))]
        output = subprocess.check_output([sys.executable, *words], text=True, encoding="utf-8")
        assert output in README.replace("**", "")
    assert len(commands) == 2


@pytest.mark.parametrize("program", [clirat, eval_attacks])
def test_commands(program):
    """Their flags and choices exist."""
    name = Path(program.__file__).name
    commands = re.findall(rf"python {re.escape(name)} ([^`;\n]*)", README)
    assert len(commands) > 2
    for command in commands:
        for variable, value in zip("mesgb", ("at", "multi", "1", "7", "-0.2"), strict=True):
            command = command.replace(f"${variable}", value)
        program.parse_args(shlex.split(command.replace("[CKPT ...]", "")))


def test_links():
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    anchors |= set(re.findall(r'<a id="(.*?)">', README))
    targets = re.findall(r'(?:\]\(|src=")(?!https?:)(.*?)[)"]', README)
    assert len(targets) > 5
    for target in targets:
        assert target[1:] in anchors if target[0] == "#" else (ROOT / target).exists(), target
