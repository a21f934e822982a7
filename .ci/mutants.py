"""Apply small wrong edits one at a time to a copy of the code; each must fail a test.

    python .ci/mutants.py                    about an hour on one core
    python .ci/mutants.py "sign of gamma"    only those named, by full name
    python .ci/mutants.py --list             their names; which ones no longer fit the code

First the whole suite runs on the code as it is: it must pass. Then, for each edit, the tests that
should notice it, and where they pass the whole suite. One line an edit says which test failed and
why, or SURVIVED. Exit status 1 if one survived, if its text is no longer in the code exactly once
(STALE), or if pytest itself ended early (BROKEN). Too slow to be part of .ci/run: run it
before larger changes, and after changes to the tests.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT = 600  # seconds of one pytest run; an edit that makes it hang is noticed, too
TESTS = "test_clpm.py", ".ci/test_attacks.py", ".ci/test_programs.py", ".ci/test_study.py"

# name | file | pytest -k expression of the tests that should notice
# -text to find, exactly once in the file
# +text to put there
MUTANTS = r"""
CL-PM is the mean over the confused labels | clirat.py | margins
-gaps.clamp(max=0).sum(1), margin)
+gaps.clamp(max=0).sum(1) / (gaps < 0).sum(1), margin)

CL-PM with K fixed at 10 | clirat.py | margins
-gaps.clamp(max=0).sum(1), margin)
+gaps[:, :10].clamp(max=0).sum(1), margin)

CL-PM of correct examples is p_y | clirat.py | margins
-gaps.clamp(max=0).sum(1), margin)
+gaps.clamp(max=0).sum(1), probs.gather(1, y)[:, 0])

PM against the mean of the others | clirat.py | margins
-return p_y - probs.scatter(1, y, -torch.inf).amax(1)
+return p_y - probs.scatter(1, y, 0).sum(1) / (probs.shape[1] - 1)

sign of gamma | clirat.py | test_weights
-* (beta - margins.detach())
+* (margins.detach() - beta)

sign of beta | clirat.py | test_weights
-* (beta - margins.detach())
+* (-beta - margins.detach())

weights carry a gradient | clirat.py | test_weights
-* (beta - margins.detach())
+* (beta - margins)

weights sum to 1 | clirat.py | test_weights
-return len(margins) * F.logsigmoid
+return F.logsigmoid

weights of a plain softmax | clirat.py | test_weights
-F.logsigmoid(scores).softmax(0)
+scores.softmax(0)

weight_norm mail not times 3 | clirat.py | algorithm_1 and mail-at
-return 3 * scores.sigmoid()
+return scores.sigmoid()

CLIRAT's beta positive | clirat.py | schedule
-"clirat": Method("at", "cl-pm", 10.0, -0.5)
+"clirat": Method("at", "cl-pm", 10.0, 0.5)

MAIL-AT's gamma | clirat.py | schedule
-"mail-at": Method("at", "pm", 10.0, -0.5)
+"mail-at": Method("at", "pm", 2.0, -0.5)

GAIRAT's lambda | clirat.py | algorithm_1 and gairat
-Method("at", "lps", 20.0, 0.4)
+Method("at", "lps", 20.0, 0.6)

kl's arguments swapped | clirat.py | algorithm_1 and trades
-F.kl_div(log_q, log_p,
+F.kl_div(log_p, log_q,

TRADES: weights dropped | clirat.py | losses
-robust = weighted_mean(kl(logits_nat, logits_adv), weights)
+robust = weighted_mean(kl(logits_nat, logits_adv), None)

TRADES: weights on the natural term too | clirat.py | losses
-return at_loss(logits_nat, labels) + trade_off
+return at_loss(logits_nat, labels, weights) + trade_off

TRADES: natural term on x_adv | clirat.py | losses
-return at_loss(logits_nat, labels) + trade_off
+return at_loss(logits_adv, labels) + trade_off

MART: weights dropped from the cross-entropy | clirat.py | losses
-cross_entropy = at_loss(logits_adv, labels, weights)
+cross_entropy = at_loss(logits_adv, labels)

MART: weights dropped from the margin term | clirat.py | losses
-weighted_mean(-torch.log(1.0001 - runner_up), weights)
+weighted_mean(-torch.log(1.0001 - runner_up), None)

MART: 1 - p_y dropped | clirat.py | losses
-(divergence * (1 - p_y)).mean()
+divergence.mean()

MART: 1 - p_y from x_adv | clirat.py | losses
-p_y = logits_nat.softmax(1)
+p_y = logits_adv.softmax(1)

MART: 1.0001 moved | clirat.py | losses
-torch.log(1.0001 - runner_up)
+torch.log((1 - runner_up).clamp(min=1e-4))

PGD without projection to the ball | clirat.py | pgd
-lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
+lower, upper = torch.zeros_like(x), torch.ones_like(x)

PGD without clamp to [0, 1] | clirat.py | pgd
-lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
+lower, upper = x - eps, x + eps

PGD in train mode | clirat.py | pgd
-    getattr(model, "eval", list)()
+    getattr(model, "train", list)()

PGD leaves the model in eval mode | clirat.py | pgd
-            module.training = mode
+            module.training = False

PGD descends | clirat.py | pgd
-alpha=step_size
+alpha=-step_size

PGD follows the gradient, not its sign | clirat.py | pgd
-direction = grad.sign()
+direction = grad / grad.abs().amax()

PGD's kl swapped | clirat.py | algorithm_1 and trades
-objective = kl(logits_nat, logits).sum()
+objective = kl(logits, logits_nat).sum()

PGD's start outside the ball | clirat.py | inside_the_ball
-(init.detach() if given else pgd_start(x, init, eps)).clamp(lower, upper)
+(init.detach() if given else pgd_start(x, init, eps)).clamp(0, 1)

kappa counted from after the step | clirat.py | pgd_by_hand
-            kappa += logits.argmax(1) == y
-            direction = grad.sign()
-            if tau is not None:
-                direction = direction * (t + 1 - kappa <= tau)[:, None, None, None]
-            x_adv = x_adv.detach().add(direction, alpha=step_size).clamp_(lower, upper)
+            direction = grad.sign()
+            if tau is not None:
+                direction = direction * (t + 1 - kappa <= tau)[:, None, None, None]
+            x_adv = x_adv.detach().add(direction, alpha=step_size).clamp_(lower, upper)
+            kappa += model(x_adv).argmax(1) == y

FAT stops one iterate early | clirat.py | pgd_by_hand
-(t + 1 - kappa <= tau)
+(t + 1 - kappa < tau)

FAT's tau an epoch early | clirat.py | algorithm_1 and fat
-epoch > round(args.epochs * e / 120)
+epoch >= round(args.epochs * e / 120)

FAT's tau never grows | clirat.py | algorithm_1 and fat
-for e in (50, 90))
+for e in ())

a CUDA graph replayed on its first inputs | models.py | graphs or replay
-            ours.copy_(theirs)
+            pass

outputs of a CUDA graph not copied | models.py | replay
-return tuple(t.clone() for t in outputs)
+return outputs

augment without crop | clirat.py | augment
-:, top, left]
+:, 0 * top + 4, 0 * left + 4]

augment without flip | clirat.py | augment
-device=x.device) < 0.5, x.flip(3), x)
+device=x.device) < 0.0, x.flip(3), x)

augment flips upside down | clirat.py | augment
-x.flip(3)
+x.flip(2)

augment: one flip for the whole batch | clirat.py | augment or algorithm_1
-torch.rand(n, 1, 1, 1, device=x.device) < 0.5
+torch.rand(n, 1, 1, 1, device=x.device)[:1] < 0.5

random permutation dropped | clirat.py | algorithm_1 and clirat
-order = torch.randperm(n, device=device)
+order = torch.randperm(n, device=device).sort().values

the same order in every epoch | clirat.py | algorithm_1 and clirat
-torch.manual_seed(args.seed * 10_007 + epoch)
+torch.manual_seed(args.seed * 10_007)

the last, smaller batch left out | clirat.py | algorithm_1 and clirat
-if len(batch) > world]
+if len(batch) == args.batch_size]

training in eval mode | clirat.py | algorithm_1 and clirat
-    model.train()
+    model.eval()

start at x itself, noise dropped | clirat.py | algorithm_1 and clirat
-x_adv, kappa = attack(x, y, pgd_start(x, "normal", args.eps), tau)
+x_adv, kappa = attack(x, y, pgd_start(x, "none", args.eps), tau)

normal noise of another size | clirat.py | algorithm_1 and clirat
-return x + 0.001 * torch.randn
+return x + 0.002 * torch.randn

the training loss on x instead of x_adv | clirat.py | algorithm_1 and clirat
-logits_adv = model(x_adv).to(x.dtype)
+logits_adv = model(x).to(x.dtype)

the natural logits from x_adv | clirat.py | algorithm_1 and trades
-else model(x).to(x.dtype)
+else model(x_adv).to(x.dtype)

weights from logits instead of probabilities | clirat.py | algorithm_1 and clirat
-probs = logits_adv.detach().softmax(1)
+probs = logits_adv.detach()

confused labels counted with the label | clirat.py | algorithm_1 and clirat
-(probs > probs.gather(1, y[:, None])).sum(1)
+(probs >= probs.gather(1, y[:, None])).sum(1)

confused labels counted with ties | clirat.py | tie
-(probs > probs.gather(1, y[:, None])).sum(1)
+(probs >= probs.gather(1, y[:, None])).sum(1) - 1

>= for > in the burn-in | clirat.py | algorithm_1 and clirat
-if epoch > args.burn_in and method.margin
+if epoch >= args.burn_in and method.margin

>= for > in the burn-in of --exclude | clirat.py | algorithm_1 and exclude
-if epoch > args.burn_in and args.exclude
+if epoch >= args.burn_in and args.exclude

CLIRAT weighted by PM | clirat.py | algorithm_1 and clirat
-margins = cl_pm(probs, y)  # (n,)
+margins = pm(probs, y)  # (n,)

MAIL weighted by CL-PM | clirat.py | algorithm_1 and mail
-                margins = pm(probs, y)
+                margins = cl_pm(probs, y)

GAIRAT for 10 steps only | clirat.py | algorithm_1 and gairat
-margins = kappa / args.steps
+margins = kappa / 10

--weight-norm ignored | clirat.py | algorithm_1 and norm
-args.gamma, args.beta, args.weight_norm)
+args.gamma, args.beta)

each process normalises its own weights | clirat.py | two_processes
-margins = gather(margins)  # of the whole batch
+margins = margins.repeat(world)

weights of another process | clirat.py | two_processes
-weights = weights.view(world, -1)[rank]
+weights = weights.view(world, -1)[rank - 1]

all processes take the same images | clirat.py | two_processes
-return [batch[rank::world] for batch
+return [batch[::world] for batch

exclude single and multi swapped | clirat.py | algorithm_1 and exclude
-num_cl == 1 if args.exclude == "single"
+num_cl == 1 if args.exclude == "multi"

exclude multi drops the single, too | clirat.py | algorithm_1 and exclude
-else num_cl > 1
+else num_cl > 0

exclude: normalised over the kept only | clirat.py | algorithm_1 and exclude
-gather(weights).mean().clamp(min=1e-30)
+gather(weights[weights > 0]).mean().clamp(min=1e-30)

exclude: not normalised again | clirat.py | algorithm_1 and exclude
-if args.weight_norm == "batch":  # mean 1 again
+if False:  # mean 1 again

weights dropped from the AT loss | clirat.py | algorithm_1 and clirat
-loss = at_loss(logits_adv, y, weights)
+loss = at_loss(logits_adv, y)

weights dropped from the TRADES loss | clirat.py | algorithm_1 and trades
-loss = trades_loss(logits_nat, logits_adv, y, args.trade_off, weights)
+loss = trades_loss(logits_nat, logits_adv, y, args.trade_off)

weights dropped from the MART loss | clirat.py | algorithm_1 and mart
-loss = mart_loss(logits_nat, logits_adv, y, args.trade_off, weights)
+loss = mart_loss(logits_nat, logits_adv, y, args.trade_off)

gradients pile up | clirat.py | algorithm_1 and clirat
-        optimizer.zero_grad()
+        pass

NaN logits count as right | clirat.py | accuracy
-return (logits.argmax(1) != y) | logits.isnan().any(1)
+return logits.argmax(1) != y

accuracy in training: NAT and PGD-20 swapped | clirat.py | accuracy
-for inputs in (images, x_adv)
+for inputs in (x_adv, images)

accuracy in training: PGD-20 starts at x | clirat.py | accuracy
-pgd_start(images, "uniform", args.eps)
+pgd_start(images, "none", args.eps)

accuracy in training: PGD-20's step | clirat.py | eps_of_the_run
-attack_20 = fast_pgd(net, steps=20, step_size=0.003
+attack_20 = fast_pgd(net, steps=20, step_size=0.0003

accuracy in training: PGD-20 without the eps of the run | clirat.py | eps_of_the_run
-attack_20 = fast_pgd(net, steps=20, step_size=0.003, eps=args.eps)
+attack_20 = fast_pgd(net, steps=20, step_size=0.003, eps=8 / 255)

accuracy in training: on the training images | clirat.py | best
-images, labels = x_test[: args.eval_size], y_test[: args.eval_size]
+images, labels = x_train[: args.eval_size], y_train[: args.eval_size]

the shares of the groups swapped in the log | clirat.py | algorithm_1 and clirat
-for k, group in groups.items()}
+for k, group in zip(groups, [*groups.values()][::-1], strict=True)}

the groups' fractions swapped in the log | clirat.py | algorithm_1 and clirat
-"single_cl": num_cl == 1, "multi_cl": num_cl > 1
+"single_cl": num_cl > 1, "multi_cl": num_cl == 1

effective sample size without the square | clirat.py | algorithm_1 and clirat
-(total**2 / weights.square()
+(total / weights.square()

attack on the first weights | clirat.py | algorithm_1 and clirat
-        copy.refresh(net)
+        pass

TRADES' attack with ce | clirat.py | algorithm_1 and trades
-options["loss"] = "kl" if METHODS[args.method].loss == "trades" else "ce"
+options["loss"] = "ce"

MART's attack with kl | clirat.py | algorithm_1 and mart
-options["loss"] = "kl" if METHODS[args.method].loss == "trades" else "ce"
+options["loss"] = "ce" if METHODS[args.method].loss == "at" else "kl"

>= for > in the schedule | clirat.py | algorithm_1 and clirat
-sum(epoch > milestone for milestone
+sum(epoch >= milestone for milestone

learning rate not divided | clirat.py | algorithm_1 and clirat
-args.lr / 10**drops
+args.lr / 1**drops

learning rate dropped for the log alone | clirat.py | algorithm_1 and clirat
-        optimizer.step()  # l.15
+        optimizer.param_groups[0]["lr"], lr = args.lr, optimizer.param_groups[0]["lr"]
+        optimizer.step()  # l.15
+        optimizer.param_groups[0]["lr"] = lr

NaN loss not detected | clirat.py | nonfinite
-bad = ~loss.isfinite()
+bad = loss.isinf()

the wrong batch is named | clirat.py | nonfinite
-* world // args.batch_size + 1
+* world // args.batch_size

weights that are not finite not detected | clirat.py | nonfinite
-    bad[-1] |= not all(t.isfinite().all() for t in model.state_dict().values())
+    pass

best chosen by NAT | clirat.py | best
--1.0 if row["pgd20"] is None else row["pgd20"]
+-1.0 if row["pgd20"] is None else row["nat"]

best is the last that was no better | clirat.py | best
-if score > state["best"]:
+if score <= state["best"] or state["best"] < 0:

best and last swapped | clirat.py | run_resume
-        save_checkpoint(out / "best.pt", checkpoint | {"selected_by": "PGD-20 on test images"})
-    if row["epoch"] == args.burn_in:
-        save_checkpoint(out / "burnin.pt", checkpoint)
-    save_checkpoint(out / "last.pt", checkpoint)
+        save_checkpoint(out / "last.pt", checkpoint | {"selected_by": "PGD-20 on test images"})
+    if row["epoch"] == args.burn_in:
+        save_checkpoint(out / "burnin.pt", checkpoint)
+    save_checkpoint(out / "best.pt", checkpoint)

burnin.pt at another epoch | clirat.py | run_resume
-if row["epoch"] == args.burn_in:
+if row["epoch"] == args.burn_in + 1:

resume ignores the log | clirat.py | run_resume
-state = {name: start[name] for name in state}
+state = {name: start[name] for name in state} | {"log": []}

resume starts again at the first epoch | clirat.py | run_resume
-state = {name: start[name] for name in state}
+state = {name: start[name] for name in state} | {"epoch": 0}

resume ignores the weights | clirat.py | run_resume
-models.load_weights(net, start["model"], args.init or args.out)
+models.load_weights(net, net.state_dict(), args.init or args.out)

--init skips the optimiser | clirat.py | run_resume
-optimizer.load_state_dict(start["optimizer"])
+args.init or optimizer.load_state_dict(start["optimizer"])

--resume skips the optimiser | clirat.py | run_resume
-optimizer.load_state_dict(start["optimizer"])
+args.init and optimizer.load_state_dict(start["optimizer"])

--init keeps the other run's weight decay | clirat.py | run_resume
-        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
+        pass

--init keeps the other run's best | clirat.py | run_resume
-return checkpoint | {"best": -1.0}
+return checkpoint

momentum in setup | clirat.py | setup
-args.lr, 0.9, weight_decay
+args.lr, 0.8, weight_decay

weight decay in setup | clirat.py | setup
-0.9, weight_decay=args.weight_decay)
+0.9, weight_decay=0.0)

--seed ignored | clirat.py | setup
-    torch.manual_seed(args.seed)
-    net = models.build
+    torch.manual_seed(1)
+    net = models.build

K fixed at 10 in the network | clirat.py | setup
-models.build(args.arch, int(classes))
+models.build(args.arch, 10)

--train-size ignored | clirat.py | setup
-(x_train[:n], y_train[:n], x_test, y_test)
+(x_train, y_train, x_test, y_test)

noise by place, not by image number | eval_attacks.py | by_name
-for i in index.tolist():
+for i in range(len(index)):

noise the same at every seed | eval_attacks.py | by_name
-np.random.SeedSequence([i, *seeds])
+np.random.SeedSequence([i])

fooled points are attacked again | eval_attacks.py | points_leave
-            x_adv[points], robust[points] = found, active
+            x_adv[points] = found

a point's last success instead of its first | eval_attacks.py | points_leave
-                wrong = wrong & active
+                pass

the attack is not told who has left | eval_attacks.py | points_leave
-                active &= ~wrong
+                active = active & ~wrong

padding of graphs returns the padded rows | eval_attacks.py | graphs
-results.append(zeros.index_copy_(0, index, output[: len(index)]))
+results.append(zeros.index_copy_(0, index, output[-len(index) :]))

judge ignored | eval_attacks.py | judge
-if judge is not None:
+if judge is not None and False:

targets: the least likely first | eval_attacks.py | fab_against
-logits.argsort(1, descending=True)
+logits.argsort(1)

DLR's third logit | eval_attacks.py | dlr
-(z[:, 0] - z[:, 2] + 1e-12)
+(z[:, 0] - z[:, 1] + 1e-12)

targeted DLR's fourth logit | eval_attacks.py | dlr
-(z[:, 2] + z[:, 3]) / 2
+(z[:, 2] + z[:, 2]) / 2

sign of the targeted DLR | eval_attacks.py | dlr
-return -gap / (z
+return gap / (z

APGD's first check | eval_attacks.py | apgd_against
-int(0.22 * steps)
+int(0.2 * steps)

APGD starts inside the ball | eval_attacks.py | apgd_against
-eps * t / (t.abs().amax((1, 2, 3), keepdim=True) + 1e-12)
+eps * t

APGD: step size not halved | eval_attacks.py | apgd_against
-torch.where(stuck, step / 2, step)
+torch.where(stuck, step / 1, step)

APGD: condition 1 at 0.85 | eval_attacks.py | apgd_against
-few = rises <= 0.75 * checks[i - 1]
+few = rises <= 0.85 * checks[i - 1]

APGD: condition 2 dropped | eval_attacks.py | apgd_against
-stuck = few | (~halved & (checked_value >= best_value))
+stuck = few

APGD: does not go back to the best | eval_attacks.py | apgd_against
-                now = torch.where(widen(stuck), best, now)
+                pass

APGD: momentum 0.85 | eval_attacks.py | apgd_against
-a = 0.75 if i else 1.0
+a = 0.85 if i else 1.0

APGD: momentum at the first step | eval_attacks.py | apgd_against
-a = 0.75 if i else 1.0
+a = 0.75

APGD: the window's rises not reset | eval_attacks.py | apgd_against
-halved, checked_value, rises = stuck, best_value, torch.zeros_like(rises)
+halved, checked_value = stuck, best_value

FAB projects without the box | eval_attacks.py | projection
-torch.minimum(level, room)
+level.expand_as(room)

FAB: room on the wrong side | eval_attacks.py | projection
-torch.where(w > 0, t, 1 - t)
+torch.where(w > 0, 1 - t, t)

FAB: 1.05 | eval_attacks.py | fab_against
-(t1 + 1.05 * d1) * (1 - alpha) + (t2 + 1.05 * d2) * alpha
+(t1 + 1.0 * d1) * (1 - alpha) + (t2 + 1.0 * d2) * alpha

FAB: 0.9 | eval_attacks.py | fab_against
-clean + 0.9 * (now - clean)
+clean + 0.5 * (now - clean)

FAB: alpha at most 0.1 | eval_attacks.py | fab_against
-clamp(max=0.1)
+clamp(max=0.9)

FAB: alpha's shares swapped | eval_attacks.py | fab_against
-(a1 / (a1 + a2))
+(a2 / (a1 + a2))

FAB counts what is outside the ball | eval_attacks.py | linear or invariants
-yield now, wrong & near
+yield now, wrong

Square's schedule | eval_attacks.py | square_side
-sum(query > after for after
+sum(query >= after for after

Square: horizontal stripes | eval_attacks.py | square
-noise((channels, 1, width), index
+noise((channels, height, 1), index

Square: half the change | eval_attacks.py | square
-best[window] + 2 * eps * signs[query]
+best[window] + eps * signs[query]

Square accepts all | eval_attacks.py | square
-accepted = active & ((tried < margin) | wrong)
+accepted = active

Square accepts equal margins | eval_attacks.py | square
-accepted = active & ((tried < margin) | wrong)
+accepted = active & ((tried <= margin) | wrong)

PGD-20 for evaluation starts at x | eval_attacks.py | by_name
-start = x + eps * (2 * noise
+start = x + 0 * (2 * noise

PGD-100 of 20 steps | eval_attacks.py | by_name
-"pgd100": partial(last_pgd, steps=100)
+"pgd100": partial(last_pgd, steps=20)

CW with cross-entropy | eval_attacks.py | by_name
-"cw": partial(last_pgd, loss="cw")
+"cw": partial(last_pgd, loss="ce")

FGSM of half a step | eval_attacks.py | by_name
-steps=1, step_size=1
+steps=1, step_size=0.01

FGSM from a random start | eval_attacks.py | by_name
-step_size=1, noisy=False)
+step_size=1, noisy=True)

AutoAttack without Square | eval_attacks.py | verdicts or attack
-"fab-t": fab_t, "square": square}
+"fab-t": fab_t}

AutoAttack's targeted APGD on ce | eval_attacks.py | by_name
-"apgd-t": partial(apgd, loss="targeted")
+"apgd-t": partial(apgd, loss="ce")

an attack that leaves the ball not noticed | eval_attacks.py | by_name
-(x_adv - x).abs().max() <= eps + 1e-6
+(x_adv - x).abs().max() <= 1

a folded copy that differs is attacked | eval_attacks.py | what_is
-if torch.allclose(copy(x), model(x), rtol=1e-4, atol=1e-4):
+if True:

networks that may read a value are recorded | eval_attacks.py | networks_are_recorded
-type(model.net) in (models.ResNet18, models.WideResNet)
+isinstance(model.net, (models.ResNet18, models.WideResNet))

images that an earlier attack fooled count as robust | eval_attacks.py | verdicts
-return verdicts["square" if name == "aa" else name] == 0
+return verdicts["square" if name == "aa" else name] != 1

a stage asked of images that are fooled | eval_attacks.py | verdicts
-            verdicts[name][fooled] = FOOLED_BEFORE
+            pass

--amp: an attack stops without float32's confirmation | eval_attacks.py | what_is
-options |= {"judge": model,
+options |= {"judge": half,

--amp: the verdict of bfloat16 | eval_attacks.py | what_is
-wrong = verdict(model, images, labels, x_adv, eps, batch_size)
+wrong = verdict(attacked, images, labels, x_adv, eps, batch_size)

--amp: Square in bfloat16 | eval_attacks.py | what_is
-attacked = fast if name == "square" else half
+attacked = half

masking: Square against AutoAttack | eval_attacks.py | masking
-gap := accuracy.get("fab-t", 0) - accuracy.get("square", 100)
+gap := accuracy.get("square", 100) - accuracy.get("fab-t", 0)

Wilson interval's z | eval_attacks.py | rows_by_hand
-z=1.96
+z=1.64

paired interval over the seeds | .figures/table.py | table_by_hand
-half = 1.96 * points.mean(0).std() / n**0.5
+half = 1.96 * points.mean(1).std() / n**0.5

two networks of one seed in one row | .figures/table.py | table_compares
-net[:2] == networks[-1][:2] and net != networks[-1]
+False

an interval of no width | .figures/table.py | table_compares
-(points != 0).any(0).sum() >= 10
+len(points)

std of the population | .figures/table.py | table_by_hand
-points.mean(1).std():.2f
+points.mean(1).std(correction=0):.2f

settings ignored where runs are grouped | .figures/table.py | table_compares
-for other, seeds in groups if other == same
+for other, seeds in groups if other["method"] == same["method"]

compared whatever else differs | .figures/table.py | table_compares
-(unweighted or claim) and without(ours, WEIGHTING) == without(theirs, WEIGHTING)
+(unweighted or claim)

the paper's row for any gamma | .figures/table.py | table_compares
-if not usual or training.get("exclude")
+if training.get("exclude")

test sets may differ | .figures/table.py | table_compares
-for name in "data", "eps", "seed", "version":
+for name in "eps", "seed", "version":

attacks that are not through in the table | .figures/table.py | table_compares
-if asked is not None and (asked != NOT_ASKED).all():
+if asked is not None:

forks start from their own burn-in | .ci/study.py | test_study
-str(folders[first] / "burnin.pt")
+str(folder / "burnin.pt")

FAT forks from another's burn-in | .ci/study.py | test_study
-[m for m in folders if "fat" not in (m, method) or m == method]
+[*folders]

verdicts of other networks in the study's table | .ci/study.py | test_study
-files = {part[3] for folder in every for part in parts(args, folder)}
+files = {file for folder in every for file in folder.glob("last.pt.*.npz")}

options of the study's own after -- | .ci/study.py | test_study
-if getattr(now, name) != getattr(plain, name):
+if False:

forks without a burn-in to share | .ci/study.py | burn_in_to_share
-if first != method and forks:
+if first != method:

a study without AutoAttack's --amp | .ci/study.py | test_study
-(["aa"], args.n_aa, True)
+(["aa"], args.n_aa, args.amp)

a program gets no time to stop | .ci/study.py | study_bounds
-process.send_signal(signal.SIGINT)
+process.kill()

paired difference reversed | .figures/table.py | table_by_hand
-mine[seed][k] - other[seed][k]
+other[seed][k] - mine[seed][k]

paired difference: not with the unweighted one | .figures/table.py | table_by_hand
-ours["method"] != theirs["method"] == mine.loss
+theirs["method"] != ours["method"] == mine.loss

verdicts kept for any settings | eval_attacks.py | evaluation_files
-key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
+key = hashlib.sha256(b"").hexdigest()[:8]

verdicts of another process overwritten | eval_attacks.py | at_once
-there = read_verdicts(path)[0] if path.exists() else {}
+there = {}

verdicts written without a lock | eval_attacks.py | lock
-            fcntl.flock(folder, fcntl.LOCK_EX)
+            pass

one temporary name for all processes | clirat.py | temporary
-f"{os.getpid()}.{path.name}.tmp"
+f"{path.name}.tmp"

a temporary file left by a failed write | clirat.py | temporary
-        temporary.unlink(missing_ok=True)
+        pass

--resume takes other settings | clirat.py | bad_input
-if value != before[name] and
+if False and

--resume from a checkpoint of other settings | clirat.py | one_run
-if not isinstance(before, dict) or before | {"data": None} != now:
+if False:

a left-over of any name goes | clirat.py | kill_left
-out.glob(f"[0-9]*.{name}.tmp")
+out.glob("[0-9]*.*.tmp")

an architecture's name that is none is ignored | models.py | bad_input
-    if not name:  # read it off the keys
+    if not name or name == "bogus":  # read it off the keys

--resume takes the defaults instead of the run's settings | clirat.py | run_resume
-    parser.set_defaults(**before | {"out": args.out})
+    parser.set_defaults(out=args.out)

--resume on other images | clirat.py | bad_input
-if before not in (None, args.digest):
+if False:

--resume knows the data by its path | clirat.py | run_resume
-(name != "data" or "digest" not in before)
+True

--init past the burn-in | clirat.py | bad_input
-if theirs != ours or epoch > latest:
+if theirs != ours:

--init from another loss | clirat.py | bad_input
-if theirs != ours or epoch > latest:
+if epoch > latest:

a gamma below 0 | clirat.py | test_weights
-not gamma >= 0 or
+

a missing class is not said in training | clirat.py | missing_classes
-if (present := len(y_train[:n].unique())) < classes and is_lead():
+if (present := len(y_train.unique())) < classes and is_lead():

a missing class is not said in evaluation | eval_attacks.py | missing_classes
-present, runs = len(y[:n].unique()), []
+present, runs = len(y.unique()), []

a closed stderr ends training | clirat.py | stderr
-getattr(sys.stderr, "isatty", bool)()
+sys.stderr.isatty()

a closed stderr ends evaluation | eval_attacks.py | stderr
-getattr(sys.stderr, "isatty", bool)()
+sys.stderr.isatty()

a closed pipe is written to again | clirat.py | closed_pipe
-        sys.stdout = None if isinstance(error, BrokenPipeError) else sys.stdout
+        pass

a closed pipe is a traceback | clirat.py | closed_pipe
-    except (KeyboardInterrupt, FloatingPointError, OSError) as error:
+    except (KeyboardInterrupt, FloatingPointError) as error:

which state dict is not said | models.py | checkpoints
-    if others:
+    if False:

numpy's scalars under one name | models.py | checkpoints
-for core in "numpy.core.multiarray", "numpy._core.multiarray":
+for core in ["numpy._core.multiarray"]:

processes divide different images | eval_attacks.py | two_processes
-        share(name)  # one can
+        # one can

the paper's row for any data | eval_attacks.py | papers_rows
-settings["dataset"] == "CIFAR-10" and
+

the paper's row under another network's | eval_attacks.py | papers_rows
-replace("wrn-34-10", "wrn-32-10")
+replace("wrn-34-10", "resnet18")

autoattack() judged by the folded copy | eval_attacks.py | what_is
-judge, model = model, stand_in(model, x[:8])
+judge = model = stand_in(model, x[:8])

pooled divided wrongly | models.py | folding
-/ (x.shape[2] * x.shape[3])
+/ x.shape[2]

pooled for square images only | models.py | folding
-/ (x.shape[2] * x.shape[3])
+/ x.shape[2] ** 2

ResNet-18 with a stride too few | models.py | torchvisions
-BasicBlock(128, 256, 2)
+BasicBlock(128, 256, 1)

ResNet-18: no ReLU after the sum | models.py | torchvisions
-return F.relu_(self.bn2(self.conv2(out)).add_(self.shortcut(x)))
+return self.bn2(self.conv2(out)).add_(self.shortcut(x))

WRN: shortcut from before the BatchNorm | models.py | wrn_by_hand
-else self.convShortcut(out)
+else self.convShortcut(x)

WRN: depth | models.py | wrn or checkpoints
-WideResNet((depth - 2) // 6
+WideResNet((depth + 2) // 6

a folded scale dropped | models.py | folding
-weight * scale[:, None, None, None]
+weight

a folded bias dropped | models.py | folding
-fresh[f"{conv_name}.bias"] = shift
+fresh[f"{conv_name}.bias"] = 0 * shift

BatchNorm's eps dropped in folding | models.py | folding
-(bn.running_var + bn.eps).rsqrt()
+bn.running_var.rsqrt()

refresh forgets the running statistics | models.py | folding
-shift = bn.bias - bn.running_mean * scale
+shift = bn.bias - self.__dict__.setdefault(bn_name, bn.running_mean.clone()) * scale

refresh takes over the BatchNorms alone | models.py | folding or algorithm_1 and clirat
-            parameter.copy_(fresh[name])
+            if any(name.startswith((bn, str(conv))) for bn, conv in self.folds):
+                parameter.copy_(fresh[name])

weights that are not finite are loaded | models.py | refused
-if not all(value.isfinite().all() for value in state.values()):
+if not all(value.isfinite().any() for value in state.values()):

a loaded network in train mode | models.py | run_resume or checkpoints
-return net.eval(), metadata
+return net.train(), metadata

evaluation: --seed does not arrive | eval_attacks.py | flags_of_evaluation
-options = {"eps": args.eps, "seed": args.seed, "batch_size": args.batch_size
+options = {"eps": args.eps, "batch_size": args.batch_size

evaluation: --batch-size does not arrive | eval_attacks.py | flags_of_evaluation
-"seed": args.seed, "batch_size": args.batch_size, "amp": args.amp}
+"seed": args.seed, "amp": args.amp}

evaluation: --n does not arrive | eval_attacks.py | flags_of_evaluation or evaluation_files
-result = evaluate_one(args, path, model, file, settings, x[:n], y[:n])
+result = evaluate_one(args, path, model, file, settings, x, y)

evaluation: --arch does not arrive | eval_attacks.py | bad_input
-networks = [models.load(path, args.arch) for path in args.checkpoints]
+networks = [models.load(path) for path in args.checkpoints]

evaluation: --device does not arrive | eval_attacks.py | flags_of_evaluation
-device = clirat.join_processes(args.device, args.amp)
+device = clirat.join_processes("cpu", args.amp)

evaluation: the second attack of --attacks forgotten | eval_attacks.py | flags_of_evaluation
-["nat", *(name for name in attacks if name != "aa"), *stages]
+["nat", *[name for name in attacks if name != "aa"][:1], *stages]

TF32 in the convolutions of an evaluation | eval_attacks.py | precision
-    torch.backends.cudnn.allow_tf32 = False
-    try:
+    try:

TF32 in the matrix products of an evaluation | eval_attacks.py | precision
-    torch.backends.cuda.matmul.allow_tf32 = False  # float32 verdicts
+    pass

no TF32 in training | clirat.py | precision
-torch.set_float32_matmul_precision("high")
+torch.set_float32_matmul_precision("highest")

the images not in the key of verdicts | eval_attacks.py | stand_for
-"data": clirat.digest(x, y)}
+"data": clirat.digest(y)}

the labels not in the key of verdicts | eval_attacks.py | stand_for
-"data": clirat.digest(x, y)}
+"data": clirat.digest(x)}

the buffers not in the key of verdicts | eval_attacks.py | stand_for
-clirat.digest(*model.state_dict().values())
+clirat.digest(*model.parameters())

the data's path in the key of verdicts | eval_attacks.py | stand_for
-    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
+    key = hashlib.sha256(json.dumps(settings | {"path": args.data}).encode()).hexdigest()[:8]

CIFAR-10 in one order only | eval_attacks.py | stand_for
-sum(map(zlib.crc32, x.cpu().numpy())) == CIFAR10
+sum(k * v for k, v in enumerate(map(zlib.crc32, x.cpu().numpy()), 1)) == CIFAR10

five targets instead of nine | eval_attacks.py | targets
-min(9, logits.shape[1] - 1)
+min(5, logits.shape[1] - 1)

Square counts a tie as fooled | eval_attacks.py | tie
-return pm(logits, y), is_wrong(logits, y)
+return pm(logits, y), pm(logits, y) <= 0

Square counts a tie as robust | eval_attacks.py | tie
-return pm(logits, y), is_wrong(logits, y)
+return pm(logits, y), pm(logits, y) < 0

merged verdicts take what was not asked | eval_attacks.py | at_once
-verdicts[name] = both[0].maximum(both[-1])
+verdicts[name] = both[0].minimum(both[-1])

accuracy as a fraction | eval_attacks.py | evaluation_files
-"accuracy": 100 * k / n
+"accuracy": k / n

interval of the fooled | eval_attacks.py | evaluation_files
-for end in wilson(k, n)]
+for end in wilson(n - k, n)]

eps in the table as a fraction of 1 | eval_attacks.py | evaluation_files
-eps = f"{255 * args.eps:.4g}/255"
+eps = f"{args.eps:.4g}/255"

--json written in place | eval_attacks.py | written
-clirat.write(args.json, json.dumps(results, indent=2).encode() + b"\n")
+args.json.write_bytes(json.dumps(results, indent=2).encode() + b"\n")

verdicts written in place | eval_attacks.py | written
-clirat.write(path, buffer.getbuffer())
+path.write_bytes(buffer.getbuffer())

no warning of a network trained on toy | eval_attacks.py | several
-if "data" in training and (training["data"] == "toy") != (args.data == "toy"):
+if False:

masking: PGD-100 left out | eval_attacks.py | masking
-for name in ("pgd20", "pgd100"))
+for name in ("pgd20",))

masking: at any gap | eval_attacks.py | masking
-- accuracy.get("aa", 100)) > 3:
+- accuracy.get("aa", 100)) > 0:

default: --epochs | clirat.py | default
-"length of the run; the schedule scales with it", 120
+"length of the run; the schedule scales with it", 100

default: --batch-size | clirat.py | default
-"of all processes together", 128
+"of all processes together", 64

default: --step-size | clirat.py | default
-"step of the training PGD", "2/255"
+"step of the training PGD", "1/255"

default: --steps | clirat.py | default
-"steps of the training PGD", 10
+"steps of the training PGD", 7

default: the learning rate of a WRN | clirat.py | schedule
-else (0.1, 7e-4)
+else (0.01, 7e-4)

default: the folder's name has no seed | clirat.py | default
-out = f"runs/{args.method}-{args.arch}-s{args.seed}"
+out = f"runs/{args.method}-{args.arch}-s1"

default: --eps of an evaluation | eval_attacks.py | default
-default="8/255", help="L-infinity
+default="0.031", help="L-infinity

default: columns of an evaluation | eval_attacks.py | default
-PAPER_COLUMNS = ["nat", "pgd20", "pgd100", "cw", "apgd", "aa"]
+PAPER_COLUMNS = ["nat", "pgd20", "cw", "aa"]

--gamma does not arrive | clirat.py | flags_of_training
-instance_weights(margins, args.gamma, args.beta
+instance_weights(margins, method.gamma, args.beta

--beta does not arrive | clirat.py | flags_of_training
-instance_weights(margins, args.gamma, args.beta
+instance_weights(margins, args.gamma, method.beta

TRADES: --trade-off does not arrive | clirat.py | flags_of_training
-trades_loss(logits_nat, logits_adv, y, args.trade_off, weights)
+trades_loss(logits_nat, logits_adv, y, method.trade_off, weights)

--eps does not reach the start | clirat.py | flags_of_training
-options = {"steps": args.steps, "step_size": args.step_size, "eps": args.eps}
+options = {"steps": args.steps, "step_size": args.step_size, "eps": 8 / 255}

--step-size does not arrive | clirat.py | flags_of_training
-options = {"steps": args.steps, "step_size": args.step_size, "eps": args.eps}
+options = {"steps": args.steps, "step_size": 2 / 255, "eps": args.eps}

--eval-every does not arrive | clirat.py | flags_of_training
-if args.eval_every and epoch % args.eval_every == 0:
+if args.eval_every:

--eval-size does not arrive | clirat.py | flags_of_training
-images, labels = x_test[: args.eval_size], y_test[: args.eval_size]
+images, labels = x_test, y_test

--compile does not arrive | clirat.py | compile
-args.compile, **options)
+False, **options)

--amp does not reach the attack | clirat.py | eps_of
-fast_pgd(net, torch.bfloat16 if args.amp else None
+fast_pgd(net, None

--amp does not reach the network | clirat.py | compile
-torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
+torch.autocast(device.type, torch.bfloat16, enabled=False)

--device does not arrive | clirat.py | device
-start, device = open_run(args), join_processes(args.device, args.amp)
+start, device = open_run(args), join_processes("cpu", args.amp)

best forgotten on --resume | clirat.py | resume
-state = {name: start[name] for name in state}
+state = {name: start[name] for name in state} | {"best": -1.0}

last.pt before best.pt | clirat.py | written
-    if score > state["best"]:
+    save_checkpoint(out / "last.pt", checkpoint)
+    if score > state["best"]:

log.csv before last.pt | clirat.py | written
-    save_checkpoint(out / "last.pt", checkpoint)
-    state.update(now)
-    save_log(out / "log.csv", state["log"])
+    state.update(now)
+    save_log(out / "log.csv", state["log"])
+    save_checkpoint(out / "last.pt", checkpoint)

args.json without the data's digest | clirat.py | written
-        before, args.digest = vars(args).get("digest"), digest(*data)
+        before, args.digest = vars(args).get("digest"), digest(data[0])

the folder in args.json | clirat.py | written
-not in ("out", "resume", "device", "compile")}
+not in ("resume", "device", "compile")}

log.csv with three digits | clirat.py | written
-f"{v:.6g}"
+f"{v:.3g}"

log.csv keeps the last epoch alone | clirat.py | written
-    state.update(now)
-    save_log(out / "log.csv", state["log"])
+    state.update(now)
+    save_log(out / "log.csv", state["log"][-1:])

every checkpoint is called selected | clirat.py | written
-checkpoint |= now | {"args": settings(args)}
+checkpoint |= now | {"args": settings(args), "selected_by": "PGD-20 on test images"}

a file written without the rename | clirat.py | temporary
-        os.replace(temporary, path)
+        path.write_bytes(data)

a file renamed before it is on the disk | clirat.py | temporary
-            os.fsync(file.fileno())
+            pass

accuracy printed as a fraction | clirat.py | written
-print(f"NAT {100 * nat:.2f}  PGD-20 {100 * pgd20:.2f}
+print(f"NAT {nat:.2f}  PGD-20 {pgd20:.2f}

the last line is of the first images | clirat.py | best
-nat, pgd20 = nat_and_pgd20(args, net, attack_20, x_test, y_test)
+nat, pgd20 = nat_and_pgd20(args, net, attack_20, images, labels)

time left: of the epochs behind | clirat.py | written
-(time.perf_counter() - begun) * (args.epochs - epoch))
+(time.perf_counter() - begun) * (args.epochs + epoch))

the hint evaluates another eps | clirat.py | eps_of
-words += ["--eps", args.eps] if args.eps != 8 / 255 else []
+words += ["--eps", args.eps] if args.eps == 8 / 255 else []

CIFAR-10: the test images from the training file | clirat.py | cifar10
-CIFAR10(folder, train=part == "train", download=True)
+CIFAR10(folder, train=True, download=True)

toy: two classes of one colour | clirat.py | toy
-z = (np.arange(10) + 0.5) / 5 - 1
+z = (np.arange(10) // 2 + 0.5) / 5 - 1

toy: the test images are training images | clirat.py | toy
-return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]
+return images[:n_train], labels[:n_train], images[:n_test], labels[:n_test]

table: accuracy of the fooled | .figures/table.py | table
-100 * robust_in(verdicts, name).double()
+100 * (~robust_in(verdicts, name)).double()

table: --amp not said | .figures/table.py | table
-{' (--amp)' if amp else ''}
+{'' if amp else ''}

table: seeds that lack a column not said | .figures/table.py | table
-        if 0 < len(points) < len(seeds):
+        if False:

table: the interval of 90% | .figures/table.py | table_by_hand
-half = 1.96 * points
+half = 1.64 * points

table: the paper's difference reversed | .figures/table.py | table_by_hand
-float(a.split()[0]) - float(b.split()[0])
+float(b.split()[0]) - float(a.split()[0])

table: compared on other seeds | .figures/table.py | table
-                for seed in mine
-                if seed in other
+                for seed in mine
+                if seed in other and seed == 1

table: a run stopped early stands beside whole ones | .figures/table.py | table
-alike = ALIKE | ({"epoch"} if "selected_by" in training else set())
+alike = ALIKE | {"epoch"}

study: PGD-100 in bfloat16 always | .ci/study.py | study_starts
-(["pgd100", "apgd"], args.n_long, args.amp),
+(["pgd100", "apgd"], args.n_long, True),

study: evaluated at another eps | .ci/study.py | study_starts
-command += ["--eps", str(args.eps)] if args.eps != 8 / 255 else []
+command += []

study: every seed is 1 | .ci/study.py | study_starts
-folder.name.rpartition("-s")[2]
+"1"

study: done while something is missing | .ci/study.py | test_study
-            status = 1
+            status = 0

study: options after -- for the first method alone | .ci/study.py | test_study
-command += ["--out", str(folder), *options]
+command += ["--out", str(folder), *(options if method == next(iter(folders)) else [])]

study: no time kept for the evaluation | .ci/study.py | study_starts
-FOR_TRAINING = 0.85
+FOR_TRAINING = 1.0

study: AutoAttack last | .ci/study.py | test_study
-        (["aa"], args.n_aa, True),
-        (["pgd100", "apgd"], args.n_long, args.amp),
+        (["pgd100", "apgd"], args.n_long, args.amp),
+        (["aa"], args.n_aa, True),

buffers of several processes differ | clirat.py | two_processes
-dist.broadcast(buffer, 0)
+pass

training's accuracy of one process alone | clirat.py | two_processes
-dist.all_reduce(correct)
+pass

wrn-32-10 has four blocks a stage | models.py | sizes
-return WideResNet((depth - 2) // 6
+return WideResNet((depth - 4) // 6

CIFAR-10: the training images are the test images | clirat.py | cifar10
-train=part == "train", download=True
+train="train" in parts, download=True

toy: other data in every process | clirat.py | toy
-    rng = np.random.default_rng(0)
-    labels = rng.permutation(
+    rng = np.random.default_rng()
+    labels = rng.permutation(

training's accuracy is the lead's alone | clirat.py | two_processes
-dist.all_reduce(correct)
+dist.broadcast(correct, 0)

the paper's row has six columns | eval_attacks.py | several
-if reference := paper_row(settings, args.attacks):
+if reference := paper_row(settings, PAPER_COLUMNS):

--json keeps the last checkpoint | eval_attacks.py | several
-            results.append(result)
+            results = [result]

--init from after its own burn-in | clirat.py | bad_input
-latest = min(before["burn_in"], args.burn_in, args.epochs - 1)
+latest = min(args.burn_in, args.epochs - 1)

best.pt on a tie | clirat.py | best
-if score > state["best"]:
+if score >= state["best"]:

study: the last seed alone in the table | .ci/study.py | test_study
-        every += trained
+        every = trained

FAT's tau after epoch 70 | clirat.py | fats
-for e in (50, 90))
+for e in (70, 90))

a lone image makes a batch | clirat.py | lone
-if len(batch) > world]
+if len(batch) >= world]

exclude: nothing left is NaN | clirat.py | drop_all
-weights /= gather(weights).mean().clamp(min=1e-30)
+weights /= gather(weights).mean()

--resume forgets --init where nothing is saved yet | clirat.py | run_resume
-    if not args.init:
+    if not args.init or args.resume:

the default folder must exist | clirat.py | cifar10
-if not folder.is_dir() and folder != Path("data"):
+if not folder.is_dir():

a mistyped folder is downloaded to | clirat.py | cifar10
-if not folder.is_dir() and folder != Path("data"):
+if False:

zero gradients at half of the images are no doubt | eval_attacks.py | zero_gradients
-if blind > 0.02:
+if blind > 0.5:

one zero gradient is a doubt | eval_attacks.py | zero_gradients
-if blind > 0.02:
+if blind > 0:

Ctrl-C: another exit status | clirat.py | ctrl_c
-        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
+        sys.exit(1)

Ctrl-C: the epochs behind not said | clirat.py | ctrl_c
-    state.update(now)
+    state["log"], state["best"] = now["log"], now["best"]

progress: time left of one epoch | clirat.py | progress
-(len(batches) * passes - done)
+(len(batches) - done)

all processes print | clirat.py | torchrun
-    return rank_and_world()[0] == 0
+    return True

a stopped evaluation starts afresh | eval_attacks.py | not_asked_again
-    verdicts = read_verdicts(kept)[0] if kept.exists() else {}
+    verdicts = {}

augment: square crops | clirat.py | augment
-.unfold(2, h, 1).unfold(3, w, 1)
+.unfold(2, h, 1).unfold(3, h, 1)

PGD-20 the same at every seed | eval_attacks.py | seeds
-noise(x.shape[1:], index, seed).to(x) - 1) if noisy
+noise(x.shape[1:], index, 0).to(x) - 1) if noisy

APGD the same at every seed | eval_attacks.py | seeds
-index[points.cpu()], seed, k)
+index[points.cpu()], k)

Square's start the same at every seed | eval_attacks.py | seeds
-index[points.cpu()], seed).sub(0.5)
+index[points.cpu()]).sub(0.5)

AutoAttack the same at every seed | eval_attacks.py | seeds
-options = {"eps": eps, "seed": seed, "batch_size": batch_size, "judge": judge, "tick": tick}
+options = {"eps": eps, "batch_size": batch_size, "judge": judge, "tick": tick}

a success that the judge denies ends the attack | eval_attacks.py | judge
-                if not wrong.any():
-                    continue
-                if judge is not None:
+                if not wrong.any():
+                    continue
+                active &= ~wrong
+                if judge is not None:

masking not said by the program | eval_attacks.py | several
-warned = doubts(model, x / 255, y) + masking(figures)
+warned = doubts(model, x / 255, y)

doubts about images of 0..255 | eval_attacks.py | several
-warned = doubts(model, x / 255, y) + masking(figures)
+warned = doubts(model, x * 1.0, y) + masking(figures)

any even depth of a WRN | models.py | sizes
-depth % 6 not in (2, 4)
+depth % 2

programs of a study do not hold its lock | .ci/study.py | study_bounds
-pass_fds=[held.fileno()]
+pass_fds=[]

the paper's row under --exclude | .figures/table.py | table_compares
-if not usual or training.get("exclude") or training.get("train_size"):
+if not usual or training.get("train_size"):

the paper's row under --train-size | .figures/table.py | table_compares
-if not usual or training.get("exclude") or training.get("train_size"):
+if not usual or training.get("exclude"):

--seed below 0 | clirat.py | bounds
-add("--seed", "of the weights and the data's order", 1, type=number(int, 0, 400_000))
+add("--seed", "of the weights and the data's order", 1, type=int)

--batch-size 1 | clirat.py | bounds
-128, type=number(int, 2))
+128, type=positive)

--eps above 1 | clirat.py | bounds
-"8/255", type=number(float, 0, 1))
+"8/255", type=real)

evaluation: --n 0 | eval_attacks.py | bounds
-add("--n", type=number(int, 1)
+add("--n", type=number(int, 0)

log.csv behind last.pt stays so | clirat.py | run_resume
-            if state["log"]:  # a kill can come between last.pt and log.csv
+            if False:

images a second of a batch | clirat.py | written
-len(x_train) / row["seconds"]
+args.batch_size / row["seconds"]

progress: an epoch too few | clirat.py | progress
-args.epochs - epoch + 1):  # l.2
+args.epochs - epoch):  # l.2

labels are not looked at before an evaluation | eval_attacks.py | verdicts
-if len(y) != len(x) or not 0 <= y.min() <= y.max() < classes:
+if False:

--amp on any CPU without a note | clirat.py | bfloat16
-if amp and device.type == "cpu" and
+if False and

--burn-in moves the learning rate's drop, too | clirat.py | flags_of_training
-round(args.epochs * 75 / 120)
+args.burn_in or round(args.epochs * 75 / 120)

exclude: normalised in each process | clirat.py | two_processes
-weights /= gather(weights).mean()
+weights /= weights.mean()

all processes but the lead draw the same | clirat.py | draw_their_own
-torch.randint(2**31, (rank,))[-1]
+torch.randint(2**31, (rank,))[0]

seeds overlap | clirat.py | algorithm_1 and clirat
-torch.manual_seed(args.seed * 10_007 + epoch)
+torch.manual_seed(args.seed + epoch)

a lock that readers share | eval_attacks.py | lock
-fcntl.flock(folder, fcntl.LOCK_EX)
+fcntl.flock(folder, fcntl.LOCK_SH)

Square: the window's place in a wide image | eval_attacks.py | wide
-int((width - side) * right)
+int((height - side) * right)

FGSM of 0.04 at most | eval_attacks.py | by_name
-steps=1, step_size=1
+steps=1, step_size=0.04

checkpoints of a GPU want one | models.py | gpu
-torch.load(path, map_location="cpu", weights_only=True)
+torch.load(path, weights_only=True)

table: seeds taken for independent | .figures/table.py | table_by_hand
-half = 1.96 * points.mean(0).std() / n**0.5
+half = 1.96 * points.std() / points.numel() ** 0.5

study: eps in six digits | .ci/study.py | study_starts
-["--eps", str(args.eps)] if args.eps != 8 / 255
+["--eps", f"{args.eps:.6g}"] if args.eps != 8 / 255

stopped: saved, whatever is there | clirat.py | ctrl_c
-if (out / "last.pt").exists() else
+if state["epoch"] else

checkpoints may run code | models.py | refused
-weights_only=True
+weights_only=False
"""


def read_mutants(text):
    """(name, file, old text, new text, pytest -k expression) of each block between blank lines."""
    mutants = []
    for block in text.strip().split("\n\n"):
        head, *lines = block.splitlines()
        name, file, tests = head.split(" | ")
        old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
        mutants.append((name, file, old, new, tests))
    return mutants


def stale(root, mutant):
    """What is wrong with a mutant's old text, or None where it is in its file exactly once."""
    _, file, old, _, _ = mutant
    count = (root / file).read_text().count(old)
    return None if count == 1 else f"STALE: its text is {count} times in {file}"


def run_tests(folder, *options):
    """pytest's exit status on the suite in folder, and the first failure or pytest's last line.

    Exit status 0: all passed, 1: a test failed, None: it took longer than TIMEOUT.
    """
    command = [sys.executable, "-m", "pytest", *TESTS, "-qx", "-p", "no:cacheprovider"]
    command += ["--basetemp", str(folder / "basetemp"), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    wide = os.environ | {"COLUMNS": "200"}  # or pytest cuts the reasons
    # a group of its own, so that the processes that tests start end with it
    process = subprocess.Popen(command, cwd=folder, env=wide, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, "timeout"
        raise
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(.*)$", output, re.MULTILINE)
    said = failed[1] if failed else (output.strip() or "nothing").splitlines()[-1]
    return process.returncode, said[:120]


def try_mutant(root, mutant):
    """What became of a mutant: "killed by" a test and why, "SURVIVED", "STALE" or "BROKEN"."""
    _, file, old, new, tests = mutant
    if problem := stale(root, mutant):
        return problem
    with tempfile.TemporaryDirectory() as folder:  # a new one: no compiled file of another mutant
        folder = copy_of(root, folder)
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace(old, new))
        status, said = run_tests(folder, "-k", tests)
        if status in (0, 5):  # 5: there is no such test
            status, said = run_tests(folder)
    if status == 0:
        return "SURVIVED"
    if status in (1, None):
        return f"killed by {said}"
    return f"BROKEN: exit status {status} of pytest, {said}"


def copy_of(root, folder):
    """The code and tests of root, copied into folder, as a Path."""
    for path in root.glob("*.py"):
        shutil.copy(path, folder)
    for name in ".ci", ".figures":
        shutil.copytree(root / name, Path(folder, name))
    return Path(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", help="only these (default: all)", nargs="*", metavar="NAME")
    parser.add_argument("--list", help="print the names and run nothing", action="store_true")
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--root", help="folder of the code", type=Path, default=root)
    args = parser.parse_args(argv)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the tests like Ctrl-C
    mutants = read_mutants(MUTANTS)
    names = [mutant[0] for mutant in mutants]
    if len(set(names)) < len(names):
        parser.error("two mutants have the same name")
    if unknown := set(args.names) - set(names):
        parser.error(f"no mutant {min(unknown)!r}: see --list")
    mutants = [mutant for mutant in mutants if mutant[0] in (args.names or names)]
    if args.list:
        problems = [stale(args.root, mutant) for mutant in mutants]
        for (name, file, *_), problem in zip(mutants, problems, strict=True):
            print(f"{file}: {name}", *([problem] if problem else []), sep="  ")
        return int(any(problems))

    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        status, said = run_tests(copy_of(args.root, folder))
    if status != 0:
        print(f"the tests fail on the code as it is: {said}")
        return 1
    outcomes = []
    for mutant in mutants:
        outcomes.append(try_mutant(args.root, mutant))
        print(f"{mutant[0]}: {outcomes[-1]}", flush=True)
    killed = sum(outcome.startswith("killed") for outcome in outcomes)
    minutes = (time.monotonic() - begun) / 60
    print(f"{killed} of {len(outcomes)} mutants killed, in {minutes:.0f} minutes")
    return int(killed < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
