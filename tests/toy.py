"""A training script in little: a linear map learns to flip its input. It uses plumbing/ as the real ones do."""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing import inputs
from plumbing.flags import read_args
from plumbing.processes import gradient_norm, in_chunks, in_parts, micro_batches, start_processes, sum_over_processes
from plumbing.runs import Run
from plumbing.sharding import forward_pass, shard


@dataclass
class Args:
    """the toy"""

    seed: int = 1
    train_split: str = "train"
    output_dir: str = "out"
    base_model: str = "toy"  # never read
    dataset: str = "numbers"  # never read
    num_epochs: int = 8  # an update each
    batch_size: int = 16
    minibatch_size: int = 8
    learning_rate: float = 1e-2
    width: int = 16
    wait: float = 0  # seconds an update takes on top
    nan_at: int = 0  # update at which row 5 holds a NaN


@forward_pass
def errors(model, x):
    return (model(x) - x.flip(1)).square().mean(1)


if __name__ == "__main__":
    args = read_args(Args, may_be_0="wait nan_at")
    device = start_processes(args, minibatch_size=args.minibatch_size)
    run = Run(args)
    if os.path.exists("rows"):  # as load_rows does
        inputs["rows, train"] = open("rows").read()
    torch.manual_seed(args.seed)
    data, lengths, size = torch.randn(16, args.width, device=device), torch.arange(16) % 5, args.micro_batch_size
    model = torch.nn.Linear(args.width, args.width)
    model = shard(model) if args.shard else model.to(device)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate)
    run.open(parameters, optimizer)
    if not run.history:  # as in dpo.py: measured once, needed in every update
        measure = partial(in_chunks, errors, model, size)
        run.state["before"] = in_parts(lambda rows: measure(rows, lengths=rows[:, 0]), data, 3, "before")
        run.history.append({"epoch": 0, "error": run.state["before"].mean().item()})
    for update in run.updates(args.num_epochs):
        picked = torch.from_numpy(np.random.default_rng([args.seed, update]).permutation(16))
        data[5, 0] += torch.nan if update == args.nan_at else 0
        found = in_chunks(errors, model, size, data, lengths=lengths)
        run.check_finite(torch.arange(16), errors=found)
        for minibatch in picked.split(args.minibatch_size):
            sums = Counter()
            for micro in micro_batches(minibatch, lengths, size):
                loss = errors(model, data[micro]).sum() / len(minibatch)
                loss.backward()
                sums["loss"] += loss.item()
            sum_over_processes(sums, parameters)
            norm = gradient_norm(parameters)
            run.check_finite(minibatch, norm=norm, **sums)
            optimizer.step()
            optimizer.zero_grad()
        time.sleep(args.wait)
        run.lap("update")
        run.history.append({"epoch": update, "error": found.mean().item()})
        run.log({"loss": sums["loss"], "norm": norm, "gained": (run.state["before"] - found).mean()}, loss=sums["loss"])
    run.finish({"toy": {"error": run.history[-1]["error"]}}, "16 rows", ["a sample", "another"])
