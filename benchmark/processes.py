"""drpo.py with 1, 2 and 4 processes of one thread each: the same metrics side by side, and seconds per update.

    python benchmark/processes.py                      # five updates each, three rounds; about 5 minutes on two cores
    python benchmark/processes.py --processes 1 2 --shard

Needs models/sft and models/reward (python drpo.py trains them). Micro-batches have 16 rows, so that every process has the
same work per row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("objective/score", "objective/kl", "loss/policy", "loss/value", "grad_norm", "response/length")


def run(script, shard, processes, updates, sft, reward):
    """-> metrics of one run."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", ROOT / "data/tldr_mini/reference", "--sft-path", sft, "--reward-path", reward]
        flags += ["--total-episodes", 64 * updates, "--micro-batch-size", 16, "--eval-every", 10**6, "--eval-rows", 1]
        flags += ["--run-name", "run", "--output-dir", "out", "--save-every", 10**6]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        flags += ["--shard"] if shard else []
        alone = processes == 1 and not shard  # --shard wants torchrun, also for one
        command = [sys.executable, *([] if alone else launcher), ROOT / script, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        done = subprocess.run(
            [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(done.stderr[-2000:])
        lines = [json.loads(line) for line in (Path(folder) / "runs/run/metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["update"] > 0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--script", default="drpo.py", choices=["drpo.py", "ppo.py"])
    parser.add_argument("--shard", action="store_true", help="every model is split over the processes")
    parser.add_argument("--sft-path", type=Path, default=ROOT / "models/sft")
    parser.add_argument("--reward-path", type=Path, default=ROOT / "models/reward")
    args = parser.parse_args()
    models = args.sft_path.resolve(), args.reward_path.resolve()
    metrics, seconds = {}, {number: [] for number in args.processes}
    for _ in range(args.rounds):
        for number in args.processes:
            metrics[number] = run(args.script, args.shard, number, args.updates, *models)
            stages = [
                sum(line[f"time/{name}"] for name in ("rollout", "score", "optimise")) for line in metrics[number]
            ]
            seconds[number].append(statistics.median(stages[1:]))
            print(f"{number} processes: {seconds[number][-1]:.2f} s per update", file=sys.stderr, flush=True)
    print("| update | metric | " + " | ".join(f"{number} processes" for number in args.processes) + " |")
    print("|---" * (2 + len(args.processes)) + "|")
    for update in (1, args.updates):
        for name in SHOWN:
            row = [f"{metrics[number][update - 1][name]:.7g}" for number in args.processes]
            print(f"| {update} | {name} | " + " | ".join(row) + " |")
    print("\n| processes | s per update, median (range) | as a share of the first, within rounds |\n|---|---|---|")
    for number in args.processes:
        shares = [now / first for now, first in zip(seconds[number], seconds[args.processes[0]])]
        spread = [f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (seconds[number], shares)]
        print(f"| {number} | {spread[0]} | {spread[1]} |")
