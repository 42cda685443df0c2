"""Does a Pythia-1B-shaped DR-PO update fit and hold on a GPU? Three real updates, random weights, seconds and peak memory.

    python benchmark/pythia_1b_gpu.py                      # one GPU with 80 GB
    python benchmark/pythia_1b_gpu.py --tiny               # seconds on a CPU: does this script itself work?

Policy, reward model and critic of 1 billion random weights each, bfloat16 matrix products, 64 episodes an update at 512 + 53
tokens. drpo.py itself runs, in this process, so that torch can be asked for the peak of each stage. What must hold: every
metric is finite, and in the first epoch, before any step, the ratio is 1 up to what bfloat16 rounds. Of random weights nothing
is learnt; the checks are the point. Not run on a GPU so far: none could be had where this was written.
"""

import argparse
import json
import math
import os
import runpy
import sys
import tempfile
import time
from unittest import mock

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPTNeoXConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from plumbing.runs import Run  # noqa: E402

LAP, UPDATES = Run.lap, Run.updates
PYTHIA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8, "intermediate_size": 8192}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
STAGES = ("rollout", "score", "optimise")
EPOCHS = 4
# mean |ratio - 1|: bfloat16 has 8 bits, and a log-prob of -11 is the sum of many rounded products
RATIO_TOLERANCE = 0.05


def write_inputs(folder, sizes, vocabulary, rows):
    """Random models and posts that are cut to the full prompt length, with summaries of every length."""
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ROOT, "data/tiny_pythia"))
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GPTNeoXConfig(**sizes, **ids, vocab_size=vocabulary, num_labels=1)
    torch.manual_seed(1)
    for name, auto_class in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            auto_class.from_config(config).save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))
    os.mkdir(os.path.join(folder, "dataset"))
    for split, number in (("train", rows), ("validation", 8), ("test", 8)):
        lines = [{"prompt": " my boss" * 600, "completion": " i feel sad" * (1 + row % 16)} for row in range(number)]
        with open(os.path.join(folder, "dataset", f"{split}.jsonl"), "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def watch(peaks):
    """Appends the peak of torch's allocator, GiB, to `peaks` in every stage of every update, which ends with run.lap."""

    def updates(run, count):
        for update in UPDATES(run, count):
            reset()  # what evaluations and checkpoints took belongs to no stage
            yield update

    def lap(run, *args, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the seconds are then those of the GPU
        peaks.append(torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan)
        LAP(run, *args, **kwargs)
        reset()

    def reset():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    return mock.patch.multiple(Run, updates=updates, lap=lap)


def flop_rate(size=8192):
    """FLOP/s of one large matrix product in bfloat16 on this GPU; on a CPU, where nobody asks, NaN."""
    if not torch.cuda.is_available():
        return math.nan
    x, seconds = torch.randn(size, size, device="cuda", dtype=torch.bfloat16), []
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def body_weights(sizes):
    """Numbers in the matrices of a body: attention 4 d^2 and MLP 2 d m a layer."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    return sizes["num_hidden_layers"] * (4 * width**2 + 2 * width * inner)


def check(name, holds):
    print(f"{'ok' if holds else 'FAILED'}: {name}")
    return holds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small numbers for everything")
    parser.add_argument("--micro-batch-size", type=int, default=16)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    rows, prompt, response = (8, 64, 24) if args.tiny else (64, 512, 53)
    sizes = TINY if args.tiny else PYTHIA_1B
    flags = ["--dtype", "bfloat16", "--gradient-checkpointing", "--micro-batch-size", args.micro_batch_size]
    flags += ["--batch-size", rows, "--minibatch-size", rows, "--total-episodes", 3 * rows, "--eval-rows", 8]
    flags += ["--num-ppo-epochs", EPOCHS]
    flags += ["--prompt-length", prompt, "--response-length", response, "--learning-rate", 3e-6, "--run-name", "gpu"]
    flags += ["--dataset", "dataset", "--sft-path", "sft", "--reward-path", "reward", "--output-dir", "policy"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs(folder, sizes, 1024 if args.tiny else 50_304, rows)
        sys.argv = ["drpo.py", *map(str, flags)]
        peaks = []
        with watch(peaks):
            runpy.run_path(os.path.join(ROOT, "drpo.py"), run_name="__main__")
        os.chdir(ROOT)
        with open(os.path.join(folder, "runs/gpu/metrics.jsonl")) as file:
            metrics = [line for line in map(json.loads, file) if line["update"] > 0]

    print(
        f"\n{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU: no peaks of memory'}, torch {torch.__version__}"
    )
    titles = [f"{stage}, s | {stage}, GiB" for stage in STAGES] + ["tokens/s", "MFU"]
    print("| update | " + " | ".join(titles) + " |\n|" + "---|" * 9)
    rate = flop_rate()
    for number, line in enumerate(metrics):
        found = peaks[number * len(STAGES) :]
        cells = [f"{line[f'time/{stage}']:.2f} | {peak:.2f}" for stage, peak in zip(STAGES, found)]
        # 6 FLOPs a weight and token of policy and critic in each epoch; what output heads, attention scores and
        # recomputation take comes on top
        tokens = rows * (prompt + line["response/length"])
        flops = 6 * 2 * body_weights(sizes) * tokens * EPOCHS
        cells += [f"{line['time/tokens_per_second']:.0f}", f"{flops / (line['time/optimise'] * rate):.2f}"]
        print(f"| {number + 1} | " + " | ".join(cells) + " |")
    ratio_error = max(line["policy/first_ratio_error"] for line in metrics)
    held = [
        check("three updates", len(metrics) == 3),
        check("all metrics are finite", all(math.isfinite(value) for line in metrics for value in line.values())),
        check(f"first-epoch ratio is 1 within {ratio_error:.2g}", ratio_error < RATIO_TOLERANCE),
    ]
    sys.exit(0 if all(held) else 1)
