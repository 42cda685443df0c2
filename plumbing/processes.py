"""Several processes of torchrun on one batch: rows are dealt out, results put together, gradients added up.

A row's random numbers belong to the row and every mean is taken over the whole batch, so the number of processes, like the
size of micro-batches, changes rounding and nothing else.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing import fail


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_processes(args, **shared):
    """-> device; alone, or as one of `torchrun --nproc-per-node N SCRIPT ...`. shared: sizes of what is dealt out evenly."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" in os.environ:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            timeout = timedelta(seconds=min(args.process_timeout, 10**9))
            dist.init_process_group(timeout=timeout)  # gloo, and NCCL for tensors on a GPU
        except (ValueError, RuntimeError) as error:
            fail(f"$RANK is set, as by torchrun, but this is no process of it: {str(error).splitlines()[0]}")
        if rank() > 0:  # rank 0 alone speaks and writes
            sys.stdout = open(os.devnull, "w")
    for name, size in shared.items():
        if size % world():
            fail(f"--{name.replace('_', '-')} {size} must be a multiple of the {world()} processes")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for large tensors, read at the first of them
    torch.set_autocast_dtype(device.type, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # note: its copies of the weights would outlive an optimizer step
    torch.set_autocast_enabled(device.type, args.dtype == "bfloat16")
    return device


def barrier(last=False):
    """Waits for the other processes, if there are any; after the last time each goes its own way."""
    if dist.is_initialized():
        barrier.work = dist.barrier(async_op=True)  # kept: a thread that frees it aborts a process about to exit
        barrier.work.wait()
        if last:  # else the threads behind it may do that
            dist.destroy_process_group()


def go_on_alone():
    """What follows takes one process: the others end here."""
    others = rank() > 0
    barrier(last=True)
    if others:
        sys.exit()


@torch.no_grad()
def in_chunks(function, model, size, *tensors, lengths, **kwargs):
    """function(model, *tensors, **kwargs) without gradients, on `size` rows at a time.

    Rows of like `lengths` (B,) are together, which saves padding; several lengths: the first counts most. The processes
    share the rows; every one gets the whole result, in the order of the rows.
    """
    order = torch.arange(len(tensors[0]), device=tensors[0].device)
    for length in reversed(lengths if isinstance(lengths, tuple) else (lengths,)):
        order = order[length[order].argsort(stable=True)]
    mine = order.repeat(world())[: -(-len(order) // world()) * world()][rank() :: world()]  # equally many for each
    parts = tqdm(mine.split(size), desc="rows", leave=False, delay=3, disable=rank() > 0)  # shown after 3 seconds
    found = torch.cat([function(model, *(tensor[rows] for tensor in tensors), **kwargs) for rows in parts])
    if world() > 1:
        parts = [torch.empty_like(found) for _ in range(world())]
        dist.all_gather(parts, found.contiguous())
        found = torch.stack(parts, dim=1).flatten(0, 1)  # as they were dealt out
    return found[order.argsort()]


def in_parts(function, rows, size, title):
    """function(rows) -> tensor or list, on `size` rows of every process at a time, each part padded to its longest row."""
    starts = range(0, len(rows), size * world())
    progress = tqdm(starts, desc=title, unit="batch", disable=rank() > 0)
    parts = [function(rows[start : start + size * world()]) for start in progress]
    return torch.cat(parts) if torch.is_tensor(parts[0]) else sum(parts, [])


def micro_batches(rows, lengths, size):
    """Numbers of rows (n,) -> this process's share in parts of `size`, rows of like lengths (B,) together."""
    return rows[lengths[rows].argsort(stable=True)][rank() :: world()].split(size)


def sum_over_processes(sums, parameters):
    """Adds up sums (name -> number) and gradients, in place; those of sharded parameters are sums already."""
    if dist.is_initialized():
        gradients = [p.grad for p in parameters.values() if p.grad is not None and not hasattr(p.grad, "full_tensor")]
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        for tensor in (totals, *gradients):
            dist.all_reduce(tensor)
        for name, total in zip(list(sums), totals.tolist()):
            sums[name] = total


def gradient_norm(parameters):
    """Norm of all gradients as one vector, those of sharded parameters included."""
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters.values() if p.grad is not None)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
