"""What samples nothing: DPO and LN-DPO against beta, ExPO against alpha, on the TL;DR task.

    python benchmark/offline.py                # 3 seeds, 18 minutes on two cores; writes offline.json
    python benchmark/offline.py --table        # only print the tables of offline.json

All start from a seed's SFT policy of benchmark/seeds.py (made if missing) and read the same 4,000 pairs. ExPO goes on through DPO on
all of them and through DPO on a fifth. 400 test prompts, at both of the temperatures of seeds.py.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.seeds import cell, extrapolate, interval, model_of, result, start_of, train
from benchmark.sweep import ROOT, arguments, curves, sweep, write

OUT = ROOT / "benchmark/offline.json"
TEMPERATURES = ("1.0", "0.01")
BETAS = {"dpo": (0.05, 0.1, 0.25, 0.5), "dpo_ln": (0.2, 0.5, 1, 2, 5, 10)}
DEFAULTS = {"dpo": 0.05, "dpo_ln": 1}  # those runs are of seeds.py
FIFTH, ALPHAS = "dpo_fifth", {"dpo_fifth": (0.3, 0.5, 0.7, 1, 2, 4), "dpo": (-0.5, 0.1, 0.2, 0.3, 0.5, 1)}


def name_of(script, beta, seed):
    return f"seeds_{seed}_{script}" if beta == DEFAULTS[script] else f"offline_{seed}_{script}_{beta:g}"


def folder_of(script, beta, seed):
    default = beta == DEFAULTS[script]
    return model_of(script, seed) if default else f"models/{name_of(script, beta, seed)}"


def aligned_of(aligned, seed):
    return model_of("dpo", seed) if aligned == "dpo" else f"models/offline_{seed}_{aligned}"


def runs_of(seed):
    """Run -> script and flags."""
    sft, _ = start_of(seed)
    wanted = [(script, beta) for script, betas in BETAS.items() for beta in betas if beta != DEFAULTS[script]]
    runs = {
        name_of(script, beta, seed): [
            f"{script}.py",
            *sft,
            "--beta",
            beta,
            "--output-dir",
            folder_of(script, beta, seed),
        ]
        for script, beta in wanted
    }
    fifth = ["dpo.py", *sft, "--max-rows", 800, "--output-dir", aligned_of(FIFTH, seed)]
    return runs | {f"offline_{seed}_{FIFTH}": fifth}


def expo_command(aligned, seed):
    paths = ["--sft-path", model_of("sft", seed), "--aligned-path", aligned_of(aligned, seed)]
    return ["expo.py", *paths, "--sweep-dir", f"models/offline_{seed}_expo_{aligned}", "--alphas", *ALPHAS[aligned]]


def policies(seed):
    """(method, beta or alpha) -> folder, the rows of the tables."""
    found = {("sft", None): model_of("sft", seed), (FIFTH, 0): aligned_of(FIFTH, seed)}
    found |= {(script, beta): folder_of(script, beta, seed) for script, betas in BETAS.items() for beta in betas}
    for aligned, alphas in ALPHAS.items():
        sweep_dir = f"models/offline_{seed}_expo_{aligned}"
        found |= {(f"expo_{aligned}", alpha): f"{sweep_dir}/alpha_{float(alpha)}" for alpha in alphas}
    return found


def judged(seed, temperature):
    return f"offline_{seed}_judge_{temperature}"


def judge_command(seed, temperature):
    flags = ["--policies", *policies(seed).values(), *start_of(seed)[1], "--temperature", temperature]
    return ["judge.py", *flags]


def records(seed):
    for (method, value), folder in policies(seed).items():
        found = {"method": method, "value": value, "seed": seed}
        for temperature in TEMPERATURES:
            row = result(judged(seed, temperature))[folder]
            keys = ("win_rate", "length_matched", "rubric", "kl", "length", "eos")
            found[temperature] = {key: row[key] if row[key] is None else round(row[key], 4) for key in keys}
        if method in BETAS:
            found["accuracy"] = curves(name_of(method, value, seed))["accuracy"][-1]
        yield found


def table(found):
    """Markdown, a row for each method and beta or alpha."""
    columns = [("0.01", "win_rate"), ("1.0", "win_rate"), ("0.01", "rubric"), ("1.0", "rubric")]
    columns += [("1.0", "kl"), ("1.0", "length"), ("1.0", "eos")]
    titles = [f"{key.replace('_', ' ')}, T {float(t):g}" for t, key in columns]
    lines = ["| | | validation accuracy | " + " | ".join(titles) + " |", "|---" * (len(columns) + 3) + "|"]
    for (method, value), part in found.items():
        cells = [cell(key, [run[temperature][key] for run in part]) for temperature, key in columns]
        cells.insert(0, cell("accuracy", [run["accuracy"] for run in part]) if method in BETAS else "")
        lines.append(f"| {method} | {'' if value is None else value} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    args = arguments(__doc__, (1, 2, 3))
    if not args.table:
        train(args.seeds, args.workers, {"sft", "reward", "dpo", "dpo_ln"})
        sweep("DPO, LN-DPO", {name: run for s in args.seeds for name, run in runs_of(s).items()}, args.workers)
        for seed in args.seeds:
            for aligned, alphas in ALPHAS.items():  # the last one is written last
                extrapolate(policies(seed)[f"expo_{aligned}", alphas[-1]], expo_command(aligned, seed))
        tables = [(seed, temperature) for seed in args.seeds for temperature in TEMPERATURES]
        sweep("judge", {judged(*table): judge_command(*table) for table in tables}, args.workers)
        write(OUT, [record for seed in args.seeds for record in records(seed)], "method", "value", "seed")
    rows = {}
    for run in json.loads(OUT.read_text()):
        rows.setdefault((run["method"], run["value"]), []).append(run)
    print(
        f"\n400 test prompts, seeds {sorted({run['seed'] for part in rows.values() for run in part})}; win rates in percent"
    )
    print("mean ± standard deviation over seeds\n")
    print(table(rows))
    print(
        "\nLN-DPO minus DPO at a twentieth of its beta, within a seed, mean ± half of the 95% interval; wins in points\n"
    )
    columns = [(t, key) for key in ("win_rate", "length_matched", "rubric") for t in ("0.01", "1.0")]
    titles = " | ".join(f"{key.replace('_', ' ')}, T {float(t):g}" for t, key in columns)
    print(f"| beta of LN-DPO | {titles} |\n" + "|---" * (len(columns) + 1) + "|")
    for beta in BETAS["dpo_ln"]:
        others = {run["seed"]: run for run in rows.get(("dpo", beta / 20), ())}
        cells = []
        for t, key in columns if others else ():
            middle, half = interval([run[t][key] - others[run["seed"]][t][key] for run in rows["dpo_ln", beta]])
            cells.append(
                f"{middle:+.3f} ± {half:.3f}" if key == "rubric" else f"{100 * middle:+.1f} ± {100 * half:.1f}"
            )
        if cells:
            print(f"| {beta:g} | " + " | ".join(cells) + " |")
