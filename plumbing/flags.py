"""The command line: a script's own flags and those that every script has."""

import json
import math
import os
import signal
import sys
from dataclasses import dataclass, fields, make_dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Literal, get_args

import tyro

from plumbing import fail, steady_streams

# what --resume may change: the numbers stay the same, up to rounding
FREE = {"save_every", "keep_checkpoints", "output_dir", "process_timeout", "micro_batch_size", "gradient_checkpointing"}
FREE |= {"shard", "resume", "track"}
MAY_GROW = {"total_episodes", "num_epochs"}


@dataclass
class MachineArgs:
    """where and how to run"""

    run_name: str = ""
    """folder under runs/ for metrics, arguments, results and the picture; empty: script, seed and time"""
    dataset_config: str = ""
    """configuration of a hub dataset, such as 3.0.0 of cnn_dailymail"""
    max_rows: int = 0
    """most rows to read of every split; 0: all"""
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
    track: bool = False
    """log to Weights & Biases too (pip install wandb; without network: WANDB_MODE=offline)"""


def parse(Args, common, saved):
    """The command line as one flat object; --help shows two groups, the script's first. saved: flag -> default."""
    groups = [("algorithm", Args), ("run", common)]
    both = make_dataclass("Flags", groups)
    defaults = [kind(**{f.name: saved[f.name] for f in fields(kind) if f.name in saved}) for _, kind in groups]
    text, flat = sys.modules["__main__"].__doc__, (tyro.conf.OmitArgPrefixes,)
    found = tyro.cli(both, default=both(*defaults), description=text, config=flat)
    return SimpleNamespace(**vars(found.algorithm), **vars(found.run))


def read_args(Args, may_be_0="", trains=True):
    """The command line, checked; with --resume the flags of that run. trains: there are --resume, --shard and the like.

    Numbers must be above 0, those named in may_be_0 at least 0; missing_eos_score alone may be negative.
    """
    steady_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback
    common = RunArgs if trains else MachineArgs
    args = parse(Args, common, {})
    for name in {"run_name", "resume"} & vars(args).keys():
        value = getattr(args, name)
        if value != os.path.basename(value).strip().lstrip("."):
            fail(f"{flag(name)} {value!r} must be a plain name: no slash, no dot in front, no space around it")
    if getattr(args, "resume", ""):
        args = resumed(Args, common, args)
    may_be_0 = {"seed", "lora_rank", "max_rows", *may_be_0.split()}
    for name, value in vars(args).items():
        if type(value) in (int, float):
            if name != "missing_eos_score" and not (value > 0 or (value == 0 and name in may_be_0)):
                fail(f"{flag(name)} {value} must be {'at least' if name in may_be_0 else 'above'} 0")
            if not abs(value) < (2**63 if type(value) is int else math.inf):
                fail(f"{flag(name)} {value} must be finite, a whole number below 2**63")
    if trains and args.shard and ("RANK" not in os.environ or args.lora_rank):
        fail("--shard runs under torchrun (torchrun --nproc-per-node N SCRIPT --shard ...) and without --lora-rank")
    if trains and args.track and not find_spec("wandb"):
        fail("--track needs wandb: pip install wandb")
    return args


def flag(name):
    return f"--{name.replace('_', '-')}"


def resumed(Args, common, args):
    """The flags of the run that args.resume names, with those of the command line where they may differ."""
    try:
        with open(os.path.join("runs", args.resume, "args.json")) as file:
            saved = json.load(file)
        script, _ = saved.pop("script", "another script"), saved.pop("id", None)
    except Exception as error:  # of many kinds, whatever the file holds
        fail(f"--resume {args.resume}: there is no such run: {error}")
    if script != os.path.basename(sys.argv[0]) or saved.keys() != vars(args).keys():
        fail(f"--resume {args.resume} is a run of {script}, with the flags {', '.join(saved)}")
    for field in (*fields(Args), *fields(common)):  # each value must be one that the command line would take
        value, choices = saved[field.name], get_args(field.type)  # of a Literal
        kinds = (int, float) if field.type is float else (field.type,)
        if value not in choices if choices else type(value) not in kinds:
            fail(f"--resume {args.resume}: {flag(field.name)} cannot be {value!r}, as its args.json has it")
    args = parse(Args, common, saved | {"resume": args.resume})
    for name in sorted(saved.keys() - FREE):
        old, new, may_grow = saved[name], getattr(args, name), name in MAY_GROW
        if new != old and not (may_grow and new > old):
            change = "can only grow" if may_grow else "cannot change"
            fail(f"{flag(name)} is {old!r} in {args.resume} and {change} within a run")
    return args


def whole_batches(rows, batch_size):
    """Number of batches that the rows of all epochs fill; says what is left over."""
    if rows < batch_size:
        fail(f"the {rows} rows of all epochs do not fill --batch-size {batch_size}")
    if rows % batch_size:
        print(f"note: the last {rows % batch_size} of {rows} rows do not fill a batch and are left out")
    return rows // batch_size
