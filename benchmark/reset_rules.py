"""Other rules for the reset point: drpo.py with another sample_reset_len, on data/transcription.

    python benchmark/reset_rules.py      # twelve minutes on two cores; goes on where it was stopped, writes reset_rules.json
    python benchmark/reset_rules.py --table      # only print the table of reset_rules.json

Each rule is a diff of at most 15 changed lines in benchmark/resets/, applied to a copy of drpo.py as it is committed: a reset
rule is one function. All rows are reset (beta 1), as those papers do. Every run sees 256 rows 20 times each, because a rule that adapts
to a row must meet it again. What else those papers change (losses, prompts, groups) is not taken over. backward and cosine come to
the bare prompt late by design, when the step size has fallen to a sixth and less, so their episodes to 50% are those of the schedule.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.separation import EPISODES, cell_of, name_of, rl_command, train_policies, write_runs
from benchmark.sweep import ROOT, arguments, sweep

OUT = ROOT / "benchmark/reset_rules.json"
RULES, LENGTHS = ("uniform", "backward", "cosine", "adaptive"), (8, 12)


def write_script(folder, rule, kind="resets"):
    """drpo.py with benchmark/KIND/RULE.diff -> its path. Uniform is the paper's rule, which drpo.py has."""
    folder = Path(folder, rule)
    folder.mkdir()
    (folder / "drpo.py").write_bytes((ROOT / "drpo.py").read_bytes())
    if rule != "uniform":
        subprocess.run(["git", "apply", ROOT / f"benchmark/{kind}/{rule}.diff"], cwd=folder, check=True)
    return folder / "drpo.py"


if __name__ == "__main__":
    args = arguments(__doc__, (1, 2, 3))
    if not args.table:
        usual = {"beta": 1, "kl_coef": 0.01, "episodes": EPISODES}
        runs = [{"length": n, "seed": s, **usual, "variant": r} for s in args.seeds for n in LENGTHS for r in RULES]
        train_policies(runs, args.workers)
        with tempfile.TemporaryDirectory() as folder:  # outside of the checkout, where git applies to what it finds
            scripts = {rule: write_script(folder, rule) for rule in RULES}
            for run in runs:  # what a rule remembers is in no checkpoint, so a run that was stopped begins again
                if not (ROOT / f"runs/{name_of(run)}/result.json").exists():
                    shutil.rmtree(ROOT / f"runs/{name_of(run)}", ignore_errors=True)
            flags = ["--max-rows", 256]
            sweep(
                "RL", {name_of(run): [*rl_command(run, scripts[run["variant"]]), *flags] for run in runs}, args.workers
            )
        write_runs(OUT, runs)
    runs = json.loads(OUT.read_text())
    print("\nepisodes to 50% of held-out lists copied right, mean (range) over seeds; share at the end\n")
    print("| digits | " + " | ".join(RULES) + " |" + "\n" + "|---" * (len(RULES) + 1) + "|")
    for length in LENGTHS:
        print(f"| {length} | " + " | ".join(cell_of(runs, length=length, variant=rule) for rule in RULES) + " |")
