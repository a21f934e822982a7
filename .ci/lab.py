"""Try what could make a training step faster, from outside: the programs stay as they are.

    python .ci/lab.py 2> log                all variants, ResNet-18, --amp --compile
    python .ci/lab.py --variants stem turned stem+turned --precision float32 2> log

A variant is laid over the present code while a training is set up. First 20 steps of both from one
seed are compared, then both are timed in turn in one process. A row a variant, as it comes:
  set up       seconds until 20 steps are done: compilation, recording, cuDNN's choices; what the
               present step or an earlier row had done already is not done again
  attack, training, step   milliseconds a step; training is what the attack leaves of it
  of present   the step's time over that of the present step in the same rounds
  GB           device memory that it took, at its largest; 0 on a CPU
  loss, parameters         how far these are from the present step's, the parameters relatively
  pixels       in how many its attack differs from the plain one, on its network after these steps
"present" is held against itself, since on a GPU two runs of it differ, and "rounding" shows how far
one rounding of each weight leads. Joined by +, of two that change one thing the last counts. Exit
status 1 where a variant fails, takes too long or is another function. --device cpu runs small sizes
of it all.
"""

import argparse
import contextlib
import functools
import sys
import time
from unittest import mock

import gpu_check  # beside this file, as speed is; they make clirat importable
import speed
import torch
import torch.nn.functional as F
from torch import nn

import clirat
import models
from models import Folded

STEPS = 20
# What another order of summation may move, seen on a CPU: the loss by up to 0.004; of the pixels 2%
# in float32, 26% in TF32, 10% in bfloat16. An attack on weights 20 steps old: 0.012, and 65%.
LOSS, PIXELS, PIXELS_FLOAT32 = 0.01, 0.45, 0.05

# ---- Variants: contexts in which a training is set up and run ------------------------------------
# They may yield a function (network, args, images) -> what is trained in the network's place.


@contextlib.contextmanager
def rounding():
    """Every weight moved by about one rounding."""

    @torch.no_grad()
    def moved(net, args, x):
        for parameter in net.parameters():
            parameter.mul_(1 + torch.finfo(x.dtype).eps * torch.randn_like(parameter))
        return net

    yield moved


@contextlib.contextmanager
def limit():
    """cuDNN tries every algorithm, not ten, and chooses anew. In float32 of no use: TF32 is off."""
    # to bfloat16 that switch means nothing, but the choices made before are not found under it
    flags = {"benchmark_limit": 0, "allow_tf32": not torch.backends.cudnn.allow_tf32}
    with torch.backends.cudnn.flags(True, True, **flags):
        yield


@contextlib.contextmanager
def changed_copy(change):
    """`change(copy)` for every `models.Folded`."""
    original = models.Folded

    def folded(net, dtype=None):
        copy = original(net, dtype)
        change(copy)
        return copy

    with mock.patch.object(models, "Folded", folded):
        yield


class Padded(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        more = (0, 0, 0, 0, 0, -weight.shape[1] % 8)
        return super()._conv_forward(F.pad(x, more), F.pad(weight, more), bias)


def stem():
    """The stem's 3 input channels padded to 8: the gradient for 3 is a slow kernel."""

    def pad(copy):
        copy.net.conv1.__class__ = Padded

    return changed_copy(pad)


class ForwardTwice(torch.autograd.Function):
    """A convolution with stride 1 whose gradient is a convolution with the weights turned round."""

    @staticmethod
    def forward(ctx, x, weight, bias, turned, padding):
        ctx.save_for_backward(turned)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx, grad):
        (turned,) = ctx.saved_tensors
        return F.conv2d(grad, turned, padding=ctx.padding), None, None, None, None


class Turned(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return ForwardTwice.apply(x, weight, bias, self.turned, self.padding)


def turned():
    """Input gradients by cuDNN's forward kernels, the turned weights prepared at the refresh."""

    def turn(copy):
        convolutions = [m for m in copy.modules() if type(m) is nn.Conv2d and m.stride == (1, 1)]
        convolutions = [conv for conv in convolutions if conv.in_channels % 8 == 0]  # see `stem`
        refresh_weights = copy.refresh

        def refresh_all(net):
            refresh_weights(net)
            for conv in convolutions:
                conv.turned.copy_(conv.weight.flip(2, 3).transpose(0, 1))

        for conv in convolutions:
            conv.__class__ = Turned
            weight = conv.weight.flip(2, 3).transpose(0, 1)
            conv.register_buffer("turned", weight.contiguous(memory_format=torch.channels_last))
        copy.refresh = refresh_all

    return changed_copy(turn)


@torch.no_grad()
def refresh_together(self, net):
    """`Folded.refresh` with one kernel for all layers where shapes allow it."""
    fresh, folded = dict(net.named_parameters()), [net.get_submodule(bn) for bn, _ in self.folds]
    scales = torch._foreach_add([bn.running_var for bn in folded], folded[0].eps)
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [bn.weight for bn in folded])
    shifts = torch._foreach_mul([bn.running_mean for bn in folded], scales)
    shifts = torch._foreach_sub([bn.bias for bn in folded], shifts)
    for (bn, conv), scale, shift in zip(self.folds, scales, shifts, strict=True):
        if conv:
            fresh[f"{conv}.weight"] = fresh[f"{conv}.weight"] * scale[:, None, None, None]
            fresh[f"{conv}.bias"] = shift
        else:
            fresh[f"{bn}.scale"], fresh[f"{bn}.shift"] = scale[:, None, None], shift[:, None, None]
    names, parameters = zip(*self.net.named_parameters(), strict=True)
    torch._foreach_copy_(parameters, [fresh[name] for name in names])


@contextlib.contextmanager
def refresh():
    """The copy refreshed by functions of lists of tensors."""
    with mock.patch.object(Folded, "refresh", refresh_together):
        yield


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


@contextlib.contextmanager
def refresh_compiled():
    """The refresh compiled."""
    with mock.patch.object(Folded, "refresh", compiled(Folded.refresh)):
        yield


@contextlib.contextmanager
def autotune():
    """The copy compiled with Triton's convolutions beside cuDNN's."""
    tuned = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")
    fast_pgd = clirat.fast_pgd

    def always(net, dtype, _, **options):
        return fast_pgd(net, dtype, True, **options)

    patch = mock.patch.object
    with patch(torch, "compile", tuned), patch(clirat, "fast_pgd", always):
        yield


@contextlib.contextmanager
def train_compiled():
    """The network that is trained compiled, forward and backward."""
    yield lambda net, args, x: torch.compile(net, dynamic=False)


@contextlib.contextmanager
def train_recorded():
    """The forward and backward of training as CUDA graphs; for losses with one forward."""

    def recorded(net, args, x):
        state = {name: t.clone() for name, t in net.state_dict().items()}
        net.train()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
            if x.is_cuda:
                net = torch.cuda.make_graphed_callables(net, (x.clone(),))
            else:
                net(x)
        net.load_state_dict(state)  # warming up moved BatchNorm's statistics
        return net

    yield recorded


@contextlib.contextmanager
def fused():
    """SGD in one kernel."""
    with mock.patch.object(torch.optim, "SGD", functools.partial(torch.optim.SGD, fused=True)):
        yield


VARIANTS = {
    "present": contextlib.nullcontext,
    "rounding": rounding,
    "stem": stem,
    "turned": turned,
    "refresh": refresh,
    "refresh-compiled": refresh_compiled,
    "fused": fused,
    "train-recorded": train_recorded,
    "train-compiled": train_compiled,
    "limit": limit,
    "autotune": autotune,
}
SECONDS = {"present": 180, "autotune": 240}  # at most; for other variants 120

# ---- Comparison ----------------------------------------------------------------------------------


@contextlib.contextmanager
def laid_over(name):
    """In the context of a variant, or of several joined by +; what they yield."""
    with contextlib.ExitStack() as stack:
        yielded = [stack.enter_context(VARIANTS[part]()) for part in name.split("+")]
        yield [wrap for wrap in yielded if wrap]


def set_up(name, options):
    """(outcome of STEPS steps, {part: function of STEPS steps}, function: pixels apart)."""
    size, steps = (8, 2) if options.device == "cpu" else (128, 10)
    command = f"--method clirat --arch {options.arch} --batch-size {size} --steps {steps}"
    words = f"{command} --lr 0.01 {speed.OPTIONS[options.precision]}".split()
    torch.manual_seed(0)
    data = speed.images(STEPS * size)
    with laid_over(name):
        args, net, optimizer, attack, x, y = speed.prepare(words, data, options.device)
    x0, y0, tau = clirat.augment(x[:size]), y[:size], torch.tensor(args.steps).to(y)
    inputs = x0, y0, clirat.pgd_start(x0, "normal", args.eps), tau
    model, plain = net, speed.plain_attack_of(args, net)
    with laid_over(name) as wraps:
        for wrap in wraps:
            model = wrap(model, args, x0)
        found = speed.outcome(args, model, optimizer, attack, x, y)

    def attack_alone():
        with laid_over(name):
            return [attack(*inputs) for _ in range(STEPS)][-1]

    def step():
        with laid_over(name):
            clirat.train_epoch(args, args.burn_in + 1, model, attack, optimizer, x, y)

    def pixels_apart():
        return (attack_alone()[0] != plain(*inputs)[0]).double().mean().item()

    return found, {"attack": attack_alone, "step": step}, pixels_apart


@functools.cache
def settled(precision, arch, device):
    """The present step, set up once in a process."""
    speed.settings()
    return set_up("present", argparse.Namespace(precision=precision, arch=arch, device=device))


def compare(options, name):
    """Yield a variant's row."""
    reference, theirs, _ = settled(options.precision, options.arch, options.device)
    begun = time.perf_counter()
    set_up_it = functools.partial(set_up, name, options)
    (found, ours, pixels_apart), peak = speed.with_peak(set_up_it, options.device)
    spent, pixels = time.perf_counter() - begun, pixels_apart()
    loss, _, parameters = speed.apart(found, reference)
    rounds = 1 if options.device == "cpu" else 5
    median = speed.in_turn(ours | {"present": theirs["step"]}, rounds, options.device)
    attack, step = (1000 * median[part] / STEPS for part in ours)
    cells = [f"{spent:.0f}", *(f"{ms:.2f}" for ms in (attack, step - attack, step))]
    cells += [f"{median['step'] / median['present']:.3f}", f"{peak:.1f}"]
    cells += [f"{loss:.0e}", f"{parameters:.0e}", f"{100 * pixels:.1f}%"]
    exact = (options.precision, options.device) == ("float32", "cpu")
    state = gpu_check.judge(loss <= LOSS and pixels <= (PIXELS_FLOAT32 if exact else PIXELS))
    yield "", " | ".join(cells), "equal" if loss == parameters == pixels == 0 else state


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = functools.partial(parser.add_argument, help="(default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--arch", default="resnet18")
    usual = [*VARIANTS]
    usual.insert(usual.index("turned") + 1, "stem+turned")
    add("--variants", nargs="+", default=usual, metavar="NAME[+NAME]")
    add("--precision", choices=list(speed.OPTIONS)[1:])
    add("--seconds", type=float, default=480)
    add("--device", choices=["cuda", "cpu"], default=device)
    options = parser.parse_args(argv)
    cpu = options.device == "cpu"
    options.arch = "wrn-10-1" if cpu else options.arch
    options.precision = options.precision or ("float32" if cpu else "amp_compile")
    if unknown := {part for name in options.variants for part in name.split("+")} - {*VARIANTS}:
        parser.error(f"no variant {min(unknown)!r}: there are {', '.join(VARIANTS)}")
    if not cpu and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu tries the script itself")
    name = "cpu, small sizes" if cpu else torch.cuda.get_device_name()
    print(f"{name}, {options.arch}, {options.precision}, torch {torch.__version__}\n")
    titles = "variant | set up, s | attack, ms | training, ms | step, ms | of present | GB"
    print(f"| {titles} | loss | parameters | pixels | |\n|{'---|' * 11}", flush=True)
    parts = {}
    for name in options.variants:
        most = max(SECONDS.get(part, 120) for part in name.split("+"))
        parts[name] = functools.partial(compare, name=name), most
    bad = False
    for name, error, finding, state in gpu_check.rows_of(parts, options):
        print(f"| {name} | {error} {finding} | {state} |", flush=True)
        bad |= state not in ("equal", "ok")
    sys.exit(bad)


if __name__ == "__main__":
    main()
