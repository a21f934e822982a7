"""ResNet-18 and Wide ResNets for small images, with the state-dict keys of TRADES, MART and MAIL.

Every network maps images in [0, 1], (N, 3, H, W), to logits, (N, K). Checkpoints of that family
load here and ours load there.
"""

import argparse
import copy
import functools
import re
import warnings
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def conv3x3(in_channels, out_channels, stride=1):
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def pooled(x):
    """Global average pooling, (N, C, H, W) -> (N, C): a sum, whose gradient keeps channels_last."""
    return x.sum((2, 3)) / (x.shape[2] * x.shape[3])


class BasicBlock(nn.Module):
    """Post-activation residual block of ResNet-18 (He et al. 2016a)."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x):
        out = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(out)).add_(self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet-18 with a 3 x 3 stem and no pooling before the first stage, as is usual on CIFAR."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x):  # (N, 3, H, W) in [0, 1] -> (N, K)
        out = F.relu_(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(pooled(out))


class WideBlock(nn.Module):
    """Pre-activation residual block (Zagoruyko & Komodakis 2016)."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu_(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        return self.conv2(F.relu_(self.bn2(self.conv1(out)))).add_(shortcut)


class WideStage(nn.Module):
    """n blocks of one width. A class of its own only for the `layer` in the state-dict keys."""

    def __init__(self, n, in_channels, out_channels, stride):
        super().__init__()
        blocks = [WideBlock(in_channels, out_channels, stride)]
        blocks += [WideBlock(out_channels, out_channels, 1) for _ in range(n - 1)]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN with n blocks in each of three stages, `widen` times as wide as a plain ResNet."""

    def __init__(self, n, widen, num_classes=10):
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.block1 = WideStage(n, 16, 16 * widen, 1)
        self.block2 = WideStage(n, 16 * widen, 32 * widen, 2)
        self.block3 = WideStage(n, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):  # (N, 3, H, W) in [0, 1] -> (N, K)
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(pooled(F.relu_(self.bn1(out))))


def build(name, num_classes=10):
    """Return a freshly initialised network.

    name: `resnet18` or `wrn-D-K`, where D is 6n+4 (Zagoruyko & Komodakis) or 6n+2 (Madry's count,
    the paper's "WRN-32-10"). ValueError on any other.
    """
    if name == "resnet18":
        return ResNet18(num_classes)
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    depth, widen = map(int, match.groups()) if match else (0, 0)
    if depth < 8 or depth % 6 not in (2, 4) or widen < 1:
        hint = "use resnet18 or wrn-D-K with D = 6n+4 or 6n+2, such as wrn-32-10"
        raise ValueError(f"unknown architecture {name!r}: {hint}")
    return WideResNet((depth - 2) // 6, widen, num_classes)


class Affine(nn.Module):
    """BatchNorm in eval mode as shift + scale x: its backward is one product and keeps no x."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        # written out along a row: a loop over 16 channels is too short for a CPU's bfloat16
        row = (1, x.shape[1], 1, x.shape[3])
        scale = self.scale.expand(row).contiguous(memory_format=torch.channels_last)
        shift = self.shift.expand(row).contiguous(memory_format=torch.channels_last)
        return torch.addcmul(shift, x, scale)


class Folded(nn.Module):
    """A copy of a network to attack: the same function in eval mode, up to rounding, at less cost.

    BatchNorm is folded into the convolution registered just before it, and elsewhere becomes
    `Affine`. That is right for the networks of this file; in others the order of registration can
    deceive. dtype: of the weights and activations; images and logits keep that of the images.
    """

    def __init__(self, net, dtype=None):
        super().__init__()
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.folds = []  # (name of a BatchNorm, name of the convolution before it or None)
        for prefix, module in list(self.net.named_modules()):
            previous = None
            for child_name, child in list(module.named_children()):
                name = f"{prefix}.{child_name}" if prefix else child_name
                norm = isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm)
                if norm and child.affine and child.track_running_stats:
                    conv = self.net.get_submodule(previous) if previous else None
                    if isinstance(conv, nn.Conv2d) and conv.bias is None:
                        conv.bias = nn.Parameter(torch.zeros_like(child.bias))
                        instead = nn.Identity()
                    else:
                        previous = None
                        instead = Affine(child.num_features).to(child.weight.device)
                    setattr(module, child_name, instead)
                    self.folds.append((name, previous))
                previous = name
        self.net.to(dtype or next(net.parameters()).dtype).requires_grad_(False)
        self.refresh(net)

    @torch.no_grad()
    def refresh(self, net):
        """Take over the weights of `net`, in place, as a CUDA graph needs it."""
        fresh = dict(net.named_parameters())
        for bn_name, conv_name in self.folds:
            bn = net.get_submodule(bn_name)
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()  # (C,)
            shift = bn.bias - bn.running_mean * scale
            if conv_name:
                weight = fresh[f"{conv_name}.weight"]
                fresh[f"{conv_name}.weight"] = weight * scale[:, None, None, None]
                fresh[f"{conv_name}.bias"] = shift
            else:
                fresh[f"{bn_name}.scale"] = scale[:, None, None]
                fresh[f"{bn_name}.shift"] = shift[:, None, None]
        for name, parameter in self.net.named_parameters():
            parameter.copy_(fresh[name])

    def forward(self, x):
        return self.net(x.to(next(self.net.parameters()).dtype)).to(x.dtype)


# how other files begin that people take for checkpoints, and what to do
OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull",
    b"<": "a web page: download the file itself",
}
# plain values that stand beside the weights in other people's files
PLAIN = [argparse.Namespace, type(Path()), PurePosixPath]
PLAIN += [np.ndarray, np.dtype]
PLAIN += {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + "efd"}
for core in "core", "_core":  # where numpy 1 and 2 have what makes arrays and scalars
    for value in np.zeros(1), np.float64(0):
        function = value.__reduce__()[0]
        PLAIN.append(functools.partial(function))
        PLAIN[-1].__module__ = f"numpy.{core}.multiarray"
        PLAIN[-1].__name__ = PLAIN[-1].__qualname__ = function.__name__


def read(path):
    """Return the dict that a checkpoint file holds, on the CPU. Never runs code from the file.

    OSError or ValueError, in one line that says what the file is and how to convert it, if there is
    no such file or it is damaged or unsafe.
    """
    path, save = Path(path), "torch.save({}, 'weights.pt')".format
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file, such as {path / 'last.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        head = file.read(64)
    if head[8:9] == b"{":
        hint = save("safetensors.torch.load_file(FILE)")
        raise ValueError(f"{path} is a safetensors file: convert it by {hint}")
    for begin, what in OTHER_FILES.items():
        if head.lstrip().startswith(begin):
            raise ValueError(f"{path} is {what}")
    torch.serialization.add_safe_globals(PLAIN)
    try:
        with warnings.catch_warnings():  # of what is then an error
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        what = "holds a whole model or other code, or is damaged: it is not loaded"
        hint = f"where it was made, {save('model.state_dict()')}"
        raise ValueError(f"{path} {what}; convert it: {hint}") from None
    except Exception as error:  # a damaged file can raise nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, OSError | EOFError):
            reason = "damaged or cut off"
        if "TorchScript" in reason:
            hint = save("torch.jit.load(FILE).state_dict()")
            reason = f"a TorchScript archive, convert it by {hint}"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def state_dict_of(checkpoint):
    """The state dict in a checkpoint, bare or under a key, without wrappers' prefixes, or None."""
    prefixes = re.compile(r"^((module|model|net|_orig_mod|\d+)\.)+")
    for state in checkpoint, *checkpoint.values():
        if isinstance(state, dict):
            tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
            tensors = {prefixes.sub("", str(k)): v for k, v in tensors.items()}
            if "conv1.weight" in tensors:
                return tensors
    return None


def architecture(state):
    """The name, for `build`, of the network that a state dict seems to be of."""
    blocks = [key for key in state if re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", key)]
    if not blocks:
        return "resnet18"
    return f"wrn-{6 * len(blocks) + 4}-{len(state[blocks[0]]) // 16}"


def load_weights(net, state, path):
    """Load a state dict of the TRADES/MART/MAIL family into `net`; `path` is for the messages.

    TRADES' unused `sub_block1.*` and absent `num_batches_tracked` are fine; ValueError names all
    other keys that do not match.
    """
    state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    want = net.state_dict()
    missing = [key for key in want if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in want]
    shapes = [key for key in want if key in state and state[key].shape != want[key].shape]
    problems = []
    for what, keys in ("missing", missing), ("unknown", unknown), ("of another shape", shapes):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{what} {', '.join(keys[:3])}{more}")
    if any(key.split(".")[-1] in ("mean", "std", "mu", "sigma") for key in unknown):
        hint = "put that before net, and attack the two in Python"
        problems.append(f"it normalises its input: {hint}")
    if problems:
        raise ValueError(f"{path} does not fit {type(net).__name__}: {'; '.join(problems)}")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds weights that are not finite")
    net.load_state_dict(state, strict=False)


def plain(values):
    """What of a dict are plain values, numpy's scalars and short lists of integers included."""
    values = {str(k): v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    lists = {k for k, v in values.items() if isinstance(v, list) and len(v) < 10}
    lists = {k for k in lists if all(isinstance(i, int) for i in values[k])}
    kinds = str | int | float | bool | None
    return {k: v for k, v in values.items() if isinstance(v, kinds) or k in lists}


def load(path, name=None):
    """Load a checkpoint of this repository or of the TRADES/MART/MAIL family.

    The file holds a state dict, alone or under any key (of several the first), its keys with any
    run of the prefixes module., model., net. and _orig_mod. name: the architecture (see `build`),
    by default what the file says or its keys and shapes show. Returns the network in eval mode, and
    a dict of the plain values in the file, training settings included.
    OSError or ValueError, in one line, if the file cannot be read or does not match.
    """
    checkpoint = read(path)
    state = state_dict_of(checkpoint)
    if state is None:
        keys = ", ".join(map(str, list(checkpoint)[:4]))
        raise ValueError(f"{path} holds no weights of ResNet-18 or a WRN, but: {keys}")
    settings = checkpoint.get("args", {})
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    metadata = plain(checkpoint) | plain(settings if isinstance(settings, dict) else {})
    name = name or metadata.get("arch")
    if not re.fullmatch(r"resnet18|wrn-\d+-\d+", str(name)):
        name = architecture(state)
    heads = [state[key] for key in ("linear.bias", "fc.bias") if key in state]
    net = build(name, len(heads[0]) if heads else 10)
    load_weights(net, state, path)
    return net.eval(), metadata | {"arch": name}
