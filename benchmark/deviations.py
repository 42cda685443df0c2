"""What each deviation from the official code costs or gains: DR-PO with one of them switched back at a time, on both tasks.

    python benchmark/deviations.py          # 3 seeds, 40 minutes on two cores after seeds.py; goes on where it was stopped
    python benchmark/deviations.py --table  # only print the tables of deviations.json

Each is a diff in benchmark/deviations/, of at most 15 changed lines (`all`: 29), applied to a copy of drpo.py. Official
is Cornell-RL/drpo at bd825df, src/tldr/drpo.py:
    value_loss         forced tokens count in the value loss (874). There the target is what follows them. The mean is then over about
                       twice as many tokens, so the own ones weigh half
    whitening          mean and variance of the advantages are those of all (B, R), forced tokens and what is behind EOS (830).
                       Nothing is sampled there as long as EOS ends a rollout: 0. Alone it is no state that the official code has:
                       there the critic that the forced tokens' advantages come from is trained on them
    after_eos          sampling goes on behind EOS; those tokens count as actions in KL, values, whitening and both losses
    whitened_rewards   rewards with their own mean and variance 1 (817), here those of the actions
    temperature        0.7 in the rollout and in every log-prob of training (TaskHParams). The evaluation stays as it is
    all                these five, where they meet as there: everything over all of (B, R) but the policy loss, which alone leaves
                       out forced tokens (881). And what does nothing, or next to nothing, alone: the KL reward of forced tokens
                       (808), which reaches the policy through the critic and the whitening only; an EOS in the last column
                       counts as unfinished (803); weight decay of 0.01
Not in it: LoRA, whose heads would be frozen; means over micro-batches of 4 rows, where ours is over all tokens of a minibatch;
unclipped gradients, as the DeepSpeed settings that decide it were not published.

TL;DR: from every seed's SFT policy and reward model of benchmark/seeds.py. Transcription: the lists of 8 digits of
benchmark/separation.py. Our drpo.py at beta 1 is what is compared with, the run of seeds.py and of separation.py. Every policy is
judged from bare prompts at temperature 1 and at the official evaluation's 0.01: a policy that was trained at 0.7 was not trained
for 1. A cell: mean over seeds of the difference to our drpo.py within a seed, ± half of its 95% interval (Student's t).
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmark import seeds as tldr
from benchmark.reset_rules import write_script
from benchmark.seeds import EVERY, interval, start_of, train
from benchmark.separation import EPISODES, cell_of, name_of, rl_command, train_policies
from benchmark.sweep import ROOT, arguments, curves, last, sweep, write
from drpo import evaluate
from plumbing.models import load, load_model
from plumbing.rewards import load_reward
from plumbing.rows import load_rows
from plumbing.tokens import encode_rows

OUT = ROOT / "benchmark/deviations.json"
OURS, DEVIATIONS = "ours", ("value_loss", "whitening", "after_eos", "whitened_rewards", "temperature", "all")
TASKS = ("tldr_mini", "transcription")
COLD = 0.01  # official code: validation_generation_config
# columns: of which evaluation, what, digits
COLUMNS = {
    "tldr_mini": [("test", "rubric", 3), ("test", "win_rate", 3), ("cold", "rubric", 3), ("cold", "win_rate", 3)],
    "transcription": [("test", "success", 3), ("cold", "success", 3)],
}
COLUMNS = {task: [*columns, ("test", "kl", 2), ("test", "length", 1)] for task, columns in COLUMNS.items()}


def setting_of(deviation, seed):
    """As benchmark/separation.py has them, of a run on transcription."""
    usual = {"length": 8, "seed": seed, "beta": 1, "kl_coef": 0.01, "episodes": EPISODES}
    return usual if deviation == OURS else usual | {"variant": deviation}


def run_of(task, deviation, seed):
    """Name of the run."""
    if task == "transcription":
        return name_of(setting_of(deviation, seed))
    return f"seeds_{seed}_drpo" if deviation == OURS else f"deviations_{seed}_{deviation}"


def command(task, deviation, seed, script):
    if task == "transcription":
        return rl_command(setting_of(deviation, seed), script)
    if deviation == OURS:
        return tldr.command("drpo", seed)
    return [script, *start_of(seed)[1], *EVERY, "--output-dir", f"models/{run_of(task, deviation, seed)}"]


def cold(name):
    """The policy of a run on its held-out rows again, at the official evaluation's temperature; kept in the run's folder."""
    if (path := ROOT / f"runs/{name}/cold.json").exists():
        return json.loads(path.read_text())
    args = SimpleNamespace(**json.loads((ROOT / f"runs/{name}/args.json").read_text()) | {"temperature": COLD})
    tokenizer, columns = load(AutoTokenizer, args.sft_path), ("prompt", "completion", args.reset_column)
    rows = load_rows(args.dataset, "", (args.eval_split,), columns, args.sft_path, args.max_rows)[args.eval_split]
    encode_rows(rows, tokenizer, args, offline_ids="completion", reset_ids=args.reset_column)
    policy, ref_policy = (
        load_model(AutoModelForCausalLM, path, tokenizer, args, "cpu") for path in (args.output_dir, args.sft_path)
    )
    if args.reward_path.endswith(".py"):
        reward = load_reward(args.reward_path)
    else:
        reward = load_model(AutoModelForSequenceClassification, args.reward_path, tokenizer, args, "cpu")
    _, found = evaluate(policy, rows[: args.eval_rows], ref_policy, reward, tokenizer, args, "cpu")
    path.write_text(json.dumps({key: round(value, 4) for key, value in found.items()}))
    return json.loads(path.read_text())


def with_success(task, found):
    """Transcription: with the share of right copies; a response without EOS scores -1, so that is added back."""
    if task != "transcription":
        return found
    lists = isinstance(found["score"], list)
    pairs = zip(found["score"], found["eos"]) if lists else [(found["score"], found["eos"])]
    shares = [round(score + 1 - eos, 3) for score, eos in pairs]
    return found | {"success": shares if lists else shares[0]}


def record(task, deviation, seed):
    """Test rows at temperature 1 and at 0.01, and the validation curves."""
    name = run_of(task, deviation, seed)
    tests = {"test": with_success(task, last(name)[0]), "cold": with_success(task, cold(name))}
    return {"task": task, "deviation": deviation, "seed": seed, **tests, **with_success(task, curves(name))}


def table(task, records):
    """Markdown."""
    columns, lists = COLUMNS[task], task == "transcription"
    runs = {d: [run for run in records if (run["task"], run["deviation"]) == (task, d)] for d in (OURS, *DEVIATIONS)}
    titles = [key.replace("_", " ") + f", T = {1 if of == 'test' else COLD}" for of, key, _ in columns]
    titles += ["validation: episodes to 50%; share at the end"] * lists
    lines = ["| minus ours | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for deviation, part in runs.items():
        assert [run["seed"] for run in part] == [run["seed"] for run in runs[OURS]]
        cells = []
        for of, key, digits in columns:
            pairs = [(run[of][key], ours[of][key]) for run, ours in zip(part, runs[OURS])]
            middle, half = interval([own - other for own, other in pairs])
            itself = f"{mean(own for own, _ in pairs):.{digits}f}"
            cells.append(itself if deviation == OURS else f"{middle:+.{digits}f} ± {half:.{digits}f}")
        cells += [cell_of(part)] if lists else []
        lines.append(f"| {'ours, itself' if deviation == OURS else deviation} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    args = arguments(__doc__, (1, 2, 3))
    if not args.table:
        os.chdir(ROOT)
        train(args.seeds, args.workers, {"sft", "reward", "drpo"})
        train_policies([setting_of(OURS, seed) for seed in args.seeds], args.workers)
        wanted = [(task, deviation, seed) for seed in args.seeds for task in TASKS for deviation in (OURS, *DEVIATIONS)]
        with tempfile.TemporaryDirectory() as folder:  # outside of the checkout, where git applies to what it finds
            scripts = {OURS: "drpo.py"} | {name: write_script(folder, name, "deviations") for name in DEVIATIONS}
            sweep("deviations", {run_of(*key): command(*key, scripts[key[1]]) for key in wanted}, args.workers)
        write(OUT, [record(*key) for key in wanted], "task", "deviation", "seed")
    records = json.loads(OUT.read_text())
    for task in TASKS:
        print(f"\n{task}, seeds {sorted({run['seed'] for run in records})}\n\n{table(task, records)}")
