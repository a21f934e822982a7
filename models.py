"""ResNet-18 and Wide ResNets for small images, with the state-dict keys of TRADES, MART and MAIL.

Every network maps images in [0, 1], (N, 3, H, W), to logits, (N, K).
"""

import argparse
import contextlib
import copy
import re
from collections import Counter, OrderedDict
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
        out = self.layer2(self.layer1(F.relu_(self.bn1(self.conv1(x)))))
        return self.linear(pooled(self.layer4(self.layer3(out))))


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


def wide_stage(n, in_channels, out_channels, stride):
    """n blocks of one width, as `layer`, the name in the state-dict keys."""
    rest = (WideBlock(out_channels, out_channels, 1) for _ in range(n - 1))
    layer = nn.Sequential(WideBlock(in_channels, out_channels, stride), *rest)
    return nn.Sequential(OrderedDict(layer=layer))


class WideResNet(nn.Module):
    """WRN with n blocks in each of three stages, `widen` times as wide as a plain ResNet."""

    def __init__(self, n, widen, num_classes=10):
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.block1 = wide_stage(n, 16, 16 * widen, 1)
        self.block2 = wide_stage(n, 16 * widen, 32 * widen, 2)
        self.block3 = wide_stage(n, 32 * widen, 64 * widen, 2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        for conv in (module for module in self.modules() if isinstance(module, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):  # (N, 3, H, W) in [0, 1] -> (N, K)
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(pooled(F.relu_(self.bn1(out))))


def build(name, num_classes=10):
    """A freshly initialised network: `resnet18` or `wrn-D-K`; ValueError on another name.

    D is 6n+4 (Zagoruyko & Komodakis) or 6n+2 (Madry's count, the paper's "WRN-32-10").
    """
    if name == "resnet18":
        return ResNet18(num_classes)
    match = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    depth, widen = map(int, match.groups()) if match else (0, 0)
    if depth < 8 or depth % 6 not in (2, 4) or widen < 1:
        known = "resnet18 or wrn-D-K, D = 6n+4 or 6n+2"
        raise ValueError(f"unknown architecture {name!r}: use {known}")
    return WideResNet((depth - 2) // 6, widen, num_classes)


class Affine(nn.Module):
    """BatchNorm in eval mode as shift + scale x: its backward is one product and keeps no x."""

    def __init__(self, channels, device=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1, device=device))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1, device=device))

    def forward(self, input):  # BatchNorm's name for it
        # written out along a row: a loop over 16 channels is too short for a CPU's bfloat16
        row = (1, input.shape[1], 1, input.shape[3])
        scale = self.scale.expand(row).contiguous(memory_format=torch.channels_last)
        shift = self.shift.expand(row).contiguous(memory_format=torch.channels_last)
        return torch.addcmul(shift, input, scale)


def foldable(net):
    """[(BatchNorm, the convolution before it or None)], by name, of those that `Folded` replaces.

    By the forward's graph: nobody else takes the convolution's output or weight. No graph: None.
    """
    modules, before = dict(net.named_modules()), {}
    owners = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))  # tied: 2
    convs = {k: m for k, m in modules.items() if type(m) is nn.Conv2d and m.bias is None}
    convs = {k for k, m in convs.items() if owners[id(m.weight)] == 1}
    with contextlib.suppress(Exception):  # a forward can do anything: it is a copy that is traced
        nodes = torch.fx.Tracer().trace(copy.deepcopy(net)).nodes
        uses = Counter(node.target for node in nodes)
        for node in (node for node in nodes if node.op == "call_module"):
            conv = [*node.args, *node.kwargs.values()][0]
            alone = uses[node.target] == uses[conv.target] == len(conv.users) == 1
            if conv.target in convs and alone and f"{conv.target}.weight" not in uses:
                before[node.target] = conv.target
    kinds = nn.BatchNorm2d, nn.SyncBatchNorm
    norms = {k: m for k, m in modules.items() if type(m) in kinds and m.running_mean is not None}
    return [(k, before.get(k)) for k, m in norms.items() if owners[id(m.bias)] == 1]


def keep_freed_memory():
    """Free 33 MB: glibc then keeps such blocks; their page faults are a quarter of an attack."""
    torch.empty(33_200_000, dtype=torch.uint8, device="cpu")


class Folded(nn.Module):
    """A copy of a network to attack: the same function in eval mode, up to rounding, at less cost.

    BatchNorm is folded into the convolution before it, and elsewhere becomes `Affine`. dtype: of
    the weights and activations; images and logits keep that of the images.
    """

    def __init__(self, net, dtype=None):
        super().__init__()
        keep_freed_memory()
        self.net = copy.deepcopy(net).eval()
        self.folds = foldable(self.net)
        for bn_name, conv_name in self.folds:
            bn = self.net.get_submodule(bn_name)
            if conv_name:
                self.net.get_submodule(conv_name).bias = nn.Parameter(torch.zeros_like(bn.bias))
            instead = nn.Identity() if conv_name else Affine(bn.num_features, bn.bias.device)
            self.net.set_submodule(bn_name, instead)
        self.net.to(dtype or next(net.parameters()).dtype).requires_grad_(False)
        self.refresh(net)

    @torch.no_grad()
    def refresh(self, net):
        """Take over the weights and buffers of `net`, in place, as a CUDA graph needs it."""
        fresh = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers())
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
        for name, tensor in [*self.net.named_parameters(), *self.net.named_buffers()]:
            tensor.copy_(fresh[name])

    def forward(self, x):
        return self.net(x.to(next(self.net.parameters()).dtype)).to(x.dtype)


@torch.no_grad()
def check_folding(net, x, dtype=None):
    """ValueError where a network's `Folded` copy is another function on images x, or fails."""
    net, problem = copy.deepcopy(net).eval(), "is another function"
    for zeros in (parameter for parameter in net.parameters() if not parameter.any()):
        zeros.normal_()  # a last layer of zeros would hide all, a new BatchNorm a wrong fold
    for name, _ in foldable(net):
        for tensor in (t for t in net.get_submodule(name).state_dict().values() if t.ndim):
            tensor.uniform_(0.5, 1.5)
    logits = net(x)
    try:
        same = (Folded(net)(x) - logits).abs().max() < 0.01 * logits.abs().max()  # TF32: 0.001
        if same and Folded(net, dtype)(x).isfinite().all():
            return
    except Exception as error:  # a forward can do anything
        problem = f"fails{f' in {dtype}' if dtype else ''} ({' '.join(str(error).split())})"
    hint = "does its forward ask for types, or use more than its layers' outputs?"
    raise ValueError(f"the copy of {type(net).__name__} to attack {problem}: {hint}")


def graphed(function, device):
    """A function of tensors that returns a tuple of tensors, on CUDA as a CUDA graph.

    Without it a step waits for the CPU, which launches some 5,000 kernels. Recorded once for each
    set of input shapes, then replayed: what `function` reads besides, such as weights, must stay
    where it is in memory, and it must not look at a value. Elsewhere it is returned as it is.
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
            # thread_local: NCCL's watchdog may ask for its events meanwhile
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
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
OTHERS = "other networks are evaluated from Python, or by --arch if models.build knows them"


def read(path):
    """The dict in a checkpoint file, on the CPU; OSError or ValueError where none can be read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: give a checkpoint, such as a run's last.pt")
    torch.serialization.add_safe_globals(PLAIN)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file can raise nearly anything
        kinds = "web page, LFS pointer, .npz, safetensors, TorchScript, list, defaultdict, module"
        hint = "convert it where it can be loaded: torch.save(model.state_dict(), 'weights.pt')"
        raise ValueError(f"{path} is damaged, or holds no state dict ({kinds}); {hint}") from error


def load_weights(net, state, path):
    """Load a state dict into `net`; ValueError, on `path`, if it does not fit."""
    unused = "sub_block1.", "n_averaged"  # of TRADES' WRN, of AveragedModel
    state = {k: v for k, v in state.items() if not k.startswith(unused)}
    want = {k: v for k, v in net.state_dict().items() if k in state or "num_batches" not in k}
    want, have = ({k: tuple(v.shape) for k, v in of.items()} for of in (want, state))
    wrong = [k for k in want | have if have.get(k) != want.get(k)]
    if wrong:
        first = [f"{k} is {have.get(k, 'missing')}, not {want.get(k, 'known')}" for k in wrong[:3]]
        raise ValueError(f"{path} does not fit {type(net).__name__} ({'; '.join(first)}): {OTHERS}")
    if not all(value.isfinite().all() for value in state.values()):
        raise ValueError(f"{path} holds weights that are not finite")
    net.load_state_dict(state)


def plain(values):
    """What of a dict are plain values, or short lists of them."""
    values = {str(k): v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
    lists = {k: v if isinstance(v, list) and len(v) < 10 else [v] for k, v in values.items()}
    kinds = str | int | float | None
    return {k: values[k] for k, v in lists.items() if all(isinstance(i, kinds) for i in v)}


def load(path, name=None):
    """Load a checkpoint of this repository or of the TRADES/MART/MAIL family.

    The file holds a state dict, alone or under any key, its keys with any run of the prefixes
    module., model., net. and _orig_mod. name: the architecture (see `build`), by default what the
    file says or its keys and shapes show. Returns the network in eval mode, and the plain values in
    the file, training settings included; of several state dicts it loads the first, and
    "state_dict" says which. OSError or ValueError if the file does not fit.
    """
    checkpoint = read(path)
    settings = checkpoint.get("args", {})
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    metadata = plain(checkpoint) | plain(settings if isinstance(settings, dict) else {})
    if not name:
        with contextlib.suppress(ValueError):  # in other people's files it can be any word
            build(str(metadata.get("arch")))
            name = metadata["arch"]
    first = next(iter(build(name or "resnet18").state_dict()))  # what a state dict holds
    prefixes, states = re.compile(r"^((module|model|net|_orig_mod|\d+)\.)+"), {}
    for key, state in {"": checkpoint, **checkpoint}.items():
        items = state.items() if isinstance(state, dict) else []
        tensors = {str(k): v for k, v in items if isinstance(v, torch.Tensor)}
        if first not in tensors:  # then under a wrapper's prefix
            tensors = {prefixes.sub("", k): v for k, v in tensors.items()}
        if first in tensors:
            states[str(key)] = tensors
    if not states:
        what = f"holds no weights of {name or 'ResNet-18 or a WRN'}, but {[*checkpoint][:4]}"
        raise ValueError(f"{path} {what}: {OTHERS}")
    (key, state), *others = states.items()
    if others:
        metadata["state_dict"] = f"{key}, not {', '.join(other for other, _ in others)}"
    if not name:  # read it off the keys
        blocks = [key for key in state if re.fullmatch(r"block1\.layer\.\d+\.conv1\.weight", key)]
        name = f"wrn-{6 * len(blocks) + 4}-{len(state[blocks[0]]) // 16}" if blocks else "resnet18"
    heads = [state[key] for key in ("linear.bias", "fc.bias") if key in state]
    heads += [value for value in state.values() if value.ndim == 1][-1:]
    net = build(name, heads[0].numel() if heads else 10)
    load_weights(net, state, path)
    return net.eval(), metadata | {"arch": name}
