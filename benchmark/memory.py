"""Peak memory and time of one real ppo.py update, with and without what saves memory; prints a markdown table.

    python benchmark/memory.py                             # a few minutes on two cores, without a GPU

One update of 64 episodes at 512 + 53 tokens, vocabulary 50,304 (Pythia's), one PPO epoch, random weights: GPT-NeoX, width
128, 6 layers. Each variant is a process of its own; the peak is its largest resident size as the kernel counts it (wait4),
Python and torch included, which the first row shows alone.
The largest takes 6 GiB.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPTNeoXConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPT, RESPONSE, VOCABULARY, ROWS = 512, 53, 50_304, 64
STAGES = ("time/rollout", "time/score", "time/optimise")
# log-probs as they are usually written: the head at every position, log_softmax of all of it
NAIVE = """\
def token_logprobs(model, prompt_ids, prompt_mask, response_ids, response_mask, action_mask, temperature):
    input_ids, mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    logprobs = (output.logits.float() / temperature).log_softmax(-1)[:, prompt_ids.shape[1] - 1 : -1]
    return logprobs.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1) * action_mask
"""
SMALL = ("--micro-batch-size", "8")
SAVING = (*SMALL, "--gradient-checkpointing")
VARIANTS = {  # name -> whether log-probs are naive, flags
    "naive log-probs, micro-batch 8": (True, SMALL),
    "micro-batch 64, the default": (False, ()),
    "micro-batch 8": (False, SMALL),
    "and --gradient-checkpointing": (False, SAVING),
    "and --dtype bfloat16": (False, (*SAVING, "--dtype", "bfloat16")),
    "and --lora-rank 16": (False, (*SAVING, "--dtype", "bfloat16", "--lora-rank", "16")),
}


def write_inputs(folder):
    """A random policy, reward model and dataset, whose prompts are cut to exactly PROMPT tokens."""
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ROOT, "data/tiny_pythia"))
    sizes = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = GPTNeoXConfig(**sizes, **ids, vocab_size=VOCABULARY, num_labels=1)
    transformers.logging.disable_progress_bar()
    torch.manual_seed(1)
    for name, auto_class in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        auto_class.from_config(config).save_pretrained(os.path.join(folder, name))
        tokenizer.save_pretrained(os.path.join(folder, name))
    row = {"prompt": " my boss" * PROMPT, "completion": " i feel sad" * RESPONSE}
    os.mkdir(os.path.join(folder, "dataset"))
    for split, number in (("train", ROWS), ("validation", 1), ("test", 1)):
        with open(os.path.join(folder, "dataset", f"{split}.jsonl"), "w") as file:
            file.write((json.dumps(row) + "\n") * number)


def write_naive(folder):
    """ppo.py with the usual token_logprobs."""
    with open(os.path.join(ROOT, "ppo.py"), encoding="utf-8") as file:
        text = file.read()
    (node,) = (node for node in ast.parse(text).body if getattr(node, "name", "") == "token_logprobs")
    lines = text.splitlines(keepends=True)
    lines[node.lineno - 1 : node.end_lineno] = [NAIVE]
    with open(os.path.join(folder, "ppo.py"), "w", encoding="utf-8") as file:
        file.write("".join(lines))


def run(command, folder):
    """-> peak resident size in GiB. The output is shown only if the process fails."""
    with tempfile.TemporaryFile() as output:
        to, env = {"stdout": output, "stderr": subprocess.STDOUT}, os.environ | {"PYTHONPATH": ROOT}  # for the copy
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=env, **to)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{output.read().decode()[-3000:]}")
    return usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder)
        write_naive(folder)
        flags = ["--dataset", "dataset", "--sft-path", "sft", "--reward-path", "reward", "--eval-rows", "1"]
        flags += ["--prompt-length", str(PROMPT), "--response-length", str(RESPONSE), "--num-ppo-epochs", "1"]
        flags += ["--total-episodes", str(ROWS), "--batch-size", str(ROWS), "--minibatch-size", str(ROWS)]
        print("| one update of ppo.py | peak, GiB | seconds |\n|---|---|---|")
        print(f"| nothing, `--help` | {run([os.path.join(ROOT, 'ppo.py'), '--help'], folder):.2f} | |", flush=True)
        for number, name in enumerate(args.variants):
            naive, more = VARIANTS[name]
            script, run_name = os.path.join(folder if naive else ROOT, "ppo.py"), f"run_{number}"
            out = ["--run-name", run_name, "--output-dir", f"out_{number}"]
            peak = run([script, *flags, *more, *out], folder)
            with open(os.path.join(folder, "runs", run_name, "metrics.jsonl")) as file:
                metrics = json.loads(file.readlines()[-1])
            seconds = sum(value for key, value in metrics.items() if key in STAGES)
            print(f"| {name} | {peak:.2f} | {seconds:.1f} |", flush=True)
