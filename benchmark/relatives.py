"""Every method of this repository in one table, on both tasks, from each seed's own SFT policy and reward model.

    python benchmark/relatives.py              # 5 seeds; goes on where it was stopped, writes relatives.json
    python benchmark/relatives.py --table      # only print the tables of relatives.json

TL;DR: what `python benchmark/seeds.py --relatives all` trains and judges (made if missing). Transcription, 8 digits: the reward is the rule, the
pairs of DPO are a right copy and what a writer made of the same list, the reward model is fitted to these pairs and only shown.
Whoever samples does so 5,120 times (rejection sampling 5,112). DPO, LN-DPO, ExPO and offline sample nothing, they read 4,000 pairs. On
the lists not all have seen the same: DPO's pairs, and with them ExPO, RTO, hybrid and offline, and DR-PO's resets know right copies;
the others are told by the reward alone. Updates, each of 64 rows: DPO and LN-DPO 62, online DPO, XPO and offline 80, hybrid 96, rejection sampling
120, PPO, RTO and DR-PO 320. RTO's seconds leave out its DPO policy.
What is not a default there: LISTS.
"""

import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import seeds as tldr
from benchmark import separation, true_reward
from benchmark.seeds import POLICIES, SEEDS, cell, extrapolate, interval, result
from benchmark.sweep import ROOT, arguments, sweep, write

OUT = ROOT / "benchmark/relatives.json"
TASKS, TEMPERATURES = ("tldr", "transcription"), ("1.0", "0.01")
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
    """Of the run."""
    return f"seeds_{seed}_{method}" if task == "tldr" else f"relatives_{method}_{seed}"


def model_of(task, method, seed):
    if task == "tldr":
        return tldr.model_of(method, seed)
    if method == "sft":
        return f"models/{separation.sft_of(true_reward.sft_setting(seed))}"
    return f"models/{name_of(task, method, seed)}" + "/alpha_0.3" * (method == "expo")


def command(method, seed):
    """On transcription, all but SFT."""
    _, script, flags = POLICIES[method]
    sft, dpo = (model_of("transcription", name, seed) for name in ("sft", "dpo"))
    flags = [*flags, "--sft-path", sft]
    if method == "expo":
        return [script, *flags, "--aligned-path", dpo, "--sweep-dir", f"models/relatives_expo_{seed}"]
    flags += ["--seed", seed, "--output-dir", model_of("transcription", method, seed)]
    if method in PAIRS:
        return [script, *flags, "--dataset", f"{true_reward.DATA}/pairs"]
    flags += ["--dpo-path", dpo] if method == "rto" else []
    flags = [f"{true_reward.DATA}/pairs" if flag == tldr.PAIRS[1] else flag for flag in flags]
    flags += ["--reward-path", "data/transcription/reward.py", "--dataset", f"{true_reward.DATA}/task"]
    return [script, *flags, *LISTS[script], "--eval-rows", 200]


def judged(task, seed, temperature):
    return tldr.judged(seed, "test", temperature) if task == "tldr" else f"relatives_{seed}_judge_{temperature}"


def judge_command(seed, temperature):
    """On transcription, whose reward model is only shown."""
    policies = [model_of("transcription", method, seed) for method in POLICIES]
    flags = ["--policies", *policies, "--sft-path", model_of("transcription", "sft", seed), "--seed", seed]
    flags += ["--reward-path", f"models/true_reward_{seed}", "--dataset", f"{true_reward.DATA}/task"]
    return ["judge.py", *flags, "--temperature", temperature]


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
    return found | spent(name_of(task, method, seed)) | accepted(name_of(task, method, seed))


def accepted(name):
    """Of rejection sampling: what its steps accepted, [{"step", "eta", "rate", "effective", "score", "control", "pairs"}]."""
    path = ROOT / f"runs/{name}/metrics.jsonl"
    lines = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    steps = {line["step"]: line for line in lines if "accept/rate" in line}.values()
    keys = {key: f"accept/{key}" for key in ("rate", "effective", "score", "control")} | {"pairs": "pairs/used"}
    found = [
        {"step": x["step"], "eta": x["eta"]} | {name: round(x[key], 4) for name, key in keys.items()} for x in steps
    ]
    return {"steps": found} if found else {}


def print_tables(records):
    for task in TASKS:
        part = [run for run in records if run["task"] == task]
        seeds = sorted({run["seed"] for run in part})
        known = {name: title for name, (title, *_) in POLICIES.items() if any(run["method"] == name for run in part)}
        print(f"\n{task}, seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds\n")
        quality = "rubric" if task == "tldr" else "right copies"
        columns = [("1.0", "rubric"), ("0.01", "rubric"), *((t, "win_rate") for t in TEMPERATURES if task == "tldr")]
        columns += [("1.0", "score"), ("1.0", "kl"), ("1.0", "length"), ("1.0", "eos")]
        titles = [f"{key.replace('rubric', quality).replace('_', ' ')}, T {float(t):g}" for t, key in columns]
        print("| | " + " | ".join([*titles, "sampled tokens", "seconds"]) + " |")
        print("|---" * (len(columns) + 3) + "|")
        for method, title in known.items():
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
        ppo = {run["seed"]: run for run in part if run["method"] == "ppo"}
        for method, title in known.items():
            runs, cells = [run for run in part if run["method"] == method], []
            for temperature, key in columns[:2]:
                found = [run[temperature][key] - ppo[run["seed"]][temperature][key] for run in runs]
                cells.append("{:+.3f} ± {:.3f}".format(*interval(found)))
            if method != "ppo":
                print(f"| {title} | " + " | ".join(cells) + " |")


def print_steps(records):
    print("\nwhat rejection sampling accepted, TL;DR: mean ± standard deviation over seeds\n")
    print(
        "| | step | eta | accepted | worth, of 8 | score of the accepted | of as many at random | pairs |\n"
        + "|---" * 8
        + "|"
    )
    for method in ("rso", "rejection_sampling"):
        runs = [run["steps"] for run in records if (run["task"], run["method"]) == ("tldr", method) and "steps" in run]
        for steps in zip(*runs):
            cells = [f"{steps[0]['step']} | {steps[0]['eta']:.3g}"]
            for key in ("rate", "effective", "score", "control", "pairs"):
                cells.append(cell({"rate": "eos", "pairs": "length"}.get(key, key), [step[key] for step in steps]))
            print(f"| {POLICIES[method][0]} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        tldr.train(args.seeds, args.workers, {"reward", *POLICIES})
        tldr.judge(args.seeds, args.workers, POLICIES)
        true_reward.train_start(args.seeds, args.workers)
        for later in (False, True):  # rto.py reads the DPO policy
            methods = [name for name in POLICIES if name not in ("sft", "expo") and (name == "rto") == later]
            runs = {name_of("transcription", m, seed): command(m, seed) for seed in args.seeds for m in methods}
            sweep("lists", runs, args.workers)
        for seed in args.seeds:
            extrapolate(model_of("transcription", "expo", seed), command("expo", seed))
        tables = [(seed, temperature) for seed in args.seeds for temperature in TEMPERATURES]
        sweep("judge", {judged("transcription", *t): judge_command(*t) for t in tables}, args.workers)
        runs = [(task, method, seed) for task in TASKS for method in POLICIES for seed in args.seeds]
        write(OUT, [record(*run) for run in runs], "task", "method", "seed")
    records = json.loads(OUT.read_text())
    print_tables(records)
    print_steps(records)
