"""Draw Fig. 2 of the paper as bars: two examples of the same PM, which CL-PM tells apart.

python .paper/fig2.py --out .paper/fig2.svg
"""

import argparse
from pathlib import Path

EXAMPLES = {  # probabilities of four labels, the true one first
    "A: one confused label": (0.30, 0.50, 0.15, 0.05),
    "B: two confused labels": (0.20, 0.40, 0.30, 0.10),
}
TRUE, CONFUSED, OTHER = "#0072B2", "#E69F00", "#BDBDBD"  # blue and orange of Okabe and Ito
MINUS = "\N{MINUS SIGN}"


def minus(number):
    return f"{MINUS}{-number:.1f}"


def draw(out):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 17, "axes.titlesize": 17, "svg.hashsalt": "fig2"}):
        figure = Figure(figsize=(8, 4.8), dpi=200, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, (p_y, *others)) in zip(axes, EXAMPLES.items(), strict=True):
            axis.bar(0, p_y, color=TRUE, label="true label y")
            axis.axhline(p_y, color=TRUE, ls="--", lw=2.5)
            gaps = []  # p_y - p_j of the confused labels
            for x, p in enumerate(others, 1):
                if p <= p_y:
                    axis.bar(x, p, color=OTHER, label="other")
                    continue
                gaps.append(p_y - p)
                axis.bar(x, p, color=CONFUSED, label="confused: likelier than y")
                arrow = {"arrowstyle": "<->", "lw": 2.5, "shrinkA": 0, "shrinkB": 0}
                axis.annotate("", (x, p_y), (x, p), arrowprops=arrow)
                axis.text(x, p + 0.01, minus(p_y - p), ha="center", weight="bold")
            terms = f" {MINUS} ".join([minus(gaps[0]), *(f"{-gap:.1f}" for gap in gaps[1:])])
            total = f" = {minus(sum(gaps))}" if len(gaps) > 1 else ""
            axis.set(title=title, xlabel=f"PM = {minus(min(gaps))}\nCL-PM = {terms}{total}")
            axis.set(xticks=range(4), xticklabels="yjkl", yticks=(0, 0.2, 0.4), ylim=(0, 0.58))
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("probability")
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        above = {"loc": "outside upper center", "ncols": 3, "frameon": False}
        spaces = {"handlelength": 1, "handletextpad": 0.5, "columnspacing": 1.2}
        figure.legend(handles.values(), handles, **above, **spaces)
        figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def main(argv=None):
    parser = argparse.ArgumentParser("fig2.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.svg", help="where to draw")
    try:
        draw(parser.parse_args(argv).out)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
