"""Draw the log.csv of runs: Figs. 3 and 5 of the paper (nat, pgd20) and Fig. 1A (confused).

    python .paper/curves.py runs/at-s* runs/mail-at-s* runs/clirat-s* --out curves.png

Runs whose names differ in a trailing -s<seed> alone are one method: the mean of its seeds, in a
band from the lowest to the highest. What methods share until they fork is drawn once, in grey.
"""

import argparse
import csv
import json
import re
from pathlib import Path

ONE, SEVERAL = "one confused label", "several confused labels"
PANELS = {  # unit, and the columns of log.csv with their titles
    "nat": ("% of test images", {"nat": "NAT"}),
    "pgd20": ("% of test images", {"pgd20": "PGD-20"}),
    "confused": ("% of training examples", {"single_cl": ONE, "multi_cl": SEVERAL}),
    "weights": ("% of the weight", {"weight_single_cl": ONE, "weight_multi_cl": SEVERAL}),
}
# colours of Okabe and Ito, the first three in the order of Fig. 3: red, green, blue
COLOURS = "#D55E00", "#009E73", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9"
LINES, MARKERS = (":", "--", "-"), "s^oDvP*"
SHARED = {"color": "#6A6A6A", "zorder": 3}
STYLE = {"font.size": 17, "axes.titlesize": 17, "axes.grid": True, "grid.color": "#D0D0D0"}
STYLE |= {"lines.linewidth": 3, "lines.markersize": 10, "lines.markeredgecolor": "white"}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
STYLE |= {"legend.handlelength": 1.8, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2}


def read_log(path, columns):
    """{column: {epoch: %}} of a log, and the last epoch of the burn-in, 0 where not known."""
    log, settings = {column: {} for column in columns}, path.with_name("args.json")
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                for column in columns:
                    if row[column]:  # empty where not evaluated
                        log[column][int(row["epoch"])] = 100 * float(row[column])
        return log, int(json.loads(settings.read_text())["burn_in"]) if settings.exists() else 0
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(f"{path}, or args.json beside it, is not of clirat.py") from None


def summarise(method, logs, column, first):
    """Points (epoch, mean, lowest, highest) where the logs of all seeds have a value."""
    epochs = sorted(set(logs[0][column]).intersection(*(log[column] for log in logs)))
    values = {e: [log[column][e] for log in logs] for e in epochs if e >= first}
    if not values:
        raise ValueError(f"{method}: no epoch to draw has {column} in each log")
    return [(e, sum(v) / len(v), min(v), max(v)) for e, v in values.items()]


def common(ours, theirs):
    """How many points two curves share from the start."""
    return [*(a == b for a, b in zip(ours, theirs, strict=False)), False].index(False)


def draw(methods, panels, burn_in, first, out):
    """methods: {label: logs of its seeds}. panels: names of PANELS, two columns at most."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    titles = {column: title for panel in panels for column, title in PANELS[panel][1].items()}
    shares = len(titles) > len(panels)  # of one whole: on one scale
    handles = dict.fromkeys([*methods, "shared", "burn-in"])
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4.4), dpi=200, layout="constrained")
        axes = figure.subplots(1, len(titles), sharey=shares, squeeze=False)[0]
        for axis, column in zip(axes, titles, strict=True):
            if burn_in >= first:
                handles["burn-in"] = axis.axvspan(first - 1, burn_in, color="#E8E8E8", lw=0)
            curves, drawn = [summarise(*item, column, first) for item in methods.items()], []
            for i, (label, points) in enumerate(zip(methods, curves, strict=True)):
                n = max((common(points, c) for c in curves if c is not points), default=0)
                style = {"color": COLOURS[i % 6], "ls": LINES[i % 3], "marker": MARKERS[i % 7]}
                style["markevery"] = (int(n > 0), 1 + len(points) // 12)
                parts = (label, points[max(0, n - 1) :], style), ("shared", points[:n], SHARED)
                for name, part, look in parts:
                    if part and (name, part) not in drawn:
                        epochs, mean, low, high = zip(*part, strict=True)
                        (handles[name],) = axis.plot(epochs, mean, **look)
                        axis.fill_between(epochs, low, high, color=look["color"], alpha=0.25, lw=0)
                        drawn.append((name, part))
            axis.set(title=titles[column], xlabel="epoch", xlim=(first - 1, None))
        axes[0].set(ylabel=PANELS[panels[0]][0], ylim=(0 if shares else None, None))
        seeds = sorted({len(logs) for logs in methods.values()})
        if seeds != [1]:
            figure.supxlabel(f"mean and range of {' or '.join(map(str, seeds))} seeds", size=15)
        handles = {name: handle for name, handle in handles.items() if handle}
        columns = max(1, min(len(handles), 60 // (max(map(len, handles)) + 5)))
        figure.legend(handles.values(), handles, ncols=columns, loc="outside upper center")
        figure.savefig(out)


def main(argv=None):
    parser = argparse.ArgumentParser("curves.py", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder with log.csv, or such a file")
    add("--out", type=Path, required=True, metavar="FILE.png", help="where to draw")
    text = "one or both of nat and pgd20, or confused, or weights (default: nat pgd20)"
    add("--panels", nargs="+", choices=PANELS, default=["nat", "pgd20"], help=text)
    add("--first", type=int, default=1, metavar="EPOCH", help="to draw (default: %(default)s)")
    add("--burn-in", type=int, metavar="EPOCH", help="its last (default: args.json beside a log)")
    args = parser.parse_args(argv)
    columns = [column for panel in args.panels for column in PANELS[panel][1]]
    if len(columns) > 2:
        parser.error("confused and weights are two panels each, and a picture has no more")
    logs, ends = {}, {0}
    try:
        for run in dict.fromkeys(run.resolve() for run in args.runs):
            path = run / "log.csv" if run.is_dir() else run
            log, end = read_log(path, columns)
            name = str(path.parent if path.name == "log.csv" else path)
            logs.setdefault(re.sub(r"(-s\d+)?((\.log)?\.csv)?$", "", name), []).append(log)
            ends.add(end)
        names = [re.sub(r"-(resnet18|wrn-\d+-\d+)$", "", Path(name).name) for name in logs]
        if len(set(names)) < len(names):
            names = ["/".join(Path(name).parts[-2:]) for name in logs]
        methods = dict(zip(names, logs.values(), strict=True))
        draw(methods, args.panels, args.burn_in or max(ends), args.first, args.out)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
