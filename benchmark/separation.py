"""Where resets matter: episodes to success against the length of the list, on data/transcription; DR-PO against PPO.

    python benchmark/separation.py                  # 100 minutes on two cores; goes on where it was stopped
    python benchmark/separation.py --seeds 1        # one of the five; --table: only print the tables of separation.json
    python benchmark/plot.py separation             # the figure, from separation.json, written after every seed

A list of L digits is copied by a policy that starts right with probability 0.3 a digit (as its writers are), so that a whole
copy succeeds by chance with probability 0.3^L. The reward is 1 for a whole copy and else 0. For every seed the supervised
policy is trained from scratch. beta 0 is PPO (drpo.py --beta 0 equals ppo.py). PPO alone is also followed without the KL
penalty, which pulls it back to the supervised policy between rare successes, and for four times the episodes.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import linear_regression, mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.sweep import ROOT, arguments, curves, sweep

OUT = ROOT / "benchmark/separation.json"
SEEDS, LENGTHS, BETAS, EPISODES = (1, 2, 3, 4, 5), (2, 4, 6, 8, 10, 12), (0, 0.25, 0.5, 0.75, 1), 5_120
LONG = 4 * EPISODES
FEW = (1, 2, 3)  # the seeds of what follows, which is beside the main table
WALL = [(n, 0, EPISODES if n < 5 else LONG) for n in range(2, 9)] + [(6, 0.01, LONG)]  # of PPO alone
FREE = (4, 6, 8)  # lengths of DR-PO without KL penalty, beta 1
# the text that resets go into is the writers' own; lists without letters, so that the first token is already a choice
VARIANTS = [("written", 8, 0.5), ("written", 8, 1), ("bare", 4, 0.5), ("bare", 4, 1), ("bare", 8, 0.5), ("bare", 8, 1)]


def kind_of(setting):
    """How its lists differ from the usual ones."""
    return "_bare" * (setting.get("variant") == "bare") + (f"_right_{setting['right']}" if "right" in setting else "")


def data_of(setting):
    return f"runs/separation_data_{setting['length']}{kind_of(setting)}"


def sft_of(setting):
    """Name of the run and folder under models/ of the supervised policy."""
    return f"separation_sft_{setting['length']}_{setting['seed']}{kind_of(setting)}"


def settings(seed):
    """Of every run of RL."""
    usual = {"seed": seed, "kl_coef": 0.01, "episodes": EPISODES}
    for length in LENGTHS:
        for beta in BETAS:
            yield usual | {"length": length, "beta": beta}
    for length, kl, episodes in WALL if seed in FEW else ():
        yield {"length": length, "seed": seed, "beta": 0, "kl_coef": kl, "episodes": episodes}
    for length in FREE if seed in FEW else ():
        yield usual | {"length": length, "beta": 1, "kl_coef": 0}
    for variant, length, beta in VARIANTS if seed in FEW else ():
        yield usual | {"length": length, "beta": beta, "variant": variant}


def name_of(setting):
    """Of its run and its model."""
    numbers = [f"{setting[name]:g}" for name in ("length", "seed", "beta", "kl_coef", "episodes")]
    return "_".join(["separation", *numbers, *([setting["variant"]] if "variant" in setting else [])])


def success(name):
    """-> episodes and share of right copies at every evaluation; a response without EOS scores -1, so that is added back."""
    found = curves(name)
    return found["at"], [round(score + 1 - eos, 3) + 0.0 for score, eos in zip(found["score"], found["eos"])]


def sft_command(setting):
    flags = ["--dataset", data_of(setting), "--base-model", "data/transcription/base", "--seed", setting["seed"]]
    return ["sft.py", *flags, "--num-epochs", 6, "--learning-rate", 4e-3, "--output-dir", f"models/{sft_of(setting)}"]


def rl_command(setting, script="drpo.py"):
    """drpo.py's defaults, but for what the task needs: resets into right copies, its reward and a smaller KL coefficient."""
    flags = ["--dataset", data_of(setting), "--sft-path", f"models/{sft_of(setting)}"]
    flags += ["--reset-column", "completion" if setting.get("variant") == "written" else "answer"]
    flags += ["--reward-path", "data/transcription/reward.py", "--seed", setting["seed"]]
    flags += ["--beta", setting["beta"], "--kl-coef", setting["kl_coef"], "--total-episodes", setting["episodes"]]
    flags += ["--eval-rows", 200, "--eval-every", 5 if setting["episodes"] == EPISODES else 10]
    return [script, *flags, "--output-dir", f"models/{name_of(setting)}"]


def reached(run, share):
    """Episodes until `share` of the held-out lists were copied right; None within the budget."""
    return next((x for x, success in zip(run["at"], run["success"]) if success >= share), None)


def of(runs, variant=None, **wanted):
    wanted |= {"variant": variant}
    return [run for run in runs if all(run.get(name) == value for name, value in wanted.items())]


def cell_of(runs, share=0.5, **wanted):
    """Episodes until a share of the lists is right, mean and range over seeds; how many never got there; share at the end."""
    part = of(runs, **wanted)
    found = [x for run in part if (x := reached(run, share)) is not None]
    never = f"{len(part) - len(found)} of {len(part)} never" * (len(found) < len(part))
    times = f"{mean(found):,.0f} ({min(found):,} to {max(found):,})" if found else ""
    return f"{', '.join(filter(None, (times, never)))}; {mean(run['success'][-1] for run in part):.2f}" if part else ""


def growth(times, logarithmic=False):
    """Least squares over length -> episodes of every seed; lengths that not all seeds learnt are left out.

    -> what two digits more take, as a number of episodes or as a factor, and the fitted law: length -> episodes. None for
    fewer than two lengths.
    """
    times = {n: found for n, found in times.items() if found and None not in found}
    if len(times) < 2:
        return None
    points = [(length, math.log(x) if logarithmic else x) for length, found in times.items() for x in found]
    slope, intercept = linear_regression(*zip(*points))
    if logarithmic:
        return math.exp(2 * slope), lambda length: math.exp(intercept + slope * length)
    return 2 * slope, lambda length: intercept + slope * length


def growth_alone(runs):
    """Of PPO without KL penalty, from 4 digits on: a factor."""
    return growth({n: [reached(run, 0.5) for run in of(runs, length=n, beta=0, kl_coef=0)] for n, *_ in WALL[2:]}, True)


def growth_of(runs, beta):
    """Of DR-PO at its KL coefficient: a number of episodes."""
    parts = {n: of(runs, length=n, beta=beta, kl_coef=0.01, episodes=EPISODES) for n in LENGTHS}
    return growth({n: [reached(run, 0.5) for run in part] for n, part in parts.items()})


def print_tables(runs):
    titles = ["PPO (beta 0)" if beta == 0 else f"beta {beta:g}" for beta in BETAS]
    for share in (0.5, 0.9):
        print(f"\nepisodes to {share:.0%} of held-out lists copied right, mean (range) over seeds; share at the end\n")
        print("| digits, chance | " + " | ".join(titles) + " |\n" + "|---" * (len(BETAS) + 1) + "|")
        for n in LENGTHS:
            cells = [cell_of(runs, share, length=n, beta=beta, kl_coef=0.01, episodes=EPISODES) for beta in BETAS]
            print(f"| {n}, {0.3**n:.1g} | " + " | ".join(cells) + " |")
    print(
        "\nresets into the writers' own text; lists without letters\n\n| variant | digits | beta | |\n|---|---|---|---|"
    )
    for variant, n, beta in VARIANTS:
        print(f"| {variant} | {n} | {beta:g} | {cell_of(runs, length=n, beta=beta, variant=variant)} |")
    print("\ntwo digits more take, fitted to the seeds' episodes to 50% where all seeds got there:")
    if alone := growth_alone(runs):
        print(f"PPO without KL penalty, from 4 digits on: {alone[0]:.1f} times as many")
    for beta in BETAS[1:]:
        if found := growth_of(runs, beta):
            print(f"beta {beta:g}: {found[0]:,.0f} more")
    print(
        "\nPPO for longer and without KL penalty; DR-PO without\n\n| digits | beta | KL coefficient | episodes | |\n|---|---|---|---|---|"
    )
    for n, beta, kl, episodes in [(n, 0, kl, episodes) for n, kl, episodes in WALL] + [
        (n, 1, 0, EPISODES) for n in FREE
    ]:
        found = cell_of(runs, length=n, beta=beta, kl_coef=kl, episodes=episodes)
        print(f"| {n} | {beta} | {kl:g} | {episodes:,} | {found} |")


def train_policies(runs, workers):
    """The data of every length, the supervised policy of every length and seed."""
    for setting in {data_of(run): run for run in runs}.values():
        flags = ["--length", setting["length"], "--out", data_of(setting)]
        flags += ["--bare"] * (setting.get("variant") == "bare")
        flags += ["--right", setting["right"]] if "right" in setting else []
        command = [sys.executable, "data/transcription/generate.py", *map(str, flags)]
        subprocess.run(command, cwd=ROOT, check=True)
    sweep("supervised policies", {sft_of(run): sft_command(run) for run in runs}, workers)


def write_runs(path, runs):
    """What the runs logged, into the JSON, in the place of what it had of them; -> with what they logged."""
    known = {name_of(run): run for run in (json.loads(path.read_text()) if path.exists() else ())}
    found = {name_of(run): run | dict(zip(("at", "success"), success(name_of(run)))) for run in runs}
    known |= found
    path.write_text("[\n" + ",\n".join(json.dumps(known[name]) for name in sorted(known)) + "\n]\n")
    return list(found.values())


if __name__ == "__main__":
    args = arguments(__doc__, SEEDS)
    for seed in (
        () if args.table else args.seeds
    ):  # one after the other, so that what is done first is already a picture
        runs = list(settings(seed))
        train_policies(runs, args.workers)
        sweep(f"seed {seed}", {name_of(run): rl_command(run) for run in runs}, args.workers)
        write_runs(OUT, runs)
    print_tables(json.loads(OUT.read_text()))
