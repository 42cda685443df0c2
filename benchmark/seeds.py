"""The whole chain over seeds: sft, reward_model, ppo, drpo, each seed from scratch; then the README's tables.

    python benchmark/seeds.py --seeds 1 2 3            # about 5 minutes a seed on two cores
    python benchmark/seeds.py --seeds 1 2 3 --table    # only print the tables of finished runs

Every number is the mean over seeds with the standard deviation over seeds behind it. Results stay in
runs/seeds_<seed>_<script>/result.json; a finished run is not repeated.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]


def commands(seed):
    """name -> (script, flags); models of one seed live in models/seeds_<seed>/."""
    models = f"models/seeds_{seed}"
    policy_flags = ["--sft-path", f"{models}/sft", "--reward-path", f"{models}/reward"]
    return {
        "sft": ("sft.py", []),
        "reward": ("reward_model.py", ["--sft-path", f"{models}/sft"]),
        "dpo": ("dpo.py", policy_flags[:2]),
        "ppo": ("ppo.py", policy_flags),
        "drpo": ("drpo.py", policy_flags),
    }


def run_seed(seed):
    for name, (script, flags) in commands(seed).items():
        out, run = f"models/seeds_{seed}/{name}", f"seeds_{seed}_{name}"
        if (ROOT / out).exists():
            continue
        command = [sys.executable, script, "--seed", str(seed), "--output-dir", out, "--run-name", run, *flags]
        print(" ".join(command[1:]), flush=True)
        done = subprocess.run(command, cwd=ROOT, env={"OMP_WAIT_POLICY": "passive", **os.environ})
        if done.returncode != 0:
            sys.exit(f"{script} failed for seed {seed}; remove runs/{run} before the next try")


def load(seed, name):
    return json.loads((ROOT / f"runs/seeds_{seed}_{name}/result.json").read_text())


def table(rows):
    """Markdown: rows maps a label to one dict of numbers per seed."""
    columns = list(next(iter(rows.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, results in rows.items():
        cells = []
        for column in columns:
            values = [result[column] for result in results]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="do not run anything")
    args = parser.parse_args()
    for seed in args.seeds if not args.table else ():
        run_seed(seed)
    ppo, drpo, reward = ([load(seed, name) for seed in args.seeds] for name in ("ppo", "drpo", "reward"))
    policies = {"SFT": [result["SFT"] for result in ppo], "PPO": [result["PPO"] for result in ppo]}
    print(table(policies | {"DR-PO": [result["DR-PO"] for result in drpo]}), end="\n\n")
    print(table({f"reward model, {name}": [result[name] for result in reward] for name in reward[0]}))
