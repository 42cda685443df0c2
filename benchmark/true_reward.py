"""What a learned reward model costs: RL on the true reward beside RL on the learned one, on both tasks.

    python benchmark/true_reward.py            # 5 seeds; goes on where it was stopped, writes true_reward.json
    python benchmark/plot.py true_reward       # the figure

TL;DR: ppo.py and drpo.py with --reward-path data/tldr_mini/rubric.py; the runs on the learned reward model are those of
benchmark/seeds.py (made if missing). Transcription, 8 digits: the rule as in benchmark/separation.py, and a reward model that
reward_model.py fits to 4,000 pairs, the right copy preferred to what a writer made of the same list. The share of right copies
is measured in both by the win rate: the reference is the right copy, which nothing else ties with.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark import separation
from benchmark.seeds import EVERY, SEEDS, interval, start_of, train
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write

OUT = ROOT / "benchmark/true_reward.json"
DIGITS, DATA = 8, "runs/true_reward_data"
METHODS = {"ppo": ("PPO", 0), "drpo": ("DR-PO, β = 1", 1)}
REWARDS = {"true": "true reward", "learned": "reward model"}


def write_data():
    """data/transcription as pairs; and with the right copy as reference and only phrase of the rubric, so that a copy is a tie."""
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (ROOT / f"data/transcription/{split}.jsonl").read_text().splitlines()]
        pairs = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": r["completion"]} for r in rows]
        pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
        task = [row | {"completion": row["answer"], "rubric": [row["answer"].strip()]} for row in rows]
        for name, lines in (("task", task), ("pairs", pairs)):
            path = ROOT / DATA / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train_start(seeds, workers):
    """The supervised policies of the lists, the data, the reward models."""
    separation.train_policies([sft_setting(seed) for seed in seeds], workers)
    write_data()
    sweep("reward models of lists", {f"true_reward_{s}": reward_command(s) for s in seeds}, workers)


def name_of(task, reward, method, seed):
    return (
        f"seeds_{seed}_{method}" if (task, reward) == ("tldr", "learned") else f"true_{task}_{reward}_{method}_{seed}"
    )


def sft_setting(seed):
    return {"length": DIGITS, "seed": seed}


def reward_command(seed):
    flags = [
        "--dataset",
        f"{DATA}/pairs",
        "--sft-path",
        f"models/{separation.sft_of(sft_setting(seed))}",
        "--seed",
        seed,
    ]
    return ["reward_model.py", *flags, "--output-dir", f"models/true_reward_{seed}"]


def command(task, reward, method, seed):
    name = name_of(task, reward, method, seed)
    if task == "tldr":
        flags = [*start_of(seed)[0], *EVERY, "--reward-path", "data/tldr_mini/rubric.py"]
        return [f"{method}.py", *flags, "--output-dir", f"models/{name}"]
    flags = [
        "--dataset",
        f"{DATA}/task",
        "--sft-path",
        f"models/{separation.sft_of(sft_setting(seed))}",
        "--seed",
        seed,
    ]
    flags += ["--reset-column", "answer", "--beta", METHODS[method][1], "--kl-coef", 0.01, "--eval-rows", 200, *EVERY]
    flags += ["--reward-path", "data/transcription/reward.py" if reward == "true" else f"models/true_reward_{seed}"]
    return ["drpo.py", *flags, "--output-dir", f"models/{name}"]


def record(task, reward, method, seed):
    name = name_of(task, reward, method, seed)
    found = {"task": task, "reward": reward, "method": method, "seed": seed, "test": last(name)[0]} | curves(name)
    if task == "transcription":
        found["rubric"] = [round(2 * x, 4) for x in found["win_rate"]]  # the share of right copies
        found["test"]["rubric"] = round(2 * found["test"]["win_rate"], 4)
    return found


def print_tables(records):
    print(
        "\nrubric (TL;DR) or share of right copies (transcription) on test prompts, temperature 1; mean ± half of the 95% interval\n"
    )
    print(
        "| task | method | true reward | reward model | difference within a seed | KL, true | KL, reward model |"
        + "\n"
        + "|---" * 7
        + "|"
    )
    for task in ("tldr", "transcription"):
        for method, (label, _) in METHODS.items():
            found = {
                (reward, key): [
                    run["test"][key]
                    for run in records
                    if (run["task"], run["reward"], run["method"]) == (task, reward, method)
                ]
                for reward in REWARDS
                for key in ("rubric", "kl")
            }
            pairs = zip(found["learned", "rubric"], found["true", "rubric"])
            groups = [found["true", "rubric"], found["learned", "rubric"], [one - other for one, other in pairs]]
            groups += [found["true", "kl"], found["learned", "kl"]]
            cells = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in groups]
            print(f"| {task} | {label} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", *METHODS})
        train_start(args.seeds, args.workers)
        parts = [(task, reward) for task in ("tldr", "transcription") for reward in REWARDS]
        runs = [(*part, method, seed) for seed in args.seeds for part in parts for method in METHODS]
        new = {name_of(*run): command(*run) for run in runs if run[:2] != ("tldr", "learned")}
        sweep("RL", new, args.workers)
        write(OUT, [record(*run) for run in runs], "task", "reward", "method", "seed")
    print_tables(json.loads(OUT.read_text()))
