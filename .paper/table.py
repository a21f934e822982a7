"""Make a table of the verdict files that eval_attacks.py leaves beside checkpoints.

    python .paper/table.py runs/*/last.pt.*.npz

A row a method: its mean ± std over seeds. Then each method minus the unweighted one of its loss,
and CL-PM minus PM, on the same seeds and images: mean ± std over the seeds, and in brackets the
paired 95% interval over the images, these networks taken as given (where ten images or more differ;
the normal approximation fails below). The paper's stand under them where data, radius and network
are its own. Where a checkpoint has several files, a column shows the images that most runs have.
Each test set, radius and seed of the attacks has a table of its own.
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clirat import METHODS
from eval_attacks import COLUMNS, plan, read_verdicts, robust_in, to_ask

# settings in which one method's runs may differ, and those in which compared methods may
ALIKE = {"seed", "init", "best", "eval_every", "eval_size"}
WEIGHTING = {"method", "gamma", "beta", "weight_norm", "exclude"}
TEST = "dataset", "data", "eps", "seed", "version"  # what the figures of a table share


def read(path):
    """(settings, {(attack, n, amp): accuracy in % of each image (n,)}) of a verdict file.

    Attacks that are not through are left out. ValueError if it is not of a run of clirat.py.
    """
    verdicts, settings = read_verdicts(path)
    if settings["training"].get("method") not in METHODS or "seed" not in settings["training"]:
        raise ValueError(f"{path} is not of a run of clirat.py")
    points = {}
    for name in COLUMNS:
        parts = plan(["aa"]) if name == "aa" else [name]
        if verdicts.keys() >= {*parts} and not any(to_ask(verdicts, k).any() for k in parts):
            points[name, settings["n"], settings["amp"]] = 100 * robust_in(verdicts, name).double()
    return settings, points


def without(settings, names):
    return {name: value for name, value in settings.items() if name not in names}


def group(files):
    """[(training's settings, {seed: points})], in the order of METHODS.

    ValueError if two networks share settings and seed: which of them is meant?
    """
    groups, networks = [], []
    for settings, points in files:
        training = settings["training"]
        alike = ALIKE | ({"epoch"} if "selected_by" in training else set())
        same = without(training, alike | ({"data"} if "digest" in training else set()))
        seeds = next((seeds for other, seeds in groups if other == same), None)
        if seeds is None:
            seeds = {}
            groups.append((same, seeds))
        seeds.setdefault(training["seed"], {}).update(points)
        networks.append((same, training["seed"], settings["weights"]))
        if any(net[:2] == networks[-1][:2] and net != networks[-1] for net in networks):
            name = f"{training['method']}, seed {training['seed']}"
            raise ValueError(f"two networks are {name}, with the same settings: give one's files")
    return sorted(groups, key=lambda g: list(METHODS).index(g[0]["method"]))


def label(training, groups):
    """A group's method, and the settings that tell it from other groups of that method."""
    others = [other for other, _ in groups if other["method"] == training["method"]]
    own = [k for k, v in training.items() if any(other.get(k) != v for other in others)]
    return ", ".join([training["method"], *(f"{name} {training[name]}" for name in own)])


def comparable(ours, theirs):
    """Whether theirs is what a method is to be held against, all else being equal."""
    mine, other = METHODS[ours["method"]], METHODS[theirs["method"]]
    unweighted = ours["method"] != theirs["method"] == mine.loss
    claim = (mine.margin, other.margin) == ("cl-pm", "pm") and mine.loss == other.loss
    return (unweighted or claim) and without(ours, WEIGHTING) == without(theirs, WEIGHTING)


def cell(points, signed=""):
    """Text for points (S, n), in %, a row a seed. signed: "+" for differences."""
    mean, (seeds, n) = points.mean(), points.shape
    text = f"{mean:{signed}.2f}"
    if seeds > 1:
        text += f" ± {points.mean(1).std():.2f}"
    if signed and (points != 0).any(0).sum() >= 10:
        half = 1.96 * points.mean(0).std() / n**0.5
        text += f" [{mean - half:+.2f}, {mean + half:+.2f}]"
    return text


def row(name, seeds, columns, signed=""):
    cells = []
    for column in columns:
        points = [found[column] for found in seeds.values() if column in found]
        cells.append(cell(torch.stack(points), signed) if points else "")
        if 0 < len(points) < len(seeds):
            cells[-1] += f" ({len(points)} of the seeds)"
    return [name, str(len(seeds)), *cells]


def paper(settings, training, names):
    """The paper's cells (Tables 1, 2), [] where it has none for these settings."""
    method = METHODS[training["method"]]
    usual = all(training.get(k) == getattr(method, k) for k in ("gamma", "beta", "trade_off"))
    usual &= not (training.get("exclude") or training.get("train_size"))
    usual &= settings["dataset"] == "CIFAR-10" and abs(settings["eps"] - 8 / 255) < 1e-9
    arch = str(training.get("arch")).replace("wrn-34-10", "wrn-32-10")  # the same network
    with open(Path(__file__).with_name("paper.csv"), newline="", encoding="utf-8") as file:
        rows = {(row["arch"], row["method"]): row for row in csv.DictReader(file)}
    row = rows.get((arch, training["method"])) if usual else None
    return [row.get(name, "") for name in names] if row else []


def table(files):
    """Rows of cells, the first one the titles. files: what `read` returns of each, of one TEST."""
    settings = files[0][0]
    groups, columns = group(files), []
    counts = Counter(key for _, seeds in groups for found in seeds.values() for key in found)
    for name in COLUMNS:
        keys = [key for key in counts if key[0] == name]
        columns += sorted(keys, key=lambda key: (counts[key], key[1], not key[2]))[-1:]
    names = [name for name, _, _ in columns]
    rows = [["%", "seeds", *map(str.upper, names)], ["test images", ""]]
    rows[1] += [f"{n:,}{' (--amp)' if amp else ''}" for _, n, amp in columns]
    for training, seeds in groups:
        rows.append(row(label(training, groups), seeds, columns))
        if cells := paper(settings, training, names):
            rows.append(["the paper's", "?", *cells])
    for ours, mine in groups:
        for theirs, other in groups:
            if not comparable(ours, theirs) or not mine.keys() & other.keys():
                continue
            both = {
                seed: {k: mine[seed][k] - other[seed][k] for k in mine[seed] if k in other[seed]}
                for seed in mine
                if seed in other
            }
            name = f"{label(ours, groups)} - {label(theirs, groups)}"
            rows.append(row(name, both, columns, "+"))
            cells = zip(paper(settings, ours, names), paper(settings, theirs, names), strict=False)
            gaps = [float(a.split()[0]) - float(b.split()[0]) if a else None for a, b in cells]
            if gaps:
                texts = ["" if gap is None else f"{gap:+.2f}" for gap in gaps]
                rows.append(["the paper's", "?", *texts])
    return rows


def show(rows):
    """Print rows of cells, the first one the titles, as Markdown."""
    for cells in [rows[0], ["---"] * len(rows[0]), *rows[1:]]:
        print("|", " | ".join(cells), "|", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser("table.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="verdict files")
    args = parser.parse_args(argv)
    tests = {}
    try:
        for file in map(read, args.files):
            test = ", ".join(f"{name} {file[0][name]}" for name in TEST)
            tests.setdefault(test, []).append(file)
        for test, files in tests.items():
            print(f"\n{test}\n\n" if len(tests) > 1 else "", end="")
            show(table(files))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
