"""Every method of this repository in one table, on both tasks, from each seed's own SFT policy and reward model.

    python benchmark/relatives.py              # 5 seeds; goes on where it was stopped, writes relatives.json
    python benchmark/relatives.py --table      # only print the tables of relatives.json

TL;DR: all start from the models of benchmark/seeds.py (made if missing). Transcription, 8 digits: the reward is the rule, the
pairs of DPO are a right copy and what a writer made of the same list, the reward model is fitted to these pairs and only shown.
Whoever samples does so 5,120 times (rejection sampling 5,112). DPO, LN-DPO and ExPO sample nothing, they read 4,000 pairs. On the lists
not all have seen the same: DPO's pairs, and with them ExPO and RTO, and DR-PO's resets know right copies; the others are told by the reward alone.
What is not a default there: LISTS.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import separation, true_reward
from benchmark.seeds import SEEDS, cell, interval, result, train
from benchmark.sweep import ROOT, arguments, sweep, write

OUT = ROOT / "benchmark/relatives.json"
TASKS, TEMPERATURES = ("tldr", "transcription"), ("1.0", "0.01")
ONE_STEP = ["--num-steps", 1, "--prompts-per-step", 639, "--updates-per-step", 120]  # as much as in three steps
METHODS = {  # key -> title, script, flags
    "sft": ("SFT", "sft.py", []),
    "dpo": ("DPO", "dpo.py", []),
    "dpo_ln": ("LN-DPO", "dpo_ln.py", []),
    "expo": ("ExPO, from DPO, α = 0.3", "expo.py", ["--alphas", 0.3]),
    "rso": ("RSO", "rejection_sampling.py", ONE_STEP),
    "rejection_sampling": ("rejection sampling, 3 steps", "rejection_sampling.py", []),
    "online_dpo": ("online DPO", "online_dpo.py", []),
    "xpo": ("XPO", "xpo.py", []),
    "ppo": ("PPO", "ppo.py", []),
    "rto": ("RTO", "rto.py", []),
    "drpo_0.5": ("DR-PO, β = 0.5", "drpo.py", ["--beta", 0.5]),
    "drpo": ("DR-PO, β = 1", "drpo.py", ["--beta", 1]),
}
PAIRS = ("dpo", "dpo_ln")
RL = ["--kl-coef", 0.01]
LISTS = {  # script -> flags for a reward of 0 or 1, which is small beside the scores of a reward model
    "ppo.py": RL,
    "rto.py": RL,
    "drpo.py": [*RL, "--reset-column", "answer"],
    "online_dpo.py": ["--beta", 0.1],
    "xpo.py": ["--beta", 0.1, "--alpha", 0.01, "--alpha-rounds", 1_000_000],
    "rejection_sampling.py": ["--eta", 0.5],
}


def name_of(task, method, seed):
    """Of the run; models/NAME is its policy."""
    return f"seeds_{seed}_{method}" if task == "tldr" else f"relatives_{method}_{seed}"


def model_of(task, method, seed):
    if task == "transcription" and method == "sft":
        return f"models/{separation.sft_of(true_reward.sft_setting(seed))}"
    folder = f"models/seeds_{seed}/{method}" if task == "tldr" else f"models/{name_of(task, method, seed)}"
    return f"{folder}/alpha_0.3" if method == "expo" else folder


def reward_of(task, seed):
    return f"models/seeds_{seed}/reward" if task == "tldr" else f"models/true_reward_{seed}"


def command(task, method, seed):
    _, script, flags = METHODS[method]
    lists, sft = task == "transcription", model_of(task, "sft", seed)
    flags = [*flags, "--sft-path", sft]
    if method == "expo":
        folder = str(Path(model_of(task, method, seed)).parent)
        return [script, *flags, "--aligned-path", model_of(task, "dpo", seed), "--sweep-dir", folder]
    flags += ["--seed", seed, "--output-dir", model_of(task, method, seed)]
    if method in PAIRS:
        return [script, *flags, *(["--dataset", f"{true_reward.DATA}/pairs"] * lists)]
    if method == "rto":
        flags += ["--dpo-path", model_of(task, "dpo", seed)]
    flags += ["--reward-path", "data/transcription/reward.py" if lists else reward_of(task, seed)]
    more = [*LISTS[script], "--dataset", f"{true_reward.DATA}/task", "--eval-rows", 200] if lists else []
    return [script, *flags, *more]


def judged(task, seed, temperature):
    return f"relatives_{seed}_judge_{task}_{temperature}"


def judge_command(task, seed, temperature):
    policies = [model_of(task, method, seed) for method in METHODS]
    flags = ["--policies", *policies, "--sft-path", model_of(task, "sft", seed), "--reward-path", reward_of(task, seed)]
    flags += ["--seed", seed, "--temperature", temperature]
    return ["judge.py", *flags, *(["--dataset", f"{true_reward.DATA}/task"] * (task == "transcription"))]


def spent(name):
    """Tokens that a run sampled to train on, and the seconds that its updates took, evaluations and other runs aside."""
    path = ROOT / f"runs/{name}/metrics.jsonl"
    if not path.exists():  # of ExPO, which does not train; of the lists' SFT
        return {"tokens": None, "seconds": None}
    lines = list(map(json.loads, path.read_text().splitlines()))
    tokens = sum(line.get("time/rollout", 0) * line.get("time/tokens_per_second", 0) for line in lines)
    seconds = sum(line.get(f"time/{part}", 0) for line in lines for part in ("rollout", "score", "optimise", "update"))
    return {"tokens": round(tokens), "seconds": round(seconds, 1)}


def record(task, method, seed):
    found = {"task": task, "method": method, "seed": seed}
    for temperature in TEMPERATURES:
        row = result(judged(task, seed, temperature))[model_of(task, method, seed)]
        row = {key: row[key] for key in ("win_rate", "rubric", "score", "kl", "length", "eos")}
        if task == "transcription":  # the reference is the right copy, which nothing else ties with
            row["rubric"], row["win_rate"] = 2 * row["win_rate"], None
        found[temperature] = {key: value if value is None else round(value, 4) for key, value in row.items()}
    return found | spent(name_of(task, method, seed))


def print_tables(records):
    for task in TASKS:
        part = [run for run in records if run["task"] == task]
        seeds = sorted({run["seed"] for run in part})
        print(f"\n{task}, seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds\n")
        quality = "rubric" if task == "tldr" else "right copies"
        columns = [("1.0", "rubric"), ("0.01", "rubric"), *((t, "win_rate") for t in TEMPERATURES if task == "tldr")]
        columns += [("1.0", "score"), ("1.0", "kl"), ("1.0", "length"), ("1.0", "eos")]
        titles = [f"{key.replace('rubric', quality).replace('_', ' ')}, T {float(t):g}" for t, key in columns]
        print("| | " + " | ".join([*titles, "sampled tokens", "seconds"]) + " |")
        print("|---" * (len(columns) + 3) + "|")
        for method, (title, *_) in METHODS.items():
            runs = [run for run in part if run["method"] == method]
            cells = [cell(key, [run[temperature][key] for run in runs]) for temperature, key in columns]
            for key in ("tokens", "seconds"):
                found = [run[key] for run in runs]
                cells.append("-" if None in found else f"{mean(found):,.0f}")
            print(f"| {title} | " + " | ".join(cells) + " |")
        print(
            "\n| minus PPO within a seed, mean ± half of the 95% interval | "
            + " | ".join(titles[:2])
            + " |\n|---|---|---|"
        )
        ppo = [run for run in part if run["method"] == "ppo"]
        for method, (title, *_) in METHODS.items():
            runs, cells = [run for run in part if run["method"] == method], []
            for temperature, key in columns[:2]:
                pairs = zip(runs, ppo)
                found = [run[temperature][key] - other[temperature][key] for run, other in pairs]
                cells.append("{:+.3f} ± {:.3f}".format(*interval(found)))
            if method != "ppo":
                print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", "dpo", "ppo", "drpo", "drpo_0.5"})
        true_reward.train_start(args.seeds, args.workers)
        known = {f"seeds_{seed}_{name}" for seed in args.seeds for name in ("sft", "dpo", "ppo", "drpo", "drpo_0.5")}
        for later in (False, True):  # rto.py and expo.py read the DPO policy
            runs = [(task, method, seed) for task in TASKS for seed in args.seeds for method in METHODS]
            runs = [run for run in runs if run[1] not in ("sft", "expo") and (run[1] == "rto") == later]
            runs = {name_of(*run): command(*run) for run in runs if name_of(*run) not in known}
            sweep("relatives", runs, args.workers)
        for task, seed in ((task, seed) for task in TASKS for seed in args.seeds):
            if not (ROOT / model_of(task, "expo", seed) / "config.json").exists():  # seconds
                command_line = [sys.executable, *map(str, command(task, "expo", seed))]
                subprocess.run(command_line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        tables = [(task, seed, temperature) for task in TASKS for seed in args.seeds for temperature in TEMPERATURES]
        for table in tables:  # a table of an earlier time may lack a policy; what was generated for it is kept
            if result(judged(*table)).keys() != {model_of(*table[:1], method, table[1]) for method in METHODS}:
                shutil.rmtree(ROOT / f"runs/{judged(*table)}", ignore_errors=True)
        sweep("judge", {judged(*table): judge_command(*table) for table in tables}, args.workers)
        runs = [(task, method, seed) for task in TASKS for method in METHODS for seed in args.seeds]
        write(OUT, [record(*run) for run in runs], "task", "method", "seed")
    print_tables(json.loads(OUT.read_text()))
