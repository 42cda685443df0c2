"""Do the scripts still compute what they did at an earlier commit? Number by number, and byte by byte the models.

    python benchmark/same_numbers.py                       # against 7194241, before plumbing/; about 4 minutes on two cores
    python benchmark/same_numbers.py --commit HEAD

The five scripts that both trees have run on a few rows, on the CPU, with one thread and seed 1: there, what is computed in the same
way comes out the same to the last bit. So do runs that should agree within the new tree: drpo.py --beta 0 and ppo.py, a
stopped and resumed run and one left alone. The RL scripts start from the old tree's models. Exit code 1 if anything differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
ROWS = {"train": 64, "validation": 16, "test": 16}
COLUMNS = {  # that every split has: 7194241 reads no others
    "reference": ("prompt", "completion", "rubric"),
    "preference": ("prompt", "chosen", "rejected"),
}
RL_UPDATES = 6


def write_inputs(folder):
    for task, columns in COLUMNS.items():
        (folder / task).mkdir()
        for split, count in ROWS.items():
            lines = (ROOT / f"data/tldr_mini/{task}/{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            rows = [{name: json.loads(line)[name] for name in columns} for line in lines]
            (folder / f"{task}/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(tree, folder, name, script, *flags, processes=1):
    """A run of the name in folder/runs, its model in folder/NAME; -> the process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    flags = flags if "--resume" in flags else ("--run-name", name, "--output-dir", name, *flags)
    command = [str(part) for part in (sys.executable, *launcher, tree / script, *flags)]
    with open(folder / f"{name}.txt", "a") as output:
        return subprocess.Popen(command, cwd=folder, env=os.environ | ONE_THREAD, stdout=output, stderr=output)


def finish(process, folder, name, code=0):
    if process.wait() != code:
        sys.exit(f"{name} ended with {process.returncode}:\n{(folder / f'{name}.txt').read_text()[-3000:]}")
    print(f"{name} in {folder.name}: done", file=sys.stderr, flush=True)


def stop_in_the_middle(process, folder, name):
    """SIGTERM after the second update; the process must end with a checkpoint, before its last."""
    metrics = folder / f"runs/{name}/metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"update": 2' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, folder, name, code=1)
    if f'"update": {RL_UPDATES}' in metrics.read_text():
        sys.exit(f"{name} was over before it could be stopped")


def read_numbers(run):
    """One dict an update, without times."""
    lines = [json.loads(line) for line in (run.parent / "runs" / run.name / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["update"] > 0]  # an earlier commit may lack the line before the first
    renamed = {"policy/grad_norm": "grad_norm"}
    return [{renamed.get(key, key): x for key, x in line.items() if not key.startswith("time/")} for line in lines]


def relative(a, b):
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def compare(old, new, extra=()):
    """Of two runs' folders -> updates, numbers, what differs in them, what differs in the models. extra: keys of new alone."""
    before, after = read_numbers(old), read_numbers(new)
    keys = [[line.keys() for line in before], [line.keys() - {*extra} for line in after]]
    numbers = "other keys or updates"
    if keys[0] == keys[1]:
        rounding = {"policy/first_ratio_error"}  # 0 but for rounding, so of no size to compare with
        pairs = [(line, now, key) for line, now in zip(before, after) for key in line if key not in rounding]
        found = [(relative(line[key], now[key]), key) for line, now, key in pairs]
        numbers = "IDENTICAL" if max(found)[0] == 0 else "{:.1e} in {}".format(*max(found))
    weights = "IDENTICAL"
    if (old / "model.safetensors").read_bytes() != (new / "model.safetensors").read_bytes():
        tensors, others = load_file(old / "model.safetensors"), load_file(new / "model.safetensors")
        weights = "other tensors"
        if {name: x.shape for name, x in tensors.items()} == {name: x.shape for name, x in others.items()}:
            gaps = {name: (x - others[name]).abs().max() / x.abs().max() for name, x in tensors.items()}
            weights = f"{max(gaps.values()):.1e} in {max(gaps, key=gaps.get)}"
    return len(before), sum(map(len, before)), numbers, weights


def run_all(tree, folder):
    """-> rows of the table."""
    old, new = folder / "old", folder / "new"
    for place in (old, new):
        place.mkdir()
    seed, small = ("--seed", 1), ("--batch-size", 16, "--micro-batch-size", 8)
    reference, preference = ("--dataset", folder / "reference"), ("--dataset", folder / "preference")
    sft, reward = ("--sft-path", old / "sft"), ("--reward-path", old / "reward_model")
    base, episodes = ("--base-model", ROOT / "data/tiny_pythia"), ("--total-episodes", 16 * RL_UPDATES)
    rl = (*episodes, "--minibatch-size", 8, "--num-ppo-epochs", 2, "--eval-every", 2, "--eval-rows", 16)
    rl = (*seed, *small, *reference, *sft, *reward, *rl)
    pairs = (*seed, *small, *preference, *sft, "--num-epochs", 1, "--response-length", 40)
    both = {  # name -> script and flags, processes
        "sft": ("sft.py", *seed, *small, *reference, *base, "--num-epochs", 1, "--learning-rate", 4e-3),
        "reward_model": ("reward_model.py", *pairs, "--reference-dataset", folder / "reference"),
        "dpo": ("dpo.py", *pairs, "--eval-every", 2),
        "ppo": ("ppo.py", *rl),
        "drpo": ("drpo.py", *rl),
        "drpo_2": ("drpo.py", *rl),
        "drpo_shard_2": ("drpo.py", *rl, "--shard"),
    }
    for name, command in both.items():
        processes = 2 if name.endswith("_2") else 1
        earlier = ("drpo_fsdp.py", *rl) if "shard" in name and (tree / "drpo_fsdp.py").exists() else command
        for place, root, asked in ((old, tree, earlier), (new, ROOT, command)):
            finish(start(root, place, name, *asked, processes=processes), place, name)
    finish(start(ROOT, new, "beta_0", "drpo.py", *rl, "--beta", 0), new, "beta_0")
    stop_in_the_middle(start(ROOT, new, "stopped", "drpo.py", *rl), new, "stopped")
    finish(start(ROOT, new, "stopped", "drpo.py", "--resume", "stopped"), new, "stopped")
    titles = {"drpo_2": "drpo, 2 processes", "drpo_shard_2": "drpo_fsdp | drpo --shard, 2 processes"}
    watched = ("eval/loss", "eval/accuracy")  # of reward_model.py, which had no validation split
    more = {"reward_model": watched}
    rows = [(titles.get(name, name), *compare(old / name, new / name, more.get(name, ()))) for name in both]
    resets = ("reset/fraction", "reset/length")
    rows.append(("new: ppo | drpo --beta 0", *compare(new / "ppo", new / "beta_0", resets)))
    return [*rows, ("new: drpo | drpo stopped, resumed", *compare(new / "drpo", new / "stopped"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="7194241", help="the earlier one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree = folder / "tree"
        tree.mkdir()
        archive = subprocess.run(["git", "archive", args.commit], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "x"], cwd=tree, input=archive, check=True)
        write_inputs(folder)
        rows = run_all(tree, folder)
    print(
        f"{args.commit} | this tree".ljust(40) + f"{'updates':>8}{'numbers':>9}  {'metrics.jsonl':40}model.safetensors"
    )
    for title, updates, count, numbers, weights in rows:
        print(f"{title:40}{updates:8}{count:9}  {numbers:40}{weights}")
    # rounding is not the same since selected_logprobs adds up in parts; what this tree promises of itself is bit for bit
    sys.exit(any({*row[3:]} != {"IDENTICAL"} for row in rows if row[0].startswith("new:")))
