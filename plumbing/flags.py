"""The command line: a script's own flags and those that every script has."""

import json
import os
import sys
from dataclasses import dataclass, fields, make_dataclass
from types import SimpleNamespace
from typing import Literal

import tyro

from plumbing import fail

# what --resume may change: the numbers stay the same, up to rounding
FREE = {"save_every", "keep_checkpoints", "output_dir", "process_timeout", "micro_batch_size", "gradient_checkpointing"}
FREE |= {"shard", "resume"}
MAY_GROW = {"total_episodes", "num_epochs"}


@dataclass
class MachineArgs:
    """where and how to run"""

    run_name: str = ""
    """folder under runs/ for metrics, arguments, results and the picture; empty: script, seed and time"""
    dataset_config: str = ""
    """configuration of a hub dataset, such as 3.0.0 of cnn_dailymail"""
    micro_batch_size: int = 64
    """rows per forward and backward pass; lower it to save memory, results agree to rounding"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products; weights, optimizer, log-probs and losses stay in float32"""
    process_timeout: int = 1800
    """seconds that the processes of torchrun wait for each other before the run fails"""


@dataclass
class RunArgs(MachineArgs):
    """where and how to run, the same in every script; only --dtype and --lora-* change results beyond rounding"""

    resume: str = ""
    """run to go on with: its name under runs/; the other flags are those of the run"""
    save_every: int = 20
    """updates between two checkpoints in the run's folder, for --resume"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    shard: bool = False
    """split every model over the processes of torchrun (FSDP2), for models that do not fit on one device"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory for a third more computation"""
    lora_rank: int = 0
    """rank of LoRA adapters, trained in place of the weights (r; 1024 in the paper); 0: all weights are trained"""
    lora_alpha: float = 32
    """adapters are scaled by this over the rank (alpha; 2048 in the paper)"""
    lora_target: str = "all-linear"
    """layers with adapters: all-linear, or names such as query_key_value,dense"""


def parse(Args, common, saved):
    """The command line as one flat object; --help shows two groups, the script's first. saved: flag -> default."""
    groups = [("algorithm", Args), ("run", common)]
    both = make_dataclass("Flags", groups)
    defaults = [kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved}) for _, kind in groups]
    text, flat = sys.modules["__main__"].__doc__, (tyro.conf.OmitArgPrefixes,)
    found = tyro.cli(both, default=both(*defaults), description=text, config=flat)
    return SimpleNamespace(**vars(found.algorithm), **vars(found.run))


def read_args(Args, may_be_0="", trains=True):
    """The command line, checked; with --resume the flags of that run, of which few may be given another value.

    trains: with the flags of a run that can be resumed, sharded, adapted. Numbers must be above 0, those named in
    may_be_0 at least 0; missing_eos_score alone may be negative.
    """
    common = RunArgs if trains else MachineArgs
    args = parse(Args, common, {})
    if trains and args.resume:
        args = resumed(Args, common, args)
    may_be_0 = {"seed", "lora_rank", *may_be_0.split()}
    for name, value in vars(args).items():
        number = type(value) in (int, float) and name != "missing_eos_score"
        if number and not (value > 0 or (value == 0 and name in may_be_0)):
            fail(f"--{name.replace('_', '-')} {value} must be {'at least' if name in may_be_0 else 'above'} 0")
    if trains and args.shard and ("RANK" not in os.environ or args.lora_rank):
        fail("--shard runs under torchrun (torchrun --nproc-per-node N SCRIPT --shard ...) and without --lora-rank")
    return args


def resumed(Args, common, args):
    """The flags of the run that args.resume names, with those of the command line where they may differ."""
    try:
        with open(os.path.join("runs", args.resume, "args.json")) as file:
            saved = json.load(file)
    except (OSError, ValueError) as error:
        fail(f"--resume {args.resume}: there is no such run: {error}")
    script = saved.pop("script", "another script")
    if script != os.path.basename(sys.argv[0]) or saved.keys() != vars(args).keys():
        fail(f"--resume {args.resume} is a run of {script}, with the flags {', '.join(saved)}")
    args = parse(Args, common, saved | {"resume": args.resume})
    for name in sorted(saved.keys() - FREE):
        old, new = saved[name], getattr(args, name)
        if new != old and not (name in MAY_GROW and new > old):
            change = "can only grow" if name in MAY_GROW else "cannot change"
            fail(f"--{name.replace('_', '-')} is {old!r} in {args.resume} and {change} within a run")
    return args
