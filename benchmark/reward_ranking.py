"""How well the reward model ranks what the SFT policy writes, with and without --center-coef.

    python benchmark/reward_ranking.py --seeds 1 2 3      # after benchmark/seeds.py; trains one more model a seed

8 samples for each of the 200 validation prompts at temperature 1. `overall`: correlation of score and rubric over all
samples; `within`: the same after subtracting each prompt's means; `best of 8`: mean rubric of the sample that the reward
model likes best, next to the mean of all samples. Mean and standard deviation over seeds.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.tldr_mini.rubric import rubric_score  # noqa: E402
from plumbing.processes import in_chunks  # noqa: E402
from plumbing.rows import load_rows  # noqa: E402
from plumbing.tokens import encode, pad  # noqa: E402
from ppo import generate, mask_to_eos, sequence_scores  # noqa: E402  (scripts never import each other, benchmarks may)


def ranking(sft_path, reward_path, num_samples=8, num_rows=0):
    """Column of the table -> number, from so many samples for each of the first prompts (0: all)."""
    tokenizer = AutoTokenizer.from_pretrained(sft_path)
    dataset, names = "data/tldr_mini/reference", ("prompt", "completion")
    rows = load_rows(dataset, "", ["validation"], names, sft_path, limit=num_rows)["validation"]
    policy = AutoModelForCausalLM.from_pretrained(sft_path).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_path).eval()
    prompts = pad(encode(tokenizer, [row["prompt"] for row in rows], "prompts", 128), "left", "cpu")
    lengths, eos = prompts[1].sum(1), tokenizer.eos_token_id
    budget, scores, quality = torch.full((len(rows),), 32), [], []
    for sample in range(num_samples):
        table = torch.from_numpy(np.random.default_rng(sample).random((len(rows), 32), dtype=np.float32))
        context = (*prompts, table, budget)
        ids = in_chunks(generate, policy, 64, *context, lengths=lengths, eos=eos, temperature=1.0)
        mask = mask_to_eos(ids, eos)
        batch = (*prompts, ids, mask)
        scores.append(in_chunks(sequence_scores, reward_model, 64, *batch, lengths=lengths + mask.sum(1)).numpy())
        texts = [tokenizer.decode(row[keep], skip_special_tokens=True) for row, keep in zip(ids, mask)]
        quality.append([rubric_score(text, row["rubric"]) for text, row in zip(texts, rows)])
    scores, quality = np.array(scores), np.array(quality)  # (samples, prompts)
    centred = [(x - x.mean(0)).ravel() for x in (scores, quality)]
    return {
        "overall": np.corrcoef(scores.ravel(), quality.ravel())[0, 1],
        "within": np.corrcoef(*centred)[0, 1],
        "all samples": quality.mean(),
        "best of 8": quality[scores.argmax(0), np.arange(len(rows))].mean(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    os.chdir(ROOT)
    transformers.logging.disable_progress_bar()
    found = {"--center-coef 0.05": [], "--center-coef 0": []}
    for seed in seeds:
        models, plain = f"models/seeds_{seed}", f"models/seeds_{seed}/reward_uncentred"
        if not os.path.exists(plain):
            flags = ["--seed", str(seed), "--sft-path", f"{models}/sft", "--output-dir", plain, "--center-coef", "0"]
            subprocess.run([sys.executable, "reward_model.py", *flags], check=True)
        found["--center-coef 0.05"].append(ranking(f"{models}/sft", f"{models}/reward"))
        found["--center-coef 0"].append(ranking(f"{models}/sft", plain))
    columns = list(found["--center-coef 0"][0])
    print("\n| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for label, results in found.items():
        values = [[result[column] for result in results] for column in columns]
        cells = [f"{mean(x):.3f}" + (f" ± {stdev(x):.3f}" if len(x) > 1 else "") for x in values]
        print(f"| {label} | " + " | ".join(cells) + " |")
