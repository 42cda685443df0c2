"""The whole chain of the TL;DR task over seeds, each from scratch: SFT, reward model, DPO, PPO, DR-PO, judged; README's tables.

    python benchmark/seeds.py                  # 5 seeds; goes on where it was stopped, writes seeds.json and curves.json
    python benchmark/seeds.py --relatives all  # the relatives too, or some of them by name
    python benchmark/seeds.py --table          # only print the tables of seeds.json

Every number is the mean over seeds ± the standard deviation over seeds. A seed's policies share its SFT policy and its
reward model, and most of what differs between seeds is those two: methods are therefore compared within seeds, as the mean
of the seeds' differences to PPO with its 95% interval (Student's t over seeds).
"""

import json
import shutil
import subprocess
import sys
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.sweep import ROOT, arguments, curves, sweep, write

OUT, CURVES = ROOT / "benchmark/seeds.json", ROOT / "benchmark/curves.json"
SEEDS = (1, 2, 3, 4, 5)
ONE_STEP = ["--num-steps", 1, "--prompts-per-step", 639, "--updates-per-step", 120]  # as much as in three steps
PAIRS = ["--preference-dataset", "data/tldr_mini/preference"]  # 80 updates are as many as online
POLICIES = {  # name -> title, script, flags
    "sft": ("SFT", "sft.py", []),
    "dpo": ("DPO", "dpo.py", []),
    "dpo_ln": ("LN-DPO", "dpo_ln.py", []),
    "expo": ("ExPO, from DPO, α = 0.3", "expo.py", ["--alphas", 0.3]),
    "rso": ("RSO", "rejection_sampling.py", ONE_STEP),
    "rejection_sampling": ("rejection sampling, 3 steps", "rejection_sampling.py", []),
    "online_dpo": ("online DPO", "online_dpo.py", []),
    "hybrid": ("online DPO, hybrid", "online_dpo.py", PAIRS),
    "offline": ("online DPO, offline", "online_dpo.py", [*PAIRS, "--total-episodes", 0, "--updates-per-round", 80]),
    "xpo": ("XPO", "xpo.py", []),
    "ppo": ("PPO", "ppo.py", []),
    "rto": ("RTO", "rto.py", []),
    "drpo_0.5": ("DR-PO, β = 0.5", "drpo.py", ["--beta", 0.5]),
    "drpo": ("DR-PO, β = 1", "drpo.py", ["--beta", 1]),
}
PAPER = ("sft", "dpo", "ppo", "drpo_0.5", "drpo")
# split, sampling temperature of the completions: as in training, and the official code's 0.01
TABLES = [("test", "1.0"), ("test", "0.01"), ("shifted", "1.0"), ("shifted", "0.01")]
ENDS = {"sft": ["loss"], "reward": ["loss", "accuracy"]}  # what a script's evaluation is about
ENDS |= dict.fromkeys(("dpo", "dpo_ln"), ["loss", "accuracy", "logprobs/chosen"])
SAMPLED = ["win_rate", "rubric", "score", "kl", "length"]
EVERY = ["--eval-every", 5]  # for curves twice as fine as by default
PERCENT = {"win_rate", "length_matched", "rouge1", "rouge2", "rougeL", "eos"}
T_975 = dict(zip(range(2, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)))  # by number of seeds


def start_of(seed):
    """Flags of everything that starts from a seed's SFT policy, and of what needs its reward model too."""
    sft = ["--seed", seed, "--sft-path", f"models/seeds_{seed}/sft"]
    return sft, [*sft, "--reward-path", f"models/seeds_{seed}/reward"]


def model_of(name, seed):
    return f"models/seeds_{seed}/{name}" + "/alpha_0.3" * (name == "expo")


def command(name, seed):
    """Script and flags of one training run, the reward model's too."""
    sft, rl = start_of(seed)
    _, script, flags = POLICIES.get(name, (None, "reward_model.py", []))
    if name == "expo":
        paths = ["--sft-path", model_of("sft", seed), "--aligned-path", model_of("dpo", seed)]
        return (script, *flags, *paths, "--sweep-dir", f"models/seeds_{seed}/expo")
    usual = sft if name in ("reward", "dpo", "dpo_ln") else rl
    flags = [*flags, *(["--seed", seed] if name == "sft" else usual)]
    flags += EVERY if name in ("ppo", "drpo_0.5", "drpo") else []
    flags += ["--dpo-path", model_of("dpo", seed)] if name == "rto" else []
    return (script, *flags, "--output-dir", f"models/seeds_{seed}/{name}")


def stages(seeds, names=PAPER):
    """[(title, run -> script and flags)], each stage needs the one before it."""
    first = [("sft",), ("reward", "dpo", "dpo_ln")]
    first = [[name for name in stage if name in ("reward", *names)] for stage in first]
    first.append([name for name in names if name not in (*first[0], *first[1], "expo")])
    found = [{f"seeds_{seed}_{name}": command(name, seed) for seed in seeds for name in stage} for stage in first]
    found.append({judged(seed, *table): judge_command(seed, *table, names) for seed in seeds for table in TABLES})
    return list(zip(("SFT", "reward model, DPO", "RL", "judge"), found))


def judge_command(seed, split, temperature, names):
    policies = ["--policies", *(model_of(name, seed) for name in names)]
    return ("judge.py", *policies, *start_of(seed)[1], "--split", split, "--temperature", temperature)


def judged(seed, split, temperature):
    return f"seeds_{seed}_judge_{split}_{temperature}"


def train(seeds, workers, names):
    """Some of the chain's models, for the sweeps that start from them."""
    for title, runs in stages(seeds, [name for name in POLICIES if name in names])[:3]:
        sweep(title, {run: runs[run] for run in runs if run.split("_", 2)[2] in names}, workers)
    for seed in seeds if "expo" in names else ():  # seconds, and it leaves no run
        extrapolate(model_of("expo", seed), command("expo", seed))


def extrapolate(model, command):
    if not (ROOT / model / "config.json").exists():
        line = [sys.executable, *map(str, command)]
        subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def judge(seeds, workers, names):
    """A table of an earlier time may lack a policy: it is made again, and what was generated for it is kept."""
    runs = dict(stages(seeds, names))["judge"]
    for run, flags in [*runs.items()]:
        if (known := set(result(run))) >= set(flags[2 : 2 + len(names)]):
            del runs[run]
        elif known:
            shutil.rmtree(ROOT / f"runs/{run}")
    sweep("judge", runs, workers)


def result(name):
    path = ROOT / f"runs/{name}/result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def collect(seeds):
    """What the judge and the reward models' own tests found, one record a seed."""
    for seed in seeds:
        found = {"seed": seed, "reward": result(f"seeds_{seed}_reward")}
        for table in TABLES:
            results = result(judged(seed, *table))
            rows = {name: results.get(model_of(name, seed)) for name in POLICIES}
            found["_".join(table)] = {name: row for name, row in rows.items() if row}
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
        tables = [record[f"{split}_{temperature}"] for record in records]
        rows = {POLICIES[name][0]: [x[name] for x in tables] for name in POLICIES if all(name in x for x in tables)}
        print(f"\n{split}, temperature {temperature}\n\n{table(rows)}\n\n{differences(rows)}")
    rewards = [record["reward"] for record in records]
    print("\n" + table({f"reward model, {name}": [found[name] for found in rewards] for name in rewards[0]}))


def curve(name, seed):
    """What a run found on its validation split; of sft.py, which looks twice, the loss of every update too."""
    found, run = curves(f"seeds_{seed}_{name}"), ROOT / f"runs/seeds_{seed}_{name}/metrics.jsonl"
    updates = [json.loads(line) for line in run.read_text().splitlines()[1:]] if name == "sft" else []
    train = {"at": [line["epoch"] for line in updates], "loss": [round(line["loss"], 4) for line in updates]}
    return found | ({"train": train} if updates else {})


def print_ends(records):
    """What every script logs last on its validation split."""
    print("\n| run | evaluated | what it ends with, mean ± standard deviation over seeds |\n|---|---|---|")
    for name in dict.fromkeys(record["run"] for record in records):
        runs = [record for record in records if record["run"] == name]
        keys = ENDS.get(name, SAMPLED)
        ends = [f"`eval/{key}` {cell('', [run[key][-1] for run in runs])}" for key in keys]
        print(f"| {name} | {len(runs[0]['at'])} times | {', '.join(ends)} |")


if __name__ == "__main__":
    relatives = [name for name in POLICIES if name not in PAPER]
    args = arguments(__doc__, SEEDS, relatives={"nargs": "+", "choices": ["all", *relatives], "default": ()})
    names = [name for name in POLICIES if name in (*PAPER, *args.relatives) or "all" in args.relatives]
    if not args.table:
        train(args.seeds, args.workers, {"reward", *names})
        judge(args.seeds, args.workers, names)
        write(OUT, collect(args.seeds), "seed")
        runs = [name for name in ("sft", "reward", *names[1:]) if name != "expo"]
        found = [{"run": name, "seed": s} | curve(name, s) for name in runs for s in args.seeds]
        write(CURVES, found, "run", "seed")
    print_tables(json.loads(OUT.read_text()))
    print_ends(json.loads(CURVES.read_text()))
