"""Runs with one thing wrong, to be recognised by their curves; docs/curves.md shows them beside healthy ones.

    python benchmark/failures.py          # 3 seeds, 27 minutes on two cores after seeds.py; goes on where it was stopped
    python benchmark/failures.py --table  # only print the table of failures.json
    python benchmark/plot.py failures     # the figure

On the TL;DR task, ppo.py from every seed's SFT policy and reward model of benchmark/seeds.py (made if missing). The last one
needs another task: a list of one digit without a letter, of which beta = 1 trains the end alone. Two do not fail, and are not in the
figure: short responses that are punished for having no EOS, and a learning rate ten times the default.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import separation
from benchmark.seeds import EVERY, start_of, train
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write

OUT = ROOT / "benchmark/failures.json"
FAILURES = {
    "no KL penalty": ["--kl-coef", 0],
    "no EOS, and a score of 0 for it": ["--response-length", 12, "--missing-eos-score", 0],
    "learning rate a hundred times too high": ["--learning-rate", 3e-2],
    "reward model at chance": [],
    "one token, β = 1": ["--beta", 1],
    "one token, β = 0.5": ["--beta", 0.5],
    "no EOS, at the default score of -1": ["--response-length", 12],
    "learning rate ten times the default": ["--learning-rate", 3e-3],
}


def name_of(failure, seed):
    return f"failures_{seed}_{list(FAILURES).index(failure)}"


def one_token(seed):
    return {"length": 1, "seed": seed, "variant": "bare"}


def chance(seed):
    """The reward model of a seed, not trained."""
    return [
        "reward_model.py",
        *start_of(seed)[0],
        "--learning-rate",
        0,
        "--output-dir",
        f"models/failures_{seed}_chance",
    ]


def command(failure, seed):
    if failure.startswith("one token"):
        script, flags = "drpo.py", ["--dataset", separation.data_of(one_token(seed)), "--seed", seed, "--kl-coef", 0.01]
        flags += ["--sft-path", f"models/{separation.sft_of(one_token(seed))}", "--reset-column", "answer"]
        flags += ["--reward-path", "data/transcription/reward.py", "--eval-rows", 200]
    elif failure == "reward model at chance":
        script, flags = "ppo.py", [*start_of(seed)[0], "--reward-path", f"models/failures_{seed}_chance"]
    else:
        script, flags = "ppo.py", start_of(seed)[1]
    flags = [*flags, *EVERY]
    return [script, *flags, *FAILURES[failure], "--output-dir", f"models/{name_of(failure, seed)}"]


def print_table(records):
    print(
        "\non held-out prompts at the end, temperature 1, mean over seeds\n\n"
        + "| | win rate | rubric | score | KL | length | EOS |\n"
        + "|---" * 7
        + "|"
    )
    for failure in FAILURES:
        part = [run["test"] for run in records if run["failure"] == failure]
        cells = []
        for key in ("win_rate", "rubric", "score", "kl", "length", "eos"):
            found = [test[key] for test in part if key in test]
            cells.append(f"{sum(found) / len(found):.3f}" if found else "")
        print(f"| {failure} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = arguments(__doc__, (1, 2, 3))
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward"})
        separation.train_policies([one_token(seed) for seed in args.seeds], args.workers)
        sweep("reward models at chance", {f"failures_{s}_chance": chance(s) for s in args.seeds}, args.workers)
        runs = [(failure, seed) for seed in args.seeds for failure in FAILURES]
        sweep("failures", {name_of(*run): command(*run) for run in runs}, args.workers)
        found = [{"failure": f, "seed": s, "test": last(name_of(f, s))[0]} | curves(name_of(f, s)) for f, s in runs]
        write(OUT, found, "failure", "seed")
    print_table(json.loads(OUT.read_text()))
