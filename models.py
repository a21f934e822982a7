"""ResNet-18 and Wide ResNets for small images, with the state-dict keys of TRADES, MART and MAIL.

Every network maps images in [0, 1], (N, 3, H, W), to logits, (N, K). Checkpoints of that family
load here and ours load there.
"""

import argparse
import copy
import re
from pathlib import Path, PurePosixPath

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
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

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
        rest = (WideBlock(out_channels, out_channels, 1) for _ in range(n - 1))
        self.layer = nn.Sequential(WideBlock(in_channels, out_channels, stride), *rest)

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
    `Affine`: right for the networks of this file; in others the order of registration can deceive.
    dtype: of the weights and activations; images and logits keep that of the images.
    """

    def __init__(self, net, dtype=None):
        super().__init__()
        # 33 MB, freed at once: glibc then keeps freed blocks of that size for the next pass, which
        torch.empty(8_300_000)  # else pays a page fault for every 4 kB, a quarter of its time
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.folds = []  # (name of a BatchNorm, name of the convolution before it or None)
        for prefix, module in list(self.net.named_modules()):
            previous = None
            for child_name, child in list(module.named_children()):
                name = f"{prefix}.{child_name}" if prefix else child_name
                if isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
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


def graphed(function, device):
    """A function of tensors that returns a tuple of tensors, on CUDA as a CUDA graph.

    Without it a step waits for the CPU, which launches some 5,000 kernels. Recorded once for each
    set of input shapes, then replayed: what `function` reads besides must stay where it is, and it
    must not look at a value. Elsewhere it is returned as it is.
    """
    if device.type != "cuda":
        return function
    graphs, stream, pool = {}, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def replay(*inputs):
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in graphs:
            static = [t.clone() for t in inputs]
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):  # warm up: compilation, cuDNN's choices
                for _ in range(3):
                    function(*static)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            options = {"pool": pool, "stream": stream}
            # thread_local: NCCL's watchdog may ask for its events meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
                outputs = function(*static)
            graphs[key] = graph, static, outputs
        graph, static, outputs = graphs[key]
        for ours, theirs in zip(static, inputs, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return tuple(t.clone() for t in outputs)  # the next replay overwrites them

    return replay


# plain values that stand beside the weights in other people's files
PLAIN = [argparse.Namespace, type(Path()), PurePosixPath, np.ndarray, np.dtype]
PLAIN += {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + "efd"}
for core in "numpy.core.multiarray", "numpy._core.multiarray":  # in numpy 1 and 2
    PLAIN += [(np.zeros(1).__reduce__()[0], f"{core}._reconstruct")]
    PLAIN += [(np.float64(0).__reduce__()[0], f"{core}.scalar")]


def read(path):
    """The dict in a checkpoint file, on the CPU; OSError or ValueError where none can be read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: give a checkpoint, such as a run's last.pt")
    torch.serialization.add_safe_globals(PLAIN)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        what = "is damaged, no checkpoint (a web page, a Git LFS pointer, safetensors, TorchScript)"
        hint = "convert it where it can be loaded: torch.save(model.state_dict(), 'weights.pt')"
        raise ValueError(f"{path} {what}, or holds code: not loaded; {hint}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a state dict")
    return checkpoint


def state_dicts(checkpoint):
    """{key: state dict} of those in a checkpoint, without wrappers' prefixes; "" for a bare one."""
    prefixes, found = re.compile(r"^((module|model|net|_orig_mod|\d+)\.)+"), {}
    for key, state in {"": checkpoint, **checkpoint}.items():
        tensors = state.items() if isinstance(state, dict) else []
        tensors = {prefixes.sub("", str(k)): v for k, v in tensors if isinstance(v, torch.Tensor)}
        if "conv1.weight" in tensors:
            found[str(key)] = tensors
    return found


def load_weights(net, state, path):
    """Load a state dict of the TRADES/MART/MAIL family into `net`; ValueError, on `path`, if unfit.

    TRADES' unused `sub_block1.*` and absent `num_batches_tracked` are fine.
    """
    state = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    want = net.state_dict()
    problems = {
        "missing": [k for k in want if k not in state and not k.endswith("num_batches_tracked")],
        "unknown": [k for k in state if k not in want],
        "of another shape": [k for k in want if k in state and state[k].shape != want[k].shape],
    }
    found = [f"{len(k)} {what}: {', '.join(k[:3])}" for what, k in problems.items() if k]
    if found:
        raise ValueError(f"{path} does not fit {type(net).__name__}: {'; '.join(found)}")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds weights that are not finite")
    net.load_state_dict(state)


def plain(values):
    """What of a dict are plain values, numpy's scalars and short lists of integers included."""
    values = {str(k): v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    short = {k for k, v in values.items() if isinstance(v, list) and len(v) < 10}
    short = {k for k in short if all(isinstance(i, int) for i in values[k])}
    kinds = str | int | float | bool | None
    return {k: v for k, v in values.items() if isinstance(v, kinds) or k in short}


def load(path, name=None):
    """Load a checkpoint of this repository or of the TRADES/MART/MAIL family.

    The file holds a state dict, alone or under any key, its keys with any run of the prefixes
    module., model., net. and _orig_mod. name: the architecture (see `build`), by default what the
    file says or its keys and shapes show. Returns the network in eval mode, and a dict of the plain
    values in the file, training settings included; where there are several state dicts the first
    is loaded, and "state_dict" says which. OSError or ValueError if the file does not fit.
    """
    checkpoint = read(path)
    states = state_dicts(checkpoint)
    if not states:
        raise ValueError(f"{path} holds no weights of ResNet-18 or a WRN, but {[*checkpoint][:4]}")
    (key, state), *others = states.items()
    settings = checkpoint.get("args", {})
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    metadata = plain(checkpoint) | plain(settings if isinstance(settings, dict) else {})
    if others:
        metadata["state_dict"] = f"{key}, not {', '.join(other for other, _ in others)}"
    if not name and re.fullmatch(r"resnet18|wrn-\d+-\d+", str(metadata.get("arch"))):
        name = metadata["arch"]
    if not name:  # read it off the keys
        blocks = [key for key in state if re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", key)]
        name = f"wrn-{6 * len(blocks) + 4}-{len(state[blocks[0]]) // 16}" if blocks else "resnet18"
    heads = [state[key] for key in ("linear.bias", "fc.bias") if key in state]
    net = build(name, len(heads[0]) if heads else 10)
    load_weights(net, state, path)
    return net.eval(), metadata | {"arch": name}
