"""The commands of the docs that no other sweep runs, for the numbers beside them there.

    python benchmark/usage.py               # 3 seeds; goes on where it was stopped, writes usage.json
    python benchmark/usage.py --table       # only print the table of usage.json

From the SFT policies, reward models and DPO policies of benchmark/seeds.py.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.seeds import cell, model_of, start_of, train
from benchmark.sweep import ROOT, arguments, last, sweep, write

OUT = ROOT / "benchmark/usage.json"
SEEDS = (1, 2, 3)
ALGORITHM_1 = ["--samples-per-prompt", 2, "--second-reference", "--second-temperature", 1, "--alpha-rounds", 1000]
COMMANDS = {  # name -> script, flags, number of its last table
    "sft_responses": ("sft.py", ["--no-train-on-prompt"], "loss"),
    "reward_paper": ("reward_model.py", ["--center-coef", 0, "--num-epochs", 1], "accuracy"),
    "question_mark": ("ppo.py", ["--reward-path", "data/question_mark.py"], "score"),
    "rto_no_clip": ("rto.py", ["--token-reward-clip", "1e9"], "rubric"),
    "rejection_sampling_eta": ("rejection_sampling.py", ["--eta", 0.5], "rubric"),
    "xpo_algorithm_1": ("xpo.py", ALGORITHM_1, "rubric"),
}


def command(name, seed):
    script, flags, _ = COMMANDS[name]
    sft, rl = start_of(seed)
    start = {"sft.py": ["--seed", seed], "reward_model.py": sft}.get(script, sft if "--reward-path" in flags else rl)
    dpo = ["--dpo-path", model_of("dpo", seed)] if script == "rto.py" else []
    return (script, *start, *dpo, *flags, "--output-dir", f"models/usage_{seed}_{name}")


def record(name, seed):
    policy, first = last(f"usage_{seed}_{name}")
    key = COMMANDS[name][2]
    return {"command": name, "seed": seed, key: round((first if key == "accuracy" else policy)[key], 4)}


def print_table(records):
    print("\n| command | number | mean ± standard deviation over seeds |\n|---|---|---|")
    for name, (script, flags, key) in COMMANDS.items():
        values = [run[key] for run in records if run["command"] == name]
        print(f"| `python {' '.join(map(str, (script, *flags)))}` | {key} | {cell('', values)} |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", "dpo"})
        runs = {f"usage_{seed}_{name}": command(name, seed) for seed in args.seeds for name in COMMANDS}
        sweep("commands of the docs", runs, args.workers)
        write(OUT, [record(name, seed) for seed in args.seeds for name in COMMANDS], "command", "seed")
    print_table(json.loads(OUT.read_text()))
