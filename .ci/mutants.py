"""Change the mathematics in forty places, one at a time: each must fail a test.

    python .ci/mutants.py           some ten minutes on one core
    python .ci/mutants.py kl_div    only the edits with this text

Exit status 1 where a change is not noticed, or its text is no longer in the code exactly once.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = "test_clpm.py", ".ci/test_algorithm_1.py", ".ci/test_attacks.py", ".ci/test_models.py"

EDITS = """
clirat.py
gaps.clamp(max=0).sum(1), margin)  ->  gaps.clamp(max=0).mean(1), margin)
probs.scatter(1, y, -torch.inf).amax(1)  ->  probs.scatter(1, y, 0).amax(1)
(gamma * (beta - margins)).detach()  ->  (gamma * (margins - beta)).detach()
(gamma * (beta - margins)).detach()  ->  (gamma * (beta - margins))
return len(margins) * F.logsigmoid  ->  return F.logsigmoid
F.logsigmoid(scores).softmax(0)  ->  scores.softmax(0)
return 3 * scores.sigmoid()  ->  return scores.sigmoid()
F.kl_div(log_q, log_p,  ->  F.kl_div(log_p, log_q,
weighted_mean(kl(logits_nat, logits_adv), weights)  ->  kl(logits_nat, logits_adv).mean()
return at_loss(logits_nat, labels) +  ->  return at_loss(logits_adv, labels) +
weighted_mean(-torch.log(1.0001 - runner_up), weights)  ->  -torch.log(1.0001 - runner_up).mean()
(divergence * (1 - p_y)).mean()  ->  divergence.mean()
p_y = logits_nat.softmax(1)  ->  p_y = logits_adv.softmax(1)
Method("at", "lps", 20.0, 0.4)  ->  Method("at", "lps", 20.0, 0.6)
alpha=step_size).clamp_(lower, upper)  ->  alpha=step_size).clamp_(0, 1)
direction = grad.sign()  ->  direction = grad
kl(logits_nat, logits).sum()  ->  kl(logits, logits_nat).sum()
objective = -pm(logits, y).sum()  ->  objective = pm(logits, y).sum()
wrong = t + 1 - kappa  ->  wrong = t - kappa
for e in (50, 90))  ->  for e in (51, 90))
x.flip(3), x)  ->  x.flip(2), x)
METHODS[args.method], epoch > args.burn_in  ->  METHODS[args.method], epoch >= args.burn_in
(probs > probs.gather  ->  (probs >= probs.gather
num_cl != 1 if args.exclude  ->  num_cl == 0 if args.exclude
epoch > milestone for milestone  ->  epoch >= milestone for milestone
logits_adv = model(x_adv)  ->  logits_adv = model(x)

eval_attacks.py
z[:, 0] - z[:, 2] + 1e-12  ->  z[:, 0] - z[:, 1] + 1e-12
(z[:, 2] + z[:, 3]) / 2  ->  z[:, 2]
max(int(0.22 * steps), 1)  ->  max(int(0.25 * steps), 1)
rises <= 0.75 * checks  ->  rises <= 0.85 * checks
a = 0.75 if i else 1.0  ->  a = 0.75
now = torch.where(widen(stuck), best, now)  ->  now = now + 0
torch.where(w > 0, t, 1 - t)  ->  torch.where(w > 0, 1 - t, t)
alpha = (a1 / (a1 + a2)).clamp(max=0.1)  ->  alpha = (a1 / (a1 + a2)).clamp(max=0.2)
clean + 0.9 * (now - clean)  ->  clean + 0.95 * (now - clean)
+ 2 * eps * signs[query]  ->  + eps * signs[query]
for after in (10, 50, 200,  ->  for after in (10, 100, 200,
(tried < margin) | wrong  ->  (tried <= margin) | wrong
min(9, logits.shape[1] - 1)  ->  min(5, logits.shape[1] - 1)

models.py
shift = bn.bias - bn.running_mean * scale  ->  shift = bn.bias - bn.running_mean
"""


def noticed_by(file, old, new):
    """The test that fails where `new` is in place of `old`, or in capitals what is wrong."""
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        return "NOT ONCE IN THE CODE"
    with tempfile.TemporaryDirectory() as folder:
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        shutil.copytree(ROOT / ".ci", Path(folder, ".ci"))
        Path(folder, file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else "NO TEST"


def main(text=""):
    results, file = [], None
    for line in EDITS.splitlines():
        if "  ->  " not in line:
            file = line or file
        elif text in line:
            results.append(noticed_by(file, *line.split("  ->  ")))
            print(f"{line}: {results[-1]}", flush=True)
    missed = sum(result.isupper() for result in results)
    print(f"{len(results) - missed} of {len(results)} edits are noticed")
    return int(missed > 0 or not results)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
