"""ResNet-18 and Wide ResNets for small images, with the state-dict keys of the TRADES, MART and MAIL code.

Every network maps images in [0, 1], (N, 3, H, W), to logits, (N, K). Checkpoints of that family load here and
ours load there.
"""

import copy
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from torch import nn


def conv3x3(in_channels, out_channels, stride=1):
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def pooled(x):
    """Global average pooling, (N, C, H, W) -> (N, C). The gradient of a sum keeps channels_last, that of a mean not."""
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
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
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

    `resnet18` or `wrn-D-K`, where D is 6n+4 (Zagoruyko & Komodakis) or 6n+2 (Madry's count, the paper's "WRN-32-10").
    ValueError on any other name.
    """
    if name == "resnet18":
        return ResNet18(num_classes)
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    depth, widen = map(int, match.groups()) if match else (0, 0)
    if depth < 8 or depth % 6 not in (2, 4) or widen < 1:
        raise ValueError(
            f"unknown architecture {name!r}: use resnet18 or wrn-D-K with D = 6n+4 or 6n+2, such as wrn-32-10"
        )
    return WideResNet((depth - 2) // 6, widen, num_classes)


class Affine(nn.Module):
    """BatchNorm in eval mode as shift + scale x: its backward is one product and keeps no x."""

    def __init__(self, bn):
        super().__init__()
        scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
        self.scale = nn.Parameter(scale[:, None, None], requires_grad=False)  # (C, 1, 1)
        self.shift = nn.Parameter((bn.bias - bn.running_mean * scale)[:, None, None], requires_grad=False)

    def forward(self, x):
        row = (1, x.shape[1], 1, x.shape[3])  # written out, since a loop over 16 channels is too short for bfloat16
        shift, scale = (
            v.to(x.dtype).expand(row).contiguous(memory_format=torch.channels_last) for v in (self.shift, self.scale)
        )
        return torch.addcmul(shift, x, scale)


def folded(net, dtype=torch.float32):
    """A copy of a network to attack: in eval mode, BatchNorm folded into the convolution registered just before it.

    Elsewhere BatchNorm becomes `Affine`. The same function up to rounding for the networks of this file; in others the
    order of registration can deceive. dtype: of the weights; bfloat16 for autocast, which then has nothing to cast.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    for module in list(net.modules()):
        previous = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and child.affine and child.track_running_stats:
                affine = Affine(child)
                if isinstance(previous, nn.Conv2d) and previous.bias is None:
                    previous.weight.mul_(affine.scale[:, None])
                    previous.bias, affine = nn.Parameter(affine.shift.flatten(), requires_grad=False), nn.Identity()
                setattr(module, name, affine)
            previous = child
    return net.to(dtype)


def read(path):
    """Return the dict that a checkpoint file holds, on the CPU. Never runs code from the file.

    FileNotFoundError or ValueError, in one line, if there is no such file or it is damaged or unsafe.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path} holds more than tensors and plain values, or is damaged: it is not loaded") from None
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from None
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def load_weights(net, state, path):
    """Load a state dict of the TRADES/MART/MAIL family into `net`; `path` is for the messages.

    `module.` prefixes, TRADES' unused `sub_block1.*` and absent `num_batches_tracked` are fine; ValueError names all
    other keys that do not match.
    """
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    want = net.state_dict()
    missing = [key for key in want if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in want]
    shapes = [key for key in want if key in state and getattr(state[key], "shape", None) != want[key].shape]
    problems = [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise ValueError(f"{path} does not fit {type(net).__name__}: {'; '.join(problems)}")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds weights that are not finite")
    net.load_state_dict(state, strict=False)


def load(path, name=None):
    """Load a checkpoint of this repository or of the TRADES/MART/MAIL family: (network in eval mode, metadata dict).

    The file holds a state dict, alone or under "model" or "state_dict". name: the architecture (see `build`), needed
    where the file does not name it. metadata: what else the file says, training settings included.
    FileNotFoundError or ValueError, in one line, if the file cannot be read or does not match.
    """
    checkpoint = read(path)
    inner = [key for key in ("model", "state_dict") if isinstance(checkpoint.get(key), dict)]
    state = checkpoint[inner[0]] if inner else checkpoint
    metadata = {}
    if inner:
        metadata = {k: v for k, v in checkpoint.items() if k not in ("model", "state_dict", "optimizer", "args")}
        metadata |= checkpoint["args"] if isinstance(checkpoint.get("args"), dict) else {}
    name = name or metadata.get("arch")
    if not isinstance(name, str):
        raise ValueError(f"{path} does not name its architecture: give it, such as --arch wrn-34-10")
    heads = [v for k, v in state.items() if str(k).removeprefix("module.") in ("linear.bias", "fc.bias")]
    net = build(name, heads[0].numel() if heads and isinstance(heads[0], torch.Tensor) else 10)
    load_weights(net, state, path)
    return net.eval(), metadata
