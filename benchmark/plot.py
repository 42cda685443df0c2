"""Draws the figures of the docs from the committed JSON of the sweeps: PNG and SVG, readable in black and white.

python benchmark/plot.py                   # all whose sweeps have been run, seconds (pip install matplotlib)
python benchmark/plot.py separation        # one: docs/separation.png and docs/separation.svg
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.separation import EPISODES, LENGTHS, LONG, OUT, WALL, growth_alone, growth_of, of, reached
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
    series += [
        ("PPO, no KL penalty, 3 seeds, up to 20,480", {n: of(runs, length=n, beta=0, kl_coef=0) for n, *_ in WALL})
    ]
    for row, ((name, parts), (color, marker, line)) in enumerate(zip(series, [*STYLES.values(), ("black", "x", "-")])):
        style = {"color": color, "marker": marker, "ls": line, "ms": 6, "label": name, "capsize": 3}
        times = {n: [reached(run, 0.5) for run in part] for n, part in parts.items() if part}
        draw(speed, {n: found for n, found in times.items() if None not in found}, style)
        if row < len(STYLES):
            draw(end, {n: [run["success"][-1] for run in part] for n, part in parts.items()}, style)
        late = [n for n, found in times.items() if None in found]  # above their cap, a row for each series
        height = EPISODES * 1.25 ** (1 + row) if row < len(STYLES) else LONG * 1.25
        speed.plot(late, [height] * len(late), marker=marker, color=color, ms=6, mfc="none", ls="")
    alone, one = growth_alone(runs), growth_of(runs, 1)
    for found, lengths, text, at in (
        (alone, range(4, 11), "× {:.1f}", {"x": 8.1, "y": 14_000, "ha": "left"}),
        (one, LENGTHS, "+ {:,.0f}", {"x": 12, "y": 1_150, "ha": "right"}),
    ):
        if found:
            more, law = found
            x = [n for n in lengths if law(n) < LONG]
            speed.plot(x, [law(n) for n in x], color="0.3", lw=0.8, zorder=1)
            speed.text(s=f"{text.format(more)} for two digits more", fontsize=8, color="0.3", **at)
    for cap, which in ((EPISODES, ""), (LONG, "×: ")):
        speed.axhline(cap * 1.05, color="0.5", lw=0.8, ls=":")
        note = f"{which}not by every seed within {cap:,}"
        speed.text(LENGTHS[-1], cap, note, ha="right", va="top", fontsize=8, color="0.3")
    speed.set(yscale="log", xlabel="digits to copy", ylabel="episodes until half of held-out lists are right")
    end.plot(LENGTHS, [0.3**n for n in LENGTHS], color="0.5", lw=1, ls=(0, (1, 1)))
    end.set(xlabel="digits to copy", ylabel=f"held-out lists right after {EPISODES:,} episodes", ylim=(-0.03, 1.03))
    handles, labels = speed.get_legend_handles_labels()
    figure.legend([*handles, end.lines[-1]], [*labels, "by chance"], fontsize=9, loc="outside lower center", ncols=4)
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


def load(name):
    path = ROOT / f"benchmark/{name}.json"
    if not path.exists():
        fail(f"{path}: no such file; python benchmark/{'seeds' if name == 'curves' else name}.py writes it")
    return json.loads(path.read_text())


def group(records, *keys):
    """Records by the values of some keys, in the order in which they come."""
    found = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in keys), []).append(record)
    return found


def draw_band(axes, runs, key, style):
    """Mean over seeds along training, and the range as a band; of several looks after as many episodes the last."""
    points = dict(zip(runs[0]["at"], zip(*(run[key] for run in runs))))
    at, rows = [*points], [*points.values()]
    axes.plot(at, [mean(row) for row in rows], **style)
    axes.fill_between(
        at, [min(row) for row in rows], [max(row) for row in rows], color=style["color"], alpha=0.15, lw=0
    )


PPO, DRPO = ({"color": "black", "marker": "o", "ls": "-"}, {"color": "tab:red", "marker": "^", "ls": "-."})
METHODS = {"ppo": ("PPO", PPO), "drpo": ("DR-PO, β = 1", DRPO)}
METHODS |= {"drpo_0.5": ("DR-PO, β = 0.5", {"color": "tab:blue", "marker": "s", "ls": "--"})}
KL_LABEL = "KL to SFT, nats a response"


def draw_frontier(figure):
    """Rubric and score at the end of a run against its KL, one point a run; and along training without a KL penalty."""
    records = load("frontier")
    rubric, score, training = figure.subplots(1, 3)
    for method in ("ppo", "drpo"):
        label, style = METHODS[method]
        parts = group([run for run in records if run["method"] == method], "kl_coef")
        for axes, key in ((rubric, "rubric"), (score, "score")):
            for (kl_coef,), part in parts.items():
                x, y = ([run["test"][name] for run in part] for name in ("kl", key))
                axes.plot(x, y, **style | {"ls": ""}, ms=3, alpha=0.4)
                if method == "ppo":
                    left = axes is score or kl_coef == max(parts)[0]
                    where = {"xytext": (-6, 2) if left else (5, 4), "ha": "right" if left else "left"}
                    point = (mean(x), mean(y))
                    axes.annotate(f"{kl_coef:g}", point, textcoords="offset points", fontsize=8, **where)
            middle = [[mean(run["test"][name] for run in part) for part in parts.values()] for name in ("kl", key)]
            axes.plot(*middle, **style, ms=6, label=label)
        free = parts[(0,)]
        for key, fill in (("rubric", style["color"]), ("score", "none")):
            for run in free:
                training.plot(run["kl"], run[key], color=style["color"], lw=0.6, alpha=0.3)
            x, y = ([mean(row) for row in zip(*(run[name] for run in free))] for name in ("kl", key))
            training.plot(x, y, **style, ms=4, mfc=fill, label=f"{label}: {key}")
    sft = mean(run["sft"] for run in records)
    rubric.plot(0, sft, color="0.4", marker="*", ls="", ms=9, label="SFT")
    rubric.set(
        xlabel=KL_LABEL, ylabel="rubric, test posts", title="at the end; numbers: PPO's KL coefficient; small: one run"
    )
    score.set(
        xlabel=KL_LABEL, ylabel="reward-model score, test posts", title="what the reward model says of the same runs"
    )
    training.set(xlabel=KL_LABEL, ylabel="validation posts", title="along training without KL penalty; thin: one run")
    finish(rubric, score, training)


def draw_beta(figure):
    """TL;DR and transcription against beta."""
    records = load("beta")
    win, lists = figure.subplots(1, 2)
    for seed_runs in group(records, "seed").values():
        win.plot([r["beta"] for r in seed_runs], [100 * r["test"]["win_rate"] for r in seed_runs], color="0.8", lw=1)
    parts = {beta: [100 * run["test"]["win_rate"] for run in part] for (beta,), part in group(records, "beta").items()}
    style = {"color": "black", "marker": "s", "ls": "-", "ms": 5, "capsize": 3, "label": "mean and range"}
    draw(win, parts, style | {"label": "mean and range; grey: one seed"})
    win.set(xlabel="β", ylabel="win rate on test posts, %", title="TL;DR: every fact pays by itself")
    parts = {beta: of(json.loads(OUT.read_text()), length=8, beta=beta, **USUAL) for beta in STYLES}
    draw(lists, {b: [100 * run["success"][-1] for run in part] for b, part in parts.items()}, style)
    lists.set(xlabel="β", ylabel="lists of 8 digits right at the end, %", title="transcription: the whole copy pays")
    finish(win, lists)


def draw_true_reward(figure):
    """Along training: the true reward as the reward, and a reward model learnt for it."""
    records = load("true_reward")
    titles = {
        "tldr": ("TL;DR", "rubric, validation posts"),
        "transcription": ("transcription, 8 digits", "lists right"),
    }
    panels = figure.subplots(1, 2)
    for axes, (task, (title, label)) in zip(panels, titles.items()):
        for (method, reward), part in group([r for r in records if r["task"] == task], "method", "reward").items():
            name, style = METHODS[method]
            fill = style["color"] if reward == "true" else "none"
            kind = {"true": "true reward", "learned": "reward model"}[reward]
            draw_band(axes, part, "rubric", style | {"mfc": fill, "ms": 5, "label": f"{name}, {kind}"})
        axes.set(xlabel="episodes", ylabel=label, title=title)
    finish(*panels)


RL_PANELS = {"rubric": "rubric", "score": "reward-model score", "kl": KL_LABEL, "length": "tokens"}


def draw_curves(figure):
    """Each training script at its defaults: what it logs on the validation split, mean and range."""
    runs = {name: part for (name,), part in group(load("curves"), "run").items()}
    online = {"rto": ("RTO", PPO), "online_dpo": ("online DPO", METHODS["drpo_0.5"][1]), "xpo": ("XPO", DRPO)}
    online |= {"rejection_sampling": ("rejection sampling", {"color": "0.4", "marker": "D", "ls": ":"})}
    pairs = {"dpo": ("DPO", PPO), "dpo_ln": ("LN-DPO", DRPO)}
    above = {"loss": ("sft.py: loss", {"sft": ("validation, responses", PPO)})}
    above |= {"accuracy": ("reward_model.py: accuracy", {"reward": ("reward model", PPO)})}
    above |= {
        "accuracy ": ("DPO: accuracy of pairs", pairs),
        "logprobs/chosen": ("DPO: logprobs/chosen", {"dpo": pairs["dpo"]}),
    }
    rows = [
        above,
        *({key: (title, part) for key, title in RL_PANELS.items()} for part in (METHODS, online) if part.keys() & runs),
    ]
    figure.set_size_inches(13, 3 * len(rows))
    panels = figure.subplots(len(rows), 4)
    for number, (row, place) in enumerate(zip(rows, panels)):
        for axes, (key, (title, methods)) in zip(place, row.items()):
            for method, (label, style) in methods.items():
                if method in runs:
                    draw_band(axes, runs[method], key.strip(), style | {"ms": 4, "label": label})
            axes.set(xlabel="episodes" if number else "epoch", title=title)
    updates = [run["train"] for run in runs.get("sft", ())]
    if updates:
        draw_band(
            panels[0][0], updates, "loss", {"color": "tab:blue", "ls": "-", "lw": 1, "label": "batches, with prompts"}
        )
    finish(*panels[0], *panels[1:, 0])
    finish(*panels[1:, 1:].flat, legend=False)


def draw_failures(figure):
    """Runs with one thing wrong over the band of healthy ones."""
    parts = {name: part for (name,), part in group(load("failures"), "failure").items()}
    healthy = [run for run in load("curves") if run["run"] == "ppo"]
    panels = figure.subplots(2, 3).flat
    looks = [("tab:red", "^", "-."), ("tab:blue", "s", "--"), ("0.65", "D", ":"), ("tab:olive", "v", (0, (5, 1)))]
    for axes, (key, title) in zip(panels, (RL_PANELS | {"eos": "share with an EOS"}).items()):
        draw_band(axes, healthy, key, PPO | {"ms": 3, "label": "healthy"})
        for (name, part), (color, marker, line) in zip(parts.items(), looks):
            style = {"color": color, "marker": marker, "ls": line, "ms": 5, "label": name}
            if "learning rate" in name:  # all or nothing by seed: a band would cover the panel
                for run in part:
                    axes.plot(run["at"], run[key], **style | {"label": name if run is part[0] else None})
            else:
                draw_band(axes, part, key, style)
        axes.set(xlabel="episodes", title=title)
    panels[2].set_yscale("symlog", linthresh=1)
    finish(*panels[:5], legend=False)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=5)
    for name, style in (("one token, β = 1", DRPO), ("one token, β = 0.5", METHODS["drpo_0.5"][1])):
        draw_band(panels[5], parts[name], "score", style | {"ms": 4, "label": name})
    panels[5].set(xlabel="episodes", title="share of right answers", ylim=(-0.03, 1.03))
    finish(panels[5])


def draw_coverage(figure):
    """Right copies against sampled answers, a panel for every kind of list; means and ranges over seeds."""
    records = [run for run in load("coverage") if run["part"] == "coverage"]
    looks = {"online_dpo": ("online DPO", PPO), "xpo": ("XPO, α = 0.01 to the end", DRPO)}
    looks["xpo_falling"] = ("XPO, α to 0 in 5 rounds", METHODS["drpo_0.5"][1])
    looks["xpo_reference"] = ("Algorithm 1, α = 0.01", {"color": "0.6", "marker": "D", "ls": ":"})
    looks["xpo_reference_falling"] = ("Algorithm 1, α to 0", {"color": "0.4", "marker": "v", "ls": "-."})
    parts = group(records, "length", "right")
    panels = figure.subplots(1, len(parts), sharey=True)
    for axes, ((n, right), part) in zip(panels, parts.items()):
        for (method,), runs in group(part, "method").items():
            label, style = looks[method]
            draw_band(axes, runs, "success", style | {"ms": 5, "label": label})
        axes.set(xlabel="sampled answers", title=f"{n} digits, {right}^{n} = {right**n:.1g}", ylim=(-0.03, 1.03))
    panels[0].set(ylabel="validation lists copied right")
    finish(*panels)


def finish(*panels, legend=True):
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
        if legend and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


FIGURES = {  # each of benchmark/NAME.json
    "separation": (draw_separation, (11, 4.4)),
    "curves": (draw_curves, (13, 6)),
    "frontier": (draw_frontier, (13, 4.2)),
    "beta": (draw_beta, (10, 3.8)),
    "true_reward": (draw_true_reward, (11, 4.2)),
    "failures": (draw_failures, (12, 6.4)),
    "coverage": (draw_coverage, (11, 3.8)),
}


def drawable():
    """The figures whose sweeps have been run."""
    return [name for name in FIGURES if (ROOT / f"benchmark/{name}.json").exists()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=drawable(), metavar="NAME", help=", ".join(FIGURES))
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
