"""The whole chain over seeds: sft, reward_model, dpo, ppo, drpo, each seed from scratch, judged; the README's tables.

    python benchmark/seeds.py --seeds 1 2 3            # about 6 minutes a seed on two cores
    python benchmark/seeds.py --seeds 1 2 3 --table    # only print the tables of finished runs

Every number is the mean over seeds with the standard deviation over seeds behind it. Results stay in
runs/seeds_<seed>_<name>/result.json; a finished run is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
POLICIES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "drpo": "DR-PO"}
# split, sampling temperature of the completions: the official code's 0.01, and 1.0 as in training
TABLES = [("test", "0.01"), ("shifted", "0.01"), ("test", "1.0"), ("shifted", "1.0")]
PERCENT = {"win_rate", "length_matched", "rouge1", "rouge2", "rougeL", "eos"}


def commands(seed):
    """name -> (script, flags); models of one seed live in models/seeds_<seed>/."""
    models = f"models/seeds_{seed}"
    sft, reward = ["--sft-path", f"{models}/sft"], ["--reward-path", f"{models}/reward"]
    found = {
        "sft": ("sft.py", []),
        "reward": ("reward_model.py", sft),
        "dpo": ("dpo.py", sft),
        "ppo": ("ppo.py", sft + reward),
        "drpo": ("drpo.py", sft + reward),
    }
    found = {name: (script, ["--output-dir", f"{models}/{name}", *flags]) for name, (script, flags) in found.items()}
    policies = ["--policies", *(f"{models}/{name}" for name in POLICIES)]
    for split, temperature in TABLES:
        flags = policies + sft + reward + ["--split", split, "--temperature", temperature]
        found[f"judge_{split}_{temperature}"] = ("judge.py", flags)
    return found


def run_seed(seed):
    for name, (script, flags) in commands(seed).items():
        run = f"seeds_{seed}_{name}"
        done = ROOT / f"runs/{run}/result.json" if script == "judge.py" else ROOT / f"models/seeds_{seed}/{name}"
        if done.exists():
            continue
        command = [sys.executable, script, "--seed", str(seed), "--run-name", run, *flags]
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command, cwd=ROOT, env={"OMP_WAIT_POLICY": "passive", **os.environ}).returncode != 0:
            sys.exit(f"{script} failed for seed {seed}; remove runs/{run} before the next try")


def load(seed, name):
    return json.loads((ROOT / f"runs/seeds_{seed}_{name}/result.json").read_text())


def cell(name, values):
    """Mean ± standard deviation over seeds; shares in percent."""
    if None in values:
        return "-"
    scale, digits = (100, 1) if name in PERCENT else (1, 1 if name == "length" else 3)
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="do not run anything")
    args = parser.parse_args()
    for seed in args.seeds if not args.table else ():
        run_seed(seed)
    for split, temperature in TABLES:
        results = {seed: load(seed, f"judge_{split}_{temperature}") for seed in args.seeds}
        rows = {POLICIES[name]: [results[s][f"models/seeds_{s}/{name}"] for s in args.seeds] for name in POLICIES}
        print(f"{split}, temperature {temperature}\n\n{table(rows)}\n")
    reward = [load(seed, "reward") for seed in args.seeds]
    print(table({f"reward model, {name}": [result[name] for result in reward] for name in reward[0]}))
