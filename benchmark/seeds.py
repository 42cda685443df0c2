"""The whole chain of the TL;DR task over seeds, each from scratch: SFT, reward model, DPO, PPO, DR-PO, judged; README's tables.

    python benchmark/seeds.py                # 5 seeds; goes on where it was stopped, writes seeds.json and curves.json
    python benchmark/seeds.py --table        # only print the tables of seeds.json

Every number is the mean over seeds ± the standard deviation over seeds. A seed's policies share its SFT policy and its
reward model, and most of what differs between seeds is those two: methods are therefore compared within seeds, as the mean
of the seeds' differences to PPO with its 95% interval (Student's t over seeds).
"""

import json
import shutil
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.sweep import ROOT, arguments, curves, sweep, write

OUT, CURVES = ROOT / "benchmark/seeds.json", ROOT / "benchmark/curves.json"
SEEDS = (1, 2, 3, 4, 5)
POLICIES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "drpo_0.5": "DR-PO, β = 0.5", "drpo": "DR-PO, β = 1"}
# split, sampling temperature of the completions: as in training, and the official code's 0.01
TABLES = [("test", "1.0"), ("test", "0.01"), ("shifted", "1.0"), ("shifted", "0.01")]
ENDS = {"sft": ["loss"], "reward": ["loss", "accuracy"], "dpo": ["loss", "accuracy", "logprobs/chosen"]}
ENDS |= {name: ["win_rate", "rubric", "score", "kl", "length"] for name in ("ppo", "drpo_0.5", "drpo")}
EVERY = ["--eval-every", 5]  # for curves twice as fine as by default
PERCENT = {"win_rate", "length_matched", "rouge1", "rouge2", "rougeL", "eos"}
T_975 = dict(zip(range(2, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)))  # by number of seeds


def start_of(seed):
    """Flags of everything that starts from a seed's SFT policy, and of what needs its reward model too."""
    sft = ["--seed", seed, "--sft-path", f"models/seeds_{seed}/sft"]
    return sft, [*sft, "--reward-path", f"models/seeds_{seed}/reward"]


def stages(seeds):
    """[(title, run -> script and flags)], each stage needs the one before it."""
    found = [{}, {}, {}, {}]
    for seed in seeds:
        sft, rl = start_of(seed)
        commands = [("sft", "sft.py", ["--seed", seed])]
        commands += [("reward", "reward_model.py", sft), ("dpo", "dpo.py", sft), ("ppo", "ppo.py", rl + EVERY)]
        commands += [("drpo", "drpo.py", rl + EVERY), ("drpo_0.5", "drpo.py", [*rl, *EVERY, "--beta", 0.5])]
        for name, script, flags in commands:
            stage = {"sft": 0, "reward": 1, "dpo": 1}.get(name, 2)
            found[stage][f"seeds_{seed}_{name}"] = (script, *flags, "--output-dir", f"models/seeds_{seed}/{name}")
        policies = ["--policies", *(f"models/seeds_{seed}/{name}" for name in POLICIES)]
        for split, temperature in TABLES:
            flags = [*policies, *rl, "--split", split, "--temperature", temperature]
            found[3][judged(seed, split, temperature)] = ("judge.py", *flags)
    return list(zip(("SFT", "reward model, DPO", "RL", "judge"), found))


def judged(seed, split, temperature):
    return f"seeds_{seed}_judge_{split}_{temperature}"


def train(seeds, workers, names):
    """Some of the chain's models, for the sweeps that start from them."""
    for title, runs in stages(seeds)[:3]:
        sweep(title, {run: runs[run] for run in runs if run.split("_", 2)[2] in names}, workers)


def result(name):
    path = ROOT / f"runs/{name}/result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def collect(seeds):
    """What the judge and the reward models' own tests found, one record a seed."""
    for seed in seeds:
        found = {"seed": seed, "reward": result(f"seeds_{seed}_reward")}
        for table in TABLES:
            results = result(judged(seed, *table))
            found["_".join(table)] = {name: results[f"models/seeds_{seed}/{name}"] for name in POLICIES}
        yield found


def cell(name, values):
    """Mean ± standard deviation over seeds; shares in percent."""
    if None in values:
        return "-"
    scale, digits = (100, 1) if name in PERCENT else (1, 1 if name == "length" else 3)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def interval(differences):
    """Mean and half the width of its 95% interval."""
    half = (
        T_975[len(differences)] * stdev(differences) / sqrt(len(differences)) if len(differences) > 1 else float("nan")
    )
    return mean(differences), half


def table(rows):
    """Markdown: rows maps a label to one dict of numbers per seed."""
    columns = [
        name for name, value in next(iter(rows.values()))[0].items() if "interval" not in name and name != "length_bins"
    ]
    titles = [name.replace("_", " ") + " %" * (name in PERCENT) for name in columns]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, results in rows.items():
        cells = [cell(column, [result[column] for result in results]) for column in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(rows):
    """Markdown: every policy minus PPO within a seed, mean ± half of the 95% interval, in points and in rubric."""
    lines = ["| minus PPO | win rate, points | rubric | reward-model score |", "|---|---|---|---|"]
    for label, results in rows.items():
        cells = []
        for name, scale, digits in (("win_rate", 100, 1), ("rubric", 1, 3), ("score", 1, 3)):
            pairs = zip(results, rows["PPO"])
            middle, half = interval([scale * (one[name] - other[name]) for one, other in pairs])
            cells.append(f"{middle:+.{digits}f} ± {half:.{digits}f}")
        lines += [f"| {label} | " + " | ".join(cells) + " |"] if label != "PPO" else []
    return "\n".join(lines)


def print_tables(records):
    print(f"\nseeds {', '.join(str(record['seed']) for record in records)}")
    for split, temperature in TABLES:
        rows = {label: [x[f"{split}_{temperature}"][name] for x in records] for name, label in POLICIES.items()}
        print(f"\n{split}, temperature {temperature}\n\n{table(rows)}\n\n{differences(rows)}")
    rewards = [record["reward"] for record in records]
    print("\n" + table({f"reward model, {name}": [found[name] for found in rewards] for name in rewards[0]}))


def print_ends(records):
    """What every script logs last on its validation split."""
    print("\n| run | evaluated | what it ends with, mean ± standard deviation over seeds |\n|---|---|---|")
    for name, keys in ENDS.items():
        runs = [record for record in records if record["run"] == name]
        ends = [f"`eval/{key}` {cell('', [run[key][-1] for run in runs])}" for key in keys]
        print(f"| {name} | {len(runs[0]['at'])} times | {', '.join(ends)} |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        for title, runs in stages(args.seeds):
            if title == "judge":  # a table of an earlier time may lack a policy; what was generated for it is kept
                for run in runs:
                    policies = {path.split("/")[-1] for path in result(run)}
                    if policies and not policies >= set(POLICIES):
                        shutil.rmtree(ROOT / f"runs/{run}")
            sweep(title, runs, args.workers)
        write(OUT, collect(args.seeds), "seed")
        names = ["sft", "reward", *list(POLICIES)[1:]]
        write(
            CURVES,
            [{"run": name, "seed": s} | curves(f"seeds_{s}_{name}") for name in names for s in args.seeds],
            "run",
            "seed",
        )
    print_tables(json.loads(OUT.read_text()))
    print_ends(json.loads(CURVES.read_text()))
