"""Dry run: a script's real start with empty weights, so that a wrong flag or column costs seconds instead of a night.

    python benchmark/dry_run.py drpo.py --dataset trl-lib/tldr --sft-path EleutherAI/pythia-1b-deduped ...
    python benchmark/dry_run.py --chain chain.json sft.py ...      # a later step may name an earlier one's --output-dir

The script itself runs, up to its first write: it parses its flags, reads 8 rows of every split, cuts them into tokens and
builds its models from their configs, without weights. What it was about to train on is shown, with an estimate of the
memory that training would take. Nothing is written except the chain file and the hub's caches of configs and tokenizers.

Not checked: whether weights are there and fit their config, what the first update does, and rows after the 8th.

The estimate adds what can be counted (weights, gradients, AdamW) and what is worked out for a decoder of the GPT-NeoX kind
(activations, after arXiv:2205.05198, without the attention matrices, which torch's fused attention never stores).
Measured on a CPU with benchmark/memory.py, whose model is small: a real update of ppo.py took, beyond what Python and torch
take alone, 1.05 times the estimate where that was 4.8 GiB, and 0.3 GiB more than it where it was below 1 GiB (1.3 to 2.5
times). No estimate was compared with a GPU.
"""

import argparse
import itertools
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NUM_ROWS = 8
TRAINED_BY = {"sft.py": "models/sft", "reward_model.py": "models/reward", "dpo.py": "models/dpo"}
TRAINED_BY |= {"ppo.py": "models/ppo", "drpo.py": "models/drpo"}
REAL = SimpleNamespace(run=subprocess.run, makedirs=os.makedirs, isdir=os.path.isdir, listdir=os.listdir)


class Stop(BaseException):
    """Raised at the script's first write, past its `except Exception`; `variables` are those of the script at that moment."""

    def __init__(self, variables):
        self.variables = dict(variables)


def patch(planned):
    """Replaces what takes long or writes. planned: folder that a real run would have by now -> base model, outputs."""
    transformers.logging.set_verbosity_error()

    def lookup(path):
        return planned.get(os.path.normpath(path), {"base": path, "labels": {}})

    def patch_loader(auto_class):
        load = auto_class.from_pretrained

        def from_pretrained(path, **kwargs):
            return load(lookup(path)["base"], **lookup(path)["labels"] | kwargs)

        auto_class.from_pretrained = from_pretrained

    def patch_model(auto_class):
        def from_pretrained(path, dtype, use_safetensors, **kwargs):
            return auto_class.from_config(AutoConfig.from_pretrained(path, **kwargs), dtype=dtype)

        auto_class.from_pretrained = from_pretrained

    def run(command, **kwargs):
        name, script = os.path.basename(command[1]), sys._getframe(1).f_globals
        if name == "rows.py":
            command = [lookup(part)["base"] if part in planned else part for part in command]
            done = REAL.run([*command, "--limit", str(NUM_ROWS)], **kwargs)
            done.stdout = repeat_rows(done.stdout, script["args"])
            return done
        if name in TRAINED_BY:  # build_missing: a default checkpoint that a real run would train on the embedded task
            add_planned(planned, TRAINED_BY[name], name, os.path.join(ROOT, "data/tiny_pythia"))
            return subprocess.CompletedProcess(command, 0)
        return REAL.run(command, **kwargs)

    def makedirs(*args, **kwargs):
        caller = sys._getframe(1).f_globals
        if caller["__name__"] == "__main__":
            raise Stop(caller)
        REAL.makedirs(*args, **kwargs)

    for auto_class in (AutoConfig, AutoTokenizer):
        patch_loader(auto_class)
    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        patch_model(auto_class)
    torch.nn.Module.to = lambda model, *_, **__: model  # weights without content cannot be moved
    subprocess.run, os.makedirs = run, makedirs
    os.path.isdir = lambda path: path in planned or REAL.isdir(path)
    os.listdir = lambda path=".": ["model.safetensors"] if path in planned else REAL.listdir(path)


def add_planned(planned, path, script, base):
    labels = {"num_labels": 1} if script == "reward_model.py" else {}
    planned[os.path.normpath(path)] = {"base": base, "labels": labels}


def repeat_rows(stdout, args):
    """The rows again and again until they fill a batch, which the scripts insist on, or the judge's prompts."""
    needed = max(NUM_ROWS, getattr(args, "batch_size", 0), getattr(args, "num_prompts", 0))
    splits = {}
    for line in stdout.splitlines():
        splits.setdefault(json.loads(line)["split"], []).append(line)
    lines = [line for rows in splits.values() for line in itertools.islice(itertools.cycle(rows), needed)]
    return b"\n".join(lines)


def run_script(script, flags, planned):
    """The script's variables at its first write, models without weights among them."""
    path = os.path.join(ROOT, script)
    if not os.path.isfile(path):
        print(f"error: there is no script {path}", file=sys.stderr)
        sys.exit(2)
    patch(planned)
    sys.argv = [path, *flags]
    try:
        with torch.device("meta"):
            runpy.run_path(path, run_name="__main__")
            raise RuntimeError(f"{script} ended without writing anything")
    except Stop as stop:
        return stop.variables


def find_models(variables):
    """Name -> model; trained ones first. judge.py loads its models later, and has at most two policies at a time."""
    if not hasattr(variables["args"], "policies"):
        alone = ("model",) if "policy" not in variables else ("policy",)
        names = ("policy", "critic", "ref_policy", "reward_model") if "critic" in variables else alone
        return {name: variables[name] for name in names}
    args, load, float32 = variables["args"], variables["load"], {"dtype": torch.float32}
    rewards = dict.fromkeys(path for path in (args.reward_path, args.judge_path) if path)
    models = {}
    with torch.device("meta"):
        for path in dict.fromkeys((args.sft_path, *args.policies)):
            policy = load(AutoModelForCausalLM, path, **float32)
            variables["check_size"](policy, path, variables["tokenizer"], args.prompt_length + args.response_length)
            models |= {path: policy} if len(models) < 3 else {}
        for path in rewards:
            models[path] = load(AutoModelForSequenceClassification, path, **float32)
    return models


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def trained_part(model, optimizer):
    """Parameters of a model that change: the optimizer has them, and LoRA has not frozen them."""
    known = {id(x) for group in optimizer.param_groups for x in group["params"]} if optimizer else ()
    return [x for x in model.parameters() if id(x) in known and x.requires_grad]


def weight_bytes(models):
    """Bytes of all weights; those that two models share, as a LoRA policy and its reference do, are counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for m in models for x in m.parameters()}
    return sum(storages.values())


def activation_bytes(model, tokens, args):
    """What one forward pass of `tokens` tokens keeps for the backward pass.

    A layer keeps 10 vectors of the width (its input, two norms, q, k and v before and after rotation, the attention's
    output) and 2 of the MLP's width; all but its input are half as large in bfloat16, and then every weight is there once
    more in bfloat16. Recomputed layers keep their input alone, beside one whole layer at a time.
    """
    config, half = model.config, args.dtype == "bfloat16"
    width, layers = config.hidden_size, config.num_hidden_layers
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    adapters = sum(x.shape[0] for name, x in model.named_parameters() if "lora_A" in name) / layers
    layer = tokens * (4 * width + (2 if half else 4) * (9 * width + 2 * mlp + adapters))
    embedding = model.get_input_embeddings().weight.numel()
    layer += 2 * (count(model.base_model.parameters()) - embedding) / layers * half
    if getattr(args, "gradient_checkpointing", False):
        return 4 * tokens * width * layers + layer
    return layer * layers


def cache_bytes(model, rows, length):
    """Keys and values of a rollout."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * rows * length * config.num_hidden_layers * heads * head


def estimate(models, optimizer, args, pairs):
    """Name -> bytes. What comes after AdamW follows each other, so the largest of it enters the total."""
    prompt, response = args.prompt_length, args.response_length
    size = min(args.micro_batch_size, getattr(args, "minibatch_size", getattr(args, "batch_size", sys.maxsize)))
    learning = [model for model in models.values() if trained_part(model, optimizer)]
    trained_bytes = 4 * sum(count(trained_part(model, optimizer)) for model in learning)
    parts = {"weights": weight_bytes(models.values()), "gradients": trained_bytes, "AdamW": 2 * trained_bytes}
    passes = 2 if pairs else 1  # chosen and rejected
    tokens = passes * size * (prompt + response)
    activations = [activation_bytes(model, tokens, args) for model in learning]  # of PPO's policy, then of its critic
    positions = passes * size * (prompt + response if getattr(args, "train_on_prompt", False) else response)
    causal = next((model for model in models.values() if model.get_output_embeddings() is not None), None)
    if causal is not None and learning:
        activations[0] += positions * causal.config.vocab_size * (2 if args.dtype == "bfloat16" else 4)
    if learning:
        parts["one micro-batch: activations and logits"] = max(activations)
        parts["or the optimizer's step"] = trained_bytes
    if causal is not None and not pairs:
        most = max(getattr(args, "batch_size", 0), getattr(args, "eval_rows", sys.maxsize))
        rows = min(4 * args.micro_batch_size, most) if learning else size  # judge.py samples micro-batches
        logits = 3 * 4 * rows * causal.config.vocab_size  # of one token per row: logits, probabilities, their sums
        parts["or a rollout: keys, values, logits"] = cache_bytes(causal, rows, prompt + response) + logits
    stages = list(parts.values())[3:]
    return parts | {"total": sum(list(parts.values())[:3]) + max(stages)}


def shorten(text):
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-75:]}"


def report(script, variables):
    """Prints what the script read and built; -> nothing."""
    args, models, optimizer = variables["args"], find_models(variables), variables.get("optimizer")
    if "splits" in variables:
        rows = [row for split in variables["splits"].values() for row in split[:NUM_ROWS]]
    else:  # judge.py
        rows = [row | {"prompt_ids": ids} for row, ids in zip(variables["rows"], variables["prompt_ids"])][:NUM_ROWS]
        texts = [row["completion"] for row in rows]
        for row, ids in zip(
            rows, variables["encode"](variables["tokenizer"], texts, "responses", args.response_length)
        ):
            row["reference_ids"] = ids
    print(f"\ndry run of {script}: it would start now\n\nfirst row\n  prompt: {shorten(rows[0]['prompt'])}")
    for name in ("chosen", "rejected") if "chosen_ids" in rows[0] else ("completion",):
        print(f"  {name}: {shorten(rows[0][name])}")
    lengths = {name: max(len(row[name]) for row in rows) for name in rows[0] if name.endswith("_ids")}
    print("\nlongest of the rows read, in tokens: ", end="")
    print(", ".join(f"{name[:-4]} {length}" for name, length in lengths.items()))
    longest = args.prompt_length + args.response_length
    batch = getattr(args, "batch_size", len(variables.get("rows", ())))
    print(f"batch ({batch}, {longest}), micro-batch ({min(args.micro_batch_size, batch)}, {longest}), at the longest")

    print(f"\n{'model':32}{'parameters':>16}{'trained':>16}")
    for name, model in models.items():
        print(f"{name:32}{count(model.parameters()):16,}{count(trained_part(model, optimizer)):16,}")
    print(f"\n{'memory, an estimate':44}{'GiB':>8}")
    for name, size in estimate(models, optimizer, args, "chosen_ids" in rows[0]).items():
        print(f"{name:44}{size / 2**30:8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="", help="JSON file with the folders that earlier steps would have made")
    parser.add_argument(
        "--stand-in",
        action="append",
        default=[],
        metavar="PATH=BASE",
        help="a policy or reward model of another run, and the model it starts from; may be given several times",
    )
    parser.add_argument("script", help="sft.py, reward_model.py, dpo.py, ppo.py, drpo.py or judge.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args()
    planned = {}
    if options.chain and os.path.exists(options.chain):
        with open(options.chain, encoding="utf-8") as file:
            planned = json.load(file)
    for pair in options.stand_in:
        path, _, base = pair.partition("=")
        planned[os.path.normpath(path)] = {"base": base, "labels": {"num_labels": 1}}  # which no policy looks at
    variables = run_script(options.script, options.flags, planned)
    report(options.script, variables)
    args = variables["args"]
    if options.chain and hasattr(args, "output_dir"):
        start = args.base_model if hasattr(args, "base_model") else args.sft_path
        base = planned.get(os.path.normpath(start), {"base": start})["base"]
        add_planned(planned, args.output_dir, options.script, base)
        with open(options.chain, "w", encoding="utf-8") as file:
            json.dump(planned, file, indent=2)
