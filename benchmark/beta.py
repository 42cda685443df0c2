"""What beta does, on both tasks: 0 (PPO), 0.25, 0.5, 0.75, 1, each with several seeds. The paper shows one.

    python benchmark/beta.py              # 5 seeds; goes on where it was stopped, writes beta.json
    python benchmark/plot.py beta         # the figure

TL;DR: runs from every seed's SFT policy and reward model of benchmark/seeds.py (made if missing; three of the five are its
own). Transcription: the lists of 8 digits of benchmark/separation.py, read from separation.json, where its seeds are.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import separation
from benchmark.seeds import SEEDS, cell, interval, start_of, train
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write

OUT = ROOT / "benchmark/beta.json"
BETAS = (0, 0.25, 0.5, 0.75, 1)
KNOWN = {0: "ppo", 0.5: "drpo_0.5", 1: "drpo"}  # drpo.py --beta 0 equals ppo.py, number for number
DIGITS = 8


def name_of(beta, seed):
    return f"seeds_{seed}_{KNOWN[beta]}" if beta in KNOWN else f"beta_{seed}_{beta:g}"


def record(beta, seed):
    return {"beta": beta, "seed": seed, "test": last(name_of(beta, seed))[0]} | curves(name_of(beta, seed))


def transcription():
    """beta -> share of right lists at the end, and episodes to half of them, a number for every seed."""
    runs = json.loads(separation.OUT.read_text())
    usual = {"length": DIGITS, "kl_coef": 0.01, "episodes": separation.EPISODES}
    return {beta: separation.of(runs, beta=beta, **usual) for beta in BETAS}


def against(values, others):
    middle, half = interval([one - other for one, other in zip(values, others)])
    return f"{middle:+.3f} ± {half:.3f}"


def print_tables(records):
    names = ("win_rate", "rubric", "score", "kl", "length")
    print(
        "\nTL;DR, test posts, temperature 1; the last columns: minus beta 0 within a seed, mean ± half of the 95% interval\n"
    )
    print(
        "| beta | "
        + " | ".join(names)
        + " | win rate, minus PPO | rubric, minus PPO |\n"
        + "|---" * (len(names) + 3)
        + "|"
    )
    tests = {beta: [run["test"] for run in records if run["beta"] == beta] for beta in BETAS}
    for beta, part in tests.items():
        cells = [cell(name, [test[name] for test in part]) for name in names]
        cells += [against(*([x[name] for x in tests[b]] for b in (beta, 0))) if beta else "" for name in names[:2]]
        print(f"| {beta:g} | " + " | ".join(cells) + " |")
    print(f"\ntranscription of {DIGITS} digits: episodes to 50%, mean (range) over seeds; share right at the end\n")
    print("| beta | |\n|---|---|")
    for beta, part in transcription().items():
        print(f"| {beta:g} | {separation.cell_of(part)} |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", *KNOWN.values()})
        runs = {}
        for seed in args.seeds:
            for beta in set(BETAS) - KNOWN.keys():
                name = name_of(beta, seed)
                runs[name] = ("drpo.py", *start_of(seed)[1], "--beta", beta, "--output-dir", f"models/{name}")
        sweep("beta", runs, args.workers)
        write(OUT, [record(beta, seed) for beta in BETAS for seed in args.seeds], "beta", "seed")
    print_tables(json.loads(OUT.read_text()))
