"""What quality costs in KL: rubric and reward-model score against KL to SFT, PPO and DR-PO, on the TL;DR task.

    python benchmark/frontier.py          # 5 seeds x 2 methods x 6 KL coefficients; goes on where it was stopped
    python benchmark/plot.py frontier     # the figure, from frontier.json

65 minutes on two cores after benchmark/seeds.py and failures.py, whose runs are among these. Every run starts from its seed's SFT
policy and reward model (made if missing) and is evaluated along training on validation posts and at its end on 400 test posts, at
temperature 1.

Equal KL: a seed's runs with a penalty, ordered by their KL at the end, are joined by straight lines and read where both methods have
one. Not so the run without penalty, which ends many nats away. The interval is Student's t over seeds; beside it a percentile
bootstrap over seeds, which for five is too narrow (85% in a simulation). Neither knows that other posts would give other numbers.

Over-optimisation, along training: the evaluation at which the mean rubric of the other seeds is highest, and what a seed has lost from
there to its end. Choosing by other seeds keeps luck out of it. Across the sweep: the run that ends with the highest rubric.
"""

import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import failures
from benchmark import seeds as tldr
from benchmark.seeds import EVERY, SEEDS, interval, start_of, train
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write

OUT = ROOT / "benchmark/frontier.json"
KL_COEFS, DEFAULT = (0, 0.01, 0.02, 0.05, 0.1, 0.2), 0.05
METHODS = {"ppo": "PPO", "drpo": "DR-PO, β = 1"}
AT = (1, 1.5, 2, 2.5, 3, 3.5)  # nats a response


def name_of(method, kl_coef, seed):
    if (method, kl_coef) == ("ppo", 0):
        return failures.name_of("no KL penalty", seed)
    return f"seeds_{seed}_{method}" if kl_coef == DEFAULT else f"frontier_{seed}_{method}_{kl_coef:g}"


def command(method, kl_coef, seed):
    if (method, kl_coef) == ("ppo", 0):
        return failures.command("no KL penalty", seed)
    if kl_coef == DEFAULT:
        return tldr.command(method, seed)
    name = name_of(method, kl_coef, seed)
    return [f"{method}.py", *start_of(seed)[1], *EVERY, "--kl-coef", kl_coef, "--output-dir", f"models/{name}"]


def record(method, kl_coef, seed):
    name = name_of(method, kl_coef, seed)
    test, sft = last(name)
    return {"method": method, "kl_coef": kl_coef, "seed": seed, "test": test, "sft": sft["rubric"]} | curves(name)


def at_kl(runs, kl, key):
    """Of one seed and method, read at this KL; None where its runs with a penalty do not reach."""
    x, y = zip(*sorted((run["test"]["kl"], run["test"][key]) for run in runs if run["kl_coef"] > 0))
    return float(np.interp(kl, x, y)) if x[0] <= kl <= x[-1] else None


def bootstrap(values, draws=10_000):
    """95% interval of the mean, by percentiles."""
    drawn = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return np.quantile(drawn, [0.025, 0.975])


def losses(runs):
    """Of each seed's run: episodes and KL where the mean rubric of the others is highest, what its own lost from there on."""
    for run in runs:
        best = int(np.mean([other["rubric"] for other in runs if other is not run], 0).argmax())
        yield run["at"][best], run["kl"][best], run["rubric"][-1] - run["rubric"][best]


def spread(values, digits):
    return f"{mean(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def print_tables(records):
    seeds = sorted({run["seed"] for run in records})
    runs = [(method, kl_coef) for method in METHODS for kl_coef in KL_COEFS]

    def part(method, kl_coef=None, seed=None):
        return [
            run
            for run in records
            if run["method"] == method and kl_coef in (None, run["kl_coef"]) and seed in (None, run["seed"])
        ]

    print(f"\nat the end, test posts, temperature 1, mean (range) over seeds {seeds}\n")
    print("| | KL coefficient | KL | rubric | score | win rate |\n|---|---|---|---|---|---|")
    for method, kl_coef in runs:
        found = [run["test"] for run in part(method, kl_coef)]
        keys = ("kl", "rubric", "score", "win_rate")
        cells = [spread([test[key] for test in found], 2 if key == "kl" else 3) for key in keys]
        print(f"| {METHODS[method]} | {kl_coef:g} | " + " | ".join(cells) + " |")
    print(
        "\nDR-PO minus PPO at equal KL, where every seed's lines reach: mean ± half of the 95% interval [bootstrap]\n"
    )
    print("| KL | rubric | score |\n|---|---|---|")
    for kl in AT:
        cells = []
        for key in ("rubric", "score"):
            pairs = [[at_kl(part(method, seed=seed), kl, key) for method in ("ppo", "drpo")] for seed in seeds]
            found = [] if any(None in pair for pair in pairs) else [drpo - ppo for ppo, drpo in pairs]
            middle = "{:+.3f} ± {:.3f}".format(*interval(found)) if found else ""
            cells.append(middle + " [{:+.3f}, {:+.3f}]".format(*bootstrap(found)) if found else "")
        print(f"| {kl:g} | " + " | ".join(cells) + " |")
    print("\nacross the sweep, test posts: the run that ends with the highest rubric, mean (range) over seeds\n")
    print("| | its KL | its rubric | its score | highest score of all |\n|---|---|---|---|---|")
    for method, label in METHODS.items():
        best = [max((run["test"] for run in part(method, seed=s)), key=lambda test: test["rubric"]) for s in seeds]
        score = [max(run["test"]["score"] for run in part(method, seed=s)) for s in seeds]
        cells = [spread([test[key] for test in best], 2 if key == "kl" else 3) for key in ("kl", "rubric", "score")]
        print(f"| {label} | " + " | ".join(cells) + f" | {spread(score, 3)} |")
    if len(seeds) > 1:
        print(
            "\nalong training, validation posts: highest mean rubric of the other seeds, and the change from there to the end\n"
        )
        print("| | KL coefficient | episodes | KL there | change, ± half of the 95% interval |\n|---|---|---|---|---|")
        for method, kl_coef in runs:
            at, kl, change = zip(*losses(part(method, kl_coef)))
            middle = "{:+.3f} ± {:.3f}".format(*interval(change))
            print(f"| {METHODS[method]} | {kl_coef:g} | {spread(at, 0)} | {spread(kl, 2)} | {middle} |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", *METHODS})
        runs = [(method, kl_coef, seed) for seed in args.seeds for kl_coef in KL_COEFS for method in METHODS]
        sweep("KL coefficients", {name_of(*run): command(*run) for run in runs}, args.workers)
        write(OUT, [record(*run) for run in runs], "method", "kl_coef", "seed")
    print_tables(json.loads(OUT.read_text()))
