"""Online DPO and XPO where the start policy hardly ever does the right thing; and how XPO depends on alpha and beta.

    python benchmark/coverage.py               # 5 seeds; goes on where it was stopped, writes coverage.json
    python benchmark/coverage.py --table       # only print the tables of coverage.json
    python benchmark/plot.py coverage          # the figure

Coverage: lists of 4, 6 and 8 digits, of which the SFT policy starts each right with probability 0.3 (data/transcription, SFT
policies as in benchmark/separation.py), and of 4 digits where it does with 0.1; the share of right copies of 200 validation lists
(of 4 digits a third are among those trained on, of 6 one in 200) against the sampled answers. XPO's alpha of 0.01 was chosen by one
run with 8 digits; it stays, or falls to 0 within the first 5 of 10 rounds. At 6 digits also with the samples of the paper's Algorithm 1: one
answer each from the policy and from the SFT policy.

The JSON has the KL, tokens an answer and pairs so far along training too.

The sweep: three seeds, 5,120 answers; TL;DR, judged on the test posts, and lists of 6 digits, on the validation lists.
"""

import itertools
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import separation
from benchmark.seeds import SEEDS, start_of, train
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write

OUT = ROOT / "benchmark/coverage.json"
COVERED, LISTS, EPISODES = ((4, 0.3), (4, 0.1), (6, 0.3), (8, 0.3)), 6, 10_240  # digits, probability that one is right
CONSTANT = ["--alpha-rounds", 1_000_000]
FALLING = ["--alpha-rounds", 5]
BONUS, BETA = ["--alpha", 0.01], 0.1  # of the coverage runs
ALGORITHM_1 = ["--samples-per-prompt", 2, "--prompts-per-round", 512, "--second-reference", "--second-temperature", 1]
METHODS = {  # name -> title, script, flags
    "online_dpo": ("online DPO", "online_dpo.py", []),
    "xpo": ("XPO, α constant", "xpo.py", [*BONUS, *CONSTANT]),
    "xpo_falling": ("XPO, α falling", "xpo.py", [*BONUS, *FALLING]),
    "xpo_reference": ("XPO, Algorithm 1, α constant", "xpo.py", [*BONUS, *CONSTANT, *ALGORITHM_1]),
    "xpo_reference_falling": ("XPO, Algorithm 1, α falling", "xpo.py", [*BONUS, *FALLING, *ALGORITHM_1]),
}
SCHEDULES = {"paper": [], "0.01, 3 rounds": ["--alpha", 0.01, "--alpha-rounds", 3]}  # the others are constant
GRID = {  # task -> betas, alphas; "paper": 1e-5, 5e-6, 0
    "tldr": ((0.5, 2.0, 5.0), (0, 0.001, 0.01, 0.1)),  # "paper" is the XPO of benchmark/relatives.py
    "lists": ((0.1, 0.5, 2.0), (0, "paper", 0.0001, 0.001, 0.01, "0.01, 3 rounds", 0.1)),
}
SWEEP_SEEDS, SWEEP_EPISODES = (1, 2, 3), 5_120
KEYS = "part", "length", "right", "method", "beta", "alpha", "seed"


def setting_of(length, right, seed):
    """As benchmark/separation.py has them."""
    return {"length": length, "seed": seed} | ({} if right == 0.3 else {"right": right})


def of_lists(length, right, seed):
    """Flags for lists, from their SFT policy."""
    setting = setting_of(length, right, seed)
    flags = ["--dataset", separation.data_of(setting), "--sft-path", f"models/{separation.sft_of(setting)}"]
    return [*flags, "--reward-path", "data/transcription/reward.py", "--seed", seed, "--eval-rows", 200]


def coverage_runs(seeds):
    """Run -> what it is and its command."""
    for seed in seeds:
        for length, right in COVERED:
            for method, (_, script, own) in METHODS.items():
                if "reference" in method and length != LISTS:
                    continue
                name = f"coverage_{length}_{right}_{method}_{seed}"
                flags = [*of_lists(length, right, seed), "--beta", BETA, *own, "--total-episodes", EPISODES]
                flags += ["--output-dir", f"models/{name}", "--eval-every", 16]
                what = {"part": "coverage", "length": length, "right": right, "method": method, "seed": seed}
                yield name, what, [script, *flags]


def sweep_runs(seeds):
    for seed in seeds:
        for task, (betas, alphas) in GRID.items():
            for beta, alpha in itertools.product(betas, alphas):
                name = f"xpo_{task}_{beta}_{alpha}_{seed}".replace(", 3 rounds", "_3")
                flags = start_of(seed)[1] if task == "tldr" else of_lists(LISTS, 0.3, seed)
                flags = [*flags, "--beta", beta, *SCHEDULES.get(alpha, ["--alpha", alpha, *CONSTANT])]
                flags += ["--total-episodes", SWEEP_EPISODES, "--output-dir", f"models/{name}", "--eval-every", 16]
                yield name, {"part": task, "beta": beta, "alpha": str(alpha), "seed": seed}, ["xpo.py", *flags]


def record(name, what):
    """Along training: the share of right copies, or the rubric, and the pairs so far; at the end what the test split says."""
    test, log = last(name)[0], curves(name, "pairs")
    what = what | {"kl": log["kl"], "tokens": log["length"], "pairs": log["pairs"]}
    if what["part"] == "tldr":
        numbers = {key: test[key] for key in ("win_rate", "rubric", "score", "kl")}
        return what | {"at": log["at"], "success": log["rubric"], "test": numbers}
    at, success = separation.success(name)
    return what | {"at": at, "success": success, "test": {"kl": test["kl"]}}


def print_tables(records):
    ends = {}
    for run in records:
        ends.setdefault((run.get("length"), run.get("right"), run.get("method")), []).append(run["success"][-1])
    print(f"\nshare of held-out lists copied right after {EPISODES:,} sampled answers: mean (range) over seeds\n")
    titles = [title for title, *_ in METHODS.values()]
    print("| digits, chance | " + " | ".join(titles) + " |\n" + "|---" * (len(titles) + 1) + "|")
    for n, right in COVERED:
        found = [ends.get((n, right, method)) for method in METHODS]
        cells = [f"{mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" if x else "" for x in found]
        print(f"| {n}, {right}^{n} = {right**n:.1g} | " + " | ".join(cells) + " |")
    titles = {
        "tldr": "TL;DR, 400 test posts: win rate %, mean (range), KL",
        "lists": f"lists of {LISTS} digits, 200 validation lists: % right, mean (range), KL",
    }
    for task, title in titles.items():
        betas, alphas = GRID[task]
        print(f"\n{title}\n\n| beta | " + " | ".join(f"α {alpha}" for alpha in alphas) + " |")
        print("|---" * (len(alphas) + 1) + "|")
        for beta in betas:
            cells = []
            for alpha in alphas:
                wanted = {"part": task, "beta": beta, "alpha": str(alpha)}
                runs = [run for run in records if wanted.items() <= run.items()]
                good = [100 * (run["test"]["win_rate"] if task == "tldr" else run["success"][-1]) for run in runs]
                kl = [run["test"]["kl"] for run in runs]
                middle = f"{mean(good):.1f} ({min(good):.1f} to {max(good):.1f}), {mean(kl):.1f}" if runs else ""
                cells.append(middle)
            print(f"| {beta:g} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        few = [seed for seed in args.seeds if seed in SWEEP_SEEDS]
        train(few, args.workers, {"sft", "reward"})
        separation.train_policies([setting_of(*kind, s) for kind in COVERED for s in args.seeds], args.workers)
        for title, runs in (("coverage", [*coverage_runs(args.seeds)]), ("alpha and beta", [*sweep_runs(few)])):
            sweep(title, {name: run for name, _, run in runs}, args.workers)
            write(OUT, [dict.fromkeys(KEYS) | record(name, what) for name, what, _ in runs], *KEYS)
    print_tables(json.loads(OUT.read_text()))
