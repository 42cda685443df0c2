"""What quality costs in KL: rubric and reward-model score against KL to SFT, PPO and DR-PO, on the TL;DR task.

    python benchmark/frontier.py          # 5 seeds x 2 methods x 6 KL coefficients; goes on where it was stopped
    python benchmark/plot.py frontier     # the figure, from frontier.json

Every run starts from its seed's SFT policy and reward model (those of benchmark/seeds.py, made if missing) and is evaluated
along training on validation posts and at its end on 400 test posts, at temperature 1. Methods are compared at equal KL:
a seed's runs, ordered by their KL at the end, are joined by straight lines from SFT on (KL 0), and read where both methods
have a line. The interval is a bootstrap over seeds. Over-optimisation sets in where the rubric of a run begins to fall
for good: the evaluation at which it was highest.
"""

import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.seeds import EVERY, SEEDS, start_of, train
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write

OUT = ROOT / "benchmark/frontier.json"
KL_COEFS, DEFAULT = (0, 0.01, 0.02, 0.05, 0.1, 0.2), 0.05
METHODS = {"ppo": "PPO", "drpo": "DR-PO, β = 1"}
AT = (0.5, 1, 1.5, 2, 3, 4)  # nats a response


def name_of(method, kl_coef, seed):
    return f"seeds_{seed}_{method}" if kl_coef == DEFAULT else f"frontier_{seed}_{method}_{kl_coef:g}"


def command(method, kl_coef, seed):
    name = name_of(method, kl_coef, seed)
    return [f"{method}.py", *start_of(seed)[1], *EVERY, "--kl-coef", kl_coef, "--output-dir", f"models/{name}"]


def record(method, kl_coef, seed):
    name = name_of(method, kl_coef, seed)
    test, sft = last(name)
    return {"method": method, "kl_coef": kl_coef, "seed": seed, "test": test, "sft": sft["rubric"]} | curves(name)


def at_kl(runs, kl, key):
    """Of one seed and method, read at this KL; None where its line does not reach."""
    start = {"kl": 0, "rubric": runs[0]["sft"]}
    points = sorted(
        (point["kl"], point[key]) for point in ([start] if key == "rubric" else []) + [r["test"] for r in runs]
    )
    x, y = zip(*points)
    return float(np.interp(kl, x, y)) if x[0] <= kl <= x[-1] else None


def bootstrap(values, draws=10_000):
    """95% interval of the mean."""
    drawn = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    return np.quantile(drawn, [0.025, 0.975])


def peak(run):
    """Episodes, KL and rubric where the rubric of a run was highest."""
    best = int(np.argmax(run["rubric"]))
    return run["at"][best], run["kl"][best], run["rubric"][best]


def spread(values, digits):
    return f"{mean(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def print_tables(records):
    seeds = sorted({run["seed"] for run in records})
    print(f"\nat the end, test posts, temperature 1, mean (range) over seeds {seeds}\n")
    print("| | KL coefficient | KL | rubric | score | win rate |\n|---|---|---|---|---|---|")
    for method, label in METHODS.items():
        for kl_coef in KL_COEFS:
            part = [run["test"] for run in records if (run["method"], run["kl_coef"]) == (method, kl_coef)]
            cells = [
                spread([test[key] for test in part], 2 if key == "kl" else 3)
                for key in ("kl", "rubric", "score", "win_rate")
            ]
            print(f"| {label} | {kl_coef:g} | " + " | ".join(cells) + " |")
    print("\nDR-PO minus PPO at equal KL, mean [95% interval, bootstrap over seeds], where every seed's lines reach\n")
    print("| KL | rubric | score |\n|---|---|---|")
    for kl in AT:
        cells = []
        for key in ("rubric", "score"):
            values = []
            for seed in seeds:
                lines = [[r for r in records if (r["method"], r["seed"]) == (method, seed)] for method in METHODS]
                values.append([at_kl(line, kl, key) for line in lines])
            if any(None in pair for pair in values):
                cells.append("")
            else:
                found = [drpo - ppo for ppo, drpo in values]
                low, high = bootstrap(found)
                cells.append(f"{mean(found):+.3f} [{low:+.3f}, {high:+.3f}]")
        print(f"| {kl:g} | " + " | ".join(cells) + " |")
    print("\nwhere the rubric on validation posts is highest in training, mean (range) over seeds\n")
    print("| | KL coefficient | episodes | KL there | rubric there | rubric at the end |\n|---|---|---|---|---|---|")
    for method, label in METHODS.items():
        for kl_coef in KL_COEFS:
            part = [run for run in records if (run["method"], run["kl_coef"]) == (method, kl_coef)]
            cells = [spread(found, digits) for found, digits in zip(zip(*map(peak, part)), (0, 2, 3))]
            print(
                f"| {label} | {kl_coef:g} | " + " | ".join(cells) + f" | {spread([r['rubric'][-1] for r in part], 3)} |"
            )


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", *METHODS})
        runs = [(method, kl_coef, seed) for seed in args.seeds for kl_coef in KL_COEFS for method in METHODS]
        sweep("KL coefficients", {name_of(*run): command(*run) for run in runs}, args.workers)
        write(OUT, [record(*run) for run in runs], "method", "kl_coef", "seed")
    print_tables(json.loads(OUT.read_text()))
