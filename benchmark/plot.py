"""Draws the figures of the docs from the committed JSON of the sweeps: PNG and SVG, readable in black and white.

python benchmark/plot.py                   # all of them, seconds (pip install matplotlib)
python benchmark/plot.py separation        # one: docs/separation.png and docs/separation.svg
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.separation import EPISODES, LENGTHS, LONG, OUT, WALL, of, reached
from plumbing import fail

ROOT = Path(__file__).resolve().parents[1]
STYLES = {0: ("black", "o", "-"), 0.25: ("0.65", "v", ":"), 0.5: ("tab:blue", "s", "--"), 0.75: ("0.4", "D", ":")}
STYLES |= {1: ("tab:red", "^", "-.")}  # beta -> color, marker, line; markers and lines tell apart what colors do not

USUAL = {"kl_coef": 0.01, "episodes": EPISODES}


def label(beta):
    return "PPO (β = 0)" if beta == 0 else f"DR-PO, β = {beta:g}"


def draw_separation(figure):
    """Left: episodes until half of the held-out lists are right. Right: how many are right after 5,120 episodes."""
    runs = json.loads(OUT.read_text())
    speed, end = figure.subplots(1, 2)
    series = [(label(beta), {n: of(runs, length=n, beta=beta, **USUAL) for n in LENGTHS}) for beta in STYLES]
    series += [("PPO, no KL penalty", {n: of(runs, length=n, beta=0, kl_coef=0) for n, *_ in WALL})]
    for row, ((name, parts), (color, marker, line)) in enumerate(zip(series, [*STYLES.values(), ("black", "x", "-")])):
        style = {"color": color, "marker": marker, "ls": line, "ms": 6, "label": name, "capsize": 3}
        times = {n: [reached(run, 0.5) for run in part] for n, part in parts.items() if part}
        draw(speed, {n: found for n, found in times.items() if None not in found}, style)
        if row < len(STYLES):
            draw(end, {n: [run["success"][-1] for run in part] for n, part in parts.items()}, style)
        late = [n for n, found in times.items() if None in found]  # above the cap, a row for each series
        speed.plot(late, [LONG * 1.25 ** (1 + row)] * len(late), marker=marker, color=color, ms=6, mfc="none", ls="")
    note = {"x": LENGTHS[-1], "ha": "right", "fontsize": 8, "color": "0.3"}
    speed.axhline(LONG * 1.1, color="0.5", lw=0.8)
    speed.text(y=LONG * 1.02, va="top", s="above the line: not by every seed", **note)
    speed.set(yscale="log", xlabel="digits to copy", ylabel="episodes until half of held-out lists are right")
    chance = {"color": "0.5", "lw": 1, "ls": (0, (1, 1)), "label": "supervised policy"}
    end.plot(LENGTHS, [0.3**n for n in LENGTHS], **chance)
    end.set(xlabel="digits to copy", ylabel=f"held-out lists right after {EPISODES:,} episodes", ylim=(-0.03, 1.03))
    end.legend(*speed.get_legend_handles_labels(), fontsize=8, loc="lower left", bbox_to_anchor=(0, 0.06))
    for axes in (speed, end):
        axes.grid(alpha=0.3)
        axes.set_xticks(LENGTHS)


def draw(axes, values, style):
    """Mean and range of values (x -> numbers)."""
    if values:
        means = [mean(found) for found in values.values()]
        low = [middle - min(found) for middle, found in zip(means, values.values())]
        high = [max(found) - middle for middle, found in zip(means, values.values())]
        axes.errorbar(list(values), means, [low, high], **style)


FIGURES = {"separation": (draw_separation, (11, 4.4))}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FIGURES), metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder")
    args = parser.parse_args()
    if unknown := set(args.names) - FIGURES.keys():
        fail(f"no figure {sorted(unknown)[0]}: there are {', '.join(FIGURES)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        fail("the figures need matplotlib: pip install matplotlib")
    matplotlib.rcParams["svg.hashsalt"] = "drpo"  # the same file every time
    for name in args.names:
        function, size = FIGURES[name]
        figure = Figure(figsize=size, layout="constrained")
        function(figure)
        for kind in ("png", "svg"):
            figure.savefig(args.out / f"{name}.{kind}", dpi=130, metadata={"Date": None} if kind == "svg" else None)
            print(args.out / f"{name}.{kind}")
