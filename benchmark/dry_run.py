"""Dry run: a script's real start with empty weights, so that a wrong flag or column costs seconds instead of a night.

    python benchmark/dry_run.py drpo.py --dataset trl-lib/tldr --sft-path EleutherAI/pythia-1b-deduped ...
    python benchmark/dry_run.py --chain chain.json sft.py ...      # a later step may name an earlier one's --output-dir

The script itself runs, up to its first write: it parses its flags, reads 8 rows of every split, cuts them into tokens and
builds its models from their configs, without weights. What it was about to train on is shown, with the memory of weights,
gradients and AdamW. Nothing is written except the chain file and the hub's caches of configs and tokenizers.

Not checked: whether weights are there and fit their config, what the first update does, and rows after the 8th. Activations
are not estimated: an estimate that was here said 1.7 GiB where 3.0 to 3.7 were used. docs/large_models.md has why, and
measured peaks.
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
from data import COMMANDS  # noqa: E402
from plumbing import chat, fail, flags, models, rows, runs, tokens  # noqa: E402

NUM_ROWS = 8
EMPTY = torch.device("meta")  # tensors there have shapes and nothing else
FIRST_STEP = "data/tldr_mini/base"  # what the missing defaults of the embedded task would be trained from
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
        for path in wanted:
            if path not in COMMANDS:
                self.load(AutoTokenizer, path)
            elif not os.path.exists(f"{path}/config.json") and os.path.normpath(path) not in self.planned:
                script, *flags_of_script = COMMANDS[path]
                flagged = dict(zip(flags_of_script[::2], flags_of_script[1::2]))
                self.plan(path, script, flagged.get("--base-model", FIRST_STEP))

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
        """Name -> model, trained ones first; a second frozen policy is the one that rto.py reads."""
        owner, found = {id(x): name.split(".")[0] for name, x in self.parameters.items()}, {}
        for model in self.models:
            names = {owner[id(x)] for x in model.parameters() if id(x) in owner}
            kind = (
                "reward_model" if hasattr(model, "score") else "dpo_policy" if "ref_policy" in found else "ref_policy"
            )
            found[names.pop() if names else kind] = model
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


def counted_bytes(models, parameters):
    """Name -> bytes of what does not depend on the rows."""
    trained_bytes = 4 * sum(count(trained_part(model, parameters)) for model in models.values())
    parts = {"weights": weight_bytes(models.values()), "gradients": trained_bytes, "AdamW": 2 * trained_bytes}
    return parts | {"together": sum(parts.values())}


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
    print(f"\n{'memory that can be counted':44}{'GiB':>8}")
    for name, size in counted_bytes(models, parameters).items():
        print(f"{name:44}{size / 2**30:8.2f}")
    print("activations, logits and a rollout's keys and values come on top, less with a smaller --micro-batch-size")


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
    parser.add_argument("script", help="a training script, or judge.py")
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
