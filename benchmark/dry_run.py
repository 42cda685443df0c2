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
import sys
from contextlib import ExitStack
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from plumbing import chat, fail, flags, models, rows, runs, tokens  # noqa: E402

NUM_ROWS = 8
EMPTY = torch.device("meta")  # tensors there have shapes and nothing else
FIRST_STEP = "data/tiny_pythia"  # what the missing defaults of the embedded task would be trained from
READ_ARGS, LOAD_ROWS = flags.read_args, rows.load_rows
LOAD, MAKE_TRAINABLE = models.load, models.make_trainable


class Stop(BaseException):
    """The script is about to write for the first time. No Exception, so that nothing on the way holds it up."""


class Start:
    """What stands in for the functions of plumbing that take long or write, and what the script told them.

    planned: folder that a real run would have by now -> its base model and labels of its config.
    """

    def __init__(self, planned):
        self.planned, self.args, self.splits, self.models, self.parameters = planned, None, None, [], {}

    def run(self, script, flags_of_script):
        """Up to the first write -> name -> model. A script imports what it finds in plumbing, so that is replaced before."""
        stand_ins = {
            flags: {"read_args": self.read_args},
            rows: {"load_rows": self.load_rows},
            models: {name: getattr(self, name) for name in ("load", "load_model", "build_missing", "make_trainable")}
            | {"content_id": lambda path: path, "check_model": lambda *_: None},  # judged_models() checks them
            runs.Run: {"open": lambda run, parameters, optimizer: self.stop(parameters)},
            chat: {"cached": lambda path, make: self.stop({})},
            sys: {"argv": [script, *flags_of_script]},
        }
        with ExitStack() as stack:
            for owner, attributes in stand_ins.items():
                stack.enter_context(mock.patch.multiple(owner, **attributes))
            try:
                runpy.run_path(script, run_name="__main__")
            except Stop:
                return self.judged_models() if hasattr(self.args, "policies") else self.named_models()
            raise RuntimeError(f"{script} ended without writing anything")

    def stop(self, parameters):
        """Where a training script takes its folder, with all it trains in hand, and judge.py looks for completions."""
        self.parameters = parameters
        raise Stop

    def read_args(self, *args, **kwargs):
        self.args = READ_ARGS(*args, **kwargs)
        return self.args

    def load_rows(self, dataset, config, splits, columns, tokenizer_path, limit=0):
        """The first rows, again and again until they fill a batch, which scripts insist on, or the judge's prompts."""
        found = LOAD_ROWS(dataset, config, splits, columns, self.known(tokenizer_path)["base"], limit=NUM_ROWS)
        needed = max(NUM_ROWS, getattr(self.args, "batch_size", 0), getattr(self.args, "num_prompts", 0))
        found = {split: list(itertools.islice(itertools.cycle(part), needed)) for split, part in found.items()}
        self.splits = self.splits or found  # reward_model.py reads its references after its pairs
        return found

    def load(self, auto_class, path, **kwargs):
        """A tokenizer or a config; of a folder that is only planned, that of its base."""
        labels = self.known(path)["labels"] if auto_class is AutoConfig else {}
        return LOAD(auto_class, self.known(path)["base"], **labels | kwargs)

    def build_missing(self, *wanted):
        """What a real run would train first counts as there."""
        for path, default, script in wanted:
            if path != default:
                self.load(AutoTokenizer, path)
            elif not os.path.exists(f"{path}/config.json") and os.path.normpath(path) not in self.planned:
                self.plan(path, script, FIRST_STEP)

    def load_model(self, auto_class, path, tokenizer, args, device=None, may_be_empty=False, **config):
        with EMPTY:
            model = auto_class.from_config(self.load(AutoConfig, path, **config), dtype=torch.float32)
        models.check_fit(model, path, tokenizer, args.prompt_length + args.response_length)
        model.has_cache = True
        self.models.append(model)
        return model.eval()

    def make_trainable(self, *args):
        with EMPTY:  # LoRA's adapters as well
            return MAKE_TRAINABLE(*args)

    def known(self, path):
        return self.planned.get(os.path.normpath(path), {"base": path, "labels": {}})

    def plan(self, path, script, base):
        labels = {"num_labels": 1} if script == "reward_model.py" else {}
        self.planned[os.path.normpath(path)] = {"base": base, "labels": labels}

    def named_models(self):
        """Name -> model, trained ones first; of the frozen ones there is at most one of each kind."""
        owner, found = {id(x): name.split(".")[0] for name, x in self.parameters.items()}, {}
        for model in self.models:
            names = {owner[id(x)] for x in model.parameters() if id(x) in owner}
            found[names.pop() if names else "reward_model" if hasattr(model, "score") else "ref_policy"] = model
        return dict(sorted(found.items(), key=lambda item: not trained_part(item[1], self.parameters)))

    def judged_models(self):
        """Path -> model. Three policies, though judge.py has two at a time and scores after them: an upper bound."""
        args, causal, scalar = self.args, AutoModelForCausalLM, AutoModelForSequenceClassification
        paths = dict.fromkeys([*dict.fromkeys((args.sft_path, *args.policies))][:3], causal)
        paths |= dict.fromkeys((path for path in (args.reward_path, args.judge_path) if path), scalar)
        return {path: self.load_model(kind, path, self.load(AutoTokenizer, path), args) for path, kind in paths.items()}


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def trained_part(model, parameters):
    """Those of a model's parameters that the optimizer has."""
    known = {id(x) for x in parameters.values()}
    return [x for x in model.parameters() if id(x) in known]


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


def estimate(models, parameters, args, pairs):
    """Name -> bytes. What comes after AdamW follows each other, so the largest of it enters the total."""
    prompt, response = args.prompt_length, args.response_length
    size = min(args.micro_batch_size, getattr(args, "minibatch_size", getattr(args, "batch_size", sys.maxsize)))
    learning = [model for model in models.values() if trained_part(model, parameters)]
    trained_bytes = 4 * sum(count(trained_part(model, parameters)) for model in learning)
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


def report(script, start, models):
    """Prints what the script read and built."""
    args, parameters = start.args, start.parameters
    found = [row for split in start.splits.values() for row in split[:NUM_ROWS]]
    if hasattr(args, "policies"):  # judge.py encodes copies of the rows, and their references for each of its models
        tokenizer = start.load(AutoTokenizer, args.sft_path)
        kinds = {"prompt": ("prompts", args.prompt_length), "completion": ("responses", args.response_length)}
        for column, name in (("prompt", "prompt_ids"), ("completion", "reference_ids")):
            for row, ids in zip(found, tokens.encode(tokenizer, [row[column] for row in found], *kinds[column])):
                row[name] = ids
    print(f"\ndry run of {script}: it would start now\n\nfirst row\n  prompt: {shorten(found[0]['prompt'])}")
    for name in ("chosen", "rejected") if "chosen_ids" in found[0] else ("completion",):
        print(f"  {name}: {shorten(found[0][name])}")
    lengths = {name: max(len(row[name]) for row in found) for name in found[0] if name.endswith("_ids")}
    print("\nlongest of the rows read, in tokens: ", end="")
    print(", ".join(f"{name[:-4]} {length}" for name, length in lengths.items()))
    longest = args.prompt_length + args.response_length
    batch = getattr(args, "batch_size", 0) or args.num_prompts or NUM_ROWS
    print(f"batch ({batch}, {longest}), micro-batch ({min(args.micro_batch_size, batch)}, {longest}), at the longest")

    print(f"\n{'model':32}{'parameters':>16}{'trained':>16}")
    for name, model in models.items():
        print(f"{name:32}{count(model.parameters()):16,}{count(trained_part(model, parameters)):16,}")
    print(f"\n{'memory, an estimate':44}{'GiB':>8}")
    for name, size in estimate(models, parameters, args, "chosen_ids" in found[0]).items():
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
    path = os.path.join(ROOT, options.script)
    if not os.path.isfile(path):
        fail(f"there is no script {path}")
    start = Start(planned)
    report(options.script, start, start.run(path, options.flags))
    if options.chain and hasattr(start.args, "output_dir"):
        first = start.args.base_model if hasattr(start.args, "base_model") else start.args.sft_path
        start.plan(start.args.output_dir, options.script, start.known(first)["base"])
        with open(options.chain, "w", encoding="utf-8") as file:
            json.dump(planned, file, indent=2)
