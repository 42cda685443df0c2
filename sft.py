r"""Supervised fine-tuning (SFT): the policy that ppo.py, drpo.py and dpo.py start from and stay near.

Next-token loss on the dataset's responses. A base model folder without weights (data/tiny_pythia) is initialised from
its config; with the prompt tokens in the loss, as in the official code, that run doubles as its pretraining.

    python sft.py                                          # embedded task, about a minute and a half on two cores
    python sft.py --base-model EleutherAI/pythia-1b-deduped --dataset trl-lib/tldr --learning-rate 3e-6 --num-epochs 1 \
        --batch-size 64 --prompt-length 512 --response-length 53

N+ = arXiv:2403.17031. "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr. What differs from it:
 1. responses are padded by mask and end in a real EOS target; nothing is learned on padding.
 2. linear learning-rate decay (the paper's; the official code decays by a cosine), beta2 0.95, no dropout, LoRA by flag.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class Args:
    seed: int = 1
    """seed of every random draw: data order, sampling, initial weights"""
    dataset: str = "data/tldr_mini/reference"
    """hub name, folder or .jsonl/.parquet file with `prompt` and `completion`"""
    dataset_config: str = ""
    """configuration of a hub dataset, such as 3.0.0 of cnn_dailymail"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    base_model: str = "data/tiny_pythia"
    """folder or hub name of the model to start from; a folder without weights is initialised from its config"""
    output_dir: str = "models/sft"
    """folder for the final model; a folder already there is kept under a numbered name"""
    run_name: str = ""
    """folder under runs/ for metrics.jsonl and args.json; empty: script, seed and time"""
    resume: str = ""
    """run to go on with: its name under runs/; the other flags are those of the run"""
    save_every: int = 20
    """updates between two checkpoints in the run's folder, for --resume"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    process_timeout: int = 1800
    """seconds that the processes of torchrun wait for each other before the run fails"""

    # algorithm
    num_epochs: int = 6
    """passes over the train split; 1 in the paper, whose models are pretrained"""
    batch_size: int = 16
    """rows per optimizer step"""
    micro_batch_size: int = 64
    """rows per forward and backward pass; lower it to save memory, results agree to rounding"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products; weights, optimizer, log-probs and losses stay in float32"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory for a third more computation"""
    lora_rank: int = 0
    """rank of LoRA adapters, trained in place of the weights (r; 1024 in the paper); 0: all weights are trained"""
    lora_alpha: float = 32
    """adapters are scaled by this over the rank (alpha; 2048 in the paper)"""
    lora_target: str = "all-linear"
    """layers with adapters: all-linear, or names such as query_key_value,dense"""
    learning_rate: float = 4e-3
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    train_on_prompt: bool = True
    """also learn to predict the prompt (as the official code does), not the response alone"""
    temperature: float = 1.0
    """sampling temperature of the samples shown at the end"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""


# data
def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_args():
    """The command line; with --resume the flags of that run, of which few may be given another value."""
    args = tyro.cli(Args)
    if args.resume:
        try:
            with open(os.path.join("runs", args.resume, "args.json")) as file:
                saved = json.load(file) | {"resume": args.resume}
        except (OSError, ValueError) as error:
            fail(f"--resume {args.resume}: there is no such run: {error}")
        script = saved.pop("script", "another script")
        if script != os.path.basename(__file__) or saved.keys() != vars(args).keys():
            fail(f"--resume {args.resume} is a run of {script}, with the flags {', '.join(saved)}")
        args = tyro.cli(Args, default=Args(**saved))
        free = "save_every keep_checkpoints output_dir process_timeout micro_batch_size gradient_checkpointing".split()
        for name in sorted(saved.keys() - free):
            old, new, may_grow = saved[name], getattr(args, name), name in ("total_episodes", "num_epochs")
            if new != old and not (may_grow and new > old):
                change = "can only grow" if may_grow else "cannot change"
                fail(f"--{name.replace('_', '-')} is {old!r} in {args.resume} and {change} within a run")
    return args


def check_numbers(args, may_be_0):
    """Ends the program at a flag whose number makes no sense; missing_eos_score alone may be negative."""
    for name, value in vars(args).items():
        number = type(value) in (int, float) and name != "missing_eos_score"
        if number and not (value > 0 or (value == 0 and name in may_be_0)):
            fail(f"--{name.replace('_', '-')} {value} must be {'at least' if name in may_be_0 else 'above'} 0")


def load(auto_class, path, **kwargs):
    """`from_pretrained` of a folder or hub name, weights from safetensors alone; what fails there becomes one line."""
    try:
        return auto_class.from_pretrained(path, **kwargs, **({"use_safetensors": True} if "dtype" in kwargs else {}))
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        fail(f"cannot load {path}: {(str(error) or repr(error)).strip().splitlines()[0]}")


def check_size(model, path, tokenizer, length):
    """Ends the program if the model has too few embeddings for the tokenizer or too few positions for `length` tokens."""
    rows, positions = model.get_input_embeddings().num_embeddings, getattr(model.config, "max_position_embeddings", 0)
    if rows < len(tokenizer):
        fail(f"{path}: the embedding has {rows} rows, the tokenizer {len(tokenizer)} tokens; take its own tokenizer")
    if positions and positions < length:
        fail(f"{path} has {positions} positions; --prompt-length and --response-length add up to {length}")


def make_trainable(model, frozen, args):
    """Recomputed layers and LoRA adapters (arXiv:2106.09685) where args ask for them; -> what save_folder takes.

    Under the adapters, at first without effect, lie the weights of `frozen`, stored once. The head `score` is trained too.
    """
    for layer in model.modules() if args.gradient_checkpointing else ():
        if isinstance(layer, GradientCheckpointingLayer):  # every decoder layer is one
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.lora_rank == 0:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        fail("--lora-rank needs peft: pip install peft")
    torch.manual_seed(args.seed)
    model.load_state_dict(frozen.state_dict(), assign=True)
    kind = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    names = args.lora_target if args.lora_target == "all-linear" else args.lora_target.split(",")
    config = LoraConfig(task_type=kind, r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=names)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        fail(f"--lora-target {args.lora_target}: {str(error).splitlines()[0]}")


def start_processes(timeout):
    """-> device, rank and number of processes; alone, or one of `torchrun --nproc-per-node N SCRIPT ...`."""
    rank, local = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(timeout=timedelta(seconds=timeout))  # gloo, and NCCL for tensors on a GPU
    if rank > 0:  # rank 0 alone speaks and writes
        sys.stdout = open(os.devnull, "w")
    return device, rank, dist.get_world_size()


def trainable(**models):
    """Name -> parameter of everything that is trained."""
    named = {kind: model.named_parameters() for kind, model in models.items()}
    return {f"{kind}.{name}": p for kind, pairs in named.items() for name, p in pairs if p.requires_grad}


def load_rows(dataset, config, splits, columns, tokenizer):
    """Split -> list of dicts with text in `columns`. data/rows.py reads and checks; it knows the shapes of public data."""
    reader = os.path.join(os.path.dirname(__file__), "data", "rows.py")
    flags = ["--config", config, "--tokenizer", tokenizer, "--columns", *columns, "--splits", *dict.fromkeys(splits)]
    done = subprocess.run([sys.executable, reader, dataset, *flags], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(2)  # it has said why
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {split: [line["row"] for line in lines if line["split"] == split] for split in splits}


def cut_prompt(tokenizer, text, ids, limit):
    """At most `limit` ids of a text: a TL;DR post loses last paragraphs, then sentences; what is still too long, its start."""
    parts = re.fullmatch(r"(SUBREDDIT: .*?\n+POST: )(.*\S|)(\s*TL;DR:\s*)", text, re.DOTALL)
    post = parts[2][: len(tokenizer.decode(ids[:limit]))] if parts else ""  # more cannot fit, and each try takes time
    while len(ids) > limit and (kept := re.match(r".*\S(?=\s*\n)|.*[.!?](?= )", post, re.DOTALL)):
        post, ids = kept[0], tokenizer(f"{parts[1]}{kept[0]}{parts[3]}")["input_ids"]
    begin = ids[:1] == [tokenizer.bos_token_id]  # which stays
    return ids[:begin] + ids[begin + max(0, len(ids) - limit) :]


def encode(tokenizer, texts, kind, max_length):
    """Token ids of each text. Prompts are cut by cut_prompt, responses end at EOS and are cut from the right."""
    ids, eos = tokenizer(texts, add_special_tokens=kind == "prompts")["input_ids"], tokenizer.eos_token_id
    if eos is None:
        fail(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, and that is how a response ends")
    if kind == "responses":  # some datasets spell the EOS out in the text: the first one ends the response
        ids = [row[: [*row, eos].index(eos)] + [eos] for row in ids]
    cut = [number for number, row in enumerate(ids) if len(row) > max_length]
    for number in cut if kind == "prompts" else ():
        ids[number] = cut_prompt(tokenizer, texts[number], ids[number], max_length)
    if cut:
        print(f"note: {len(cut)} of {len(ids)} {kind} have more than {max_length} tokens and were cut")
    return [row[:max_length] for row in ids]


def pad(rows, side, device):
    """Lists of token ids -> ids (B, L) long with 0 where padded, mask (B, L) bool."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def trim(ids, mask):
    """Drops the columns (B, L) at the left that are padding in every row."""
    start = int(mask.any(0).long().argmax())
    return ids[:, start:], mask[:, start:]


# log-probs
def response_states(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Hidden states (B, R + 1, d): column t has read the prompt and t response tokens. The only place that shifts."""
    mask = torch.cat([prompt_mask, response_mask], dim=1)  # (B, P + R)
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : mask.sum(1).max()]  # (B, L): what is real comes first
    ids = torch.cat([prompt_ids, response_ids], dim=1).gather(1, order)  # note: nothing sees padding on its right
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, d)
    column = torch.arange(-1, response_ids.shape[1], device=mask.device) + prompt_mask.sum(1)[:, None]  # (B, R + 1)
    return hidden.gather(1, column.clamp(max=ids.shape[1] - 1).unsqueeze(2).expand(-1, -1, hidden.shape[2]))


class TokenLogprob(torch.autograd.Function):
    """log_softmax(logits / temperature) at the tokens: (N, V), (N,) -> (N,), and no second tensor of that size is made.

    note: the backward pass writes the gradient over the logits, some rows at a time, so it can run only once.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        ctx.save_for_backward(logits, tokens)
        ctx.temperature, ctx.rows = temperature, 1 + 2**21 // logits.shape[1]  # 8 MiB at once stay in a CPU's cache
        parts = zip(logits.split(ctx.rows), tokens.split(ctx.rows))
        return -torch.cat([F.cross_entropy(part.float() / temperature, aim, reduction="none") for part, aim in parts])

    @staticmethod
    def backward(ctx, gradient):
        all_logits, tokens = ctx.saved_tensors
        columns = (tokens.unsqueeze(-1), gradient.unsqueeze(-1) / ctx.temperature)  # each (N, 1)
        for logits, aim, upper in zip(*(tensor.split(ctx.rows) for tensor in (all_logits, *columns))):
            probs = (logits.float() / ctx.temperature).softmax(-1)
            logits.copy_(probs.mul_(-upper).scatter_add_(-1, aim, upper))
        return all_logits, None, None


def token_logprobs(model, prompt_ids, prompt_mask, response_ids, response_mask, action_mask, temperature):
    """Log-probs (B, R) of the response tokens where action_mask is True, 0 elsewhere.

    The output head runs there only. note: logits that a model rescales after its head need that added here and below.
    """
    states = response_states(model, prompt_ids, prompt_mask, response_ids, response_mask)[:, :-1]
    hidden, tokens = states[action_mask], response_ids[action_mask]  # (actions, d), (actions,)
    rows = len(tokens) if torch.is_grad_enabled() else 256  # without gradients, logits need not live on
    parts, head = zip(hidden.split(rows), tokens.split(rows)), model.get_output_embeddings()
    picked = torch.cat([TokenLogprob.apply(head(part), aim, temperature) for part, aim in parts])
    return torch.zeros_like(action_mask, dtype=picked.dtype).masked_scatter(action_mask, picked)


def gather(rows):
    """Every torchrun process's rows (n, ...), dealt out in turn -> all of them (n * processes, ...), in order."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def barrier(last=False):
    """Waits for the other processes of torchrun, if there are any; after the last time each goes its own way."""
    if dist.is_initialized():
        dist.barrier()
        if last:  # else the threads behind it may abort the process as it exits
            dist.destroy_process_group()


def sum_over_processes(sums, parameters):
    """Adds up sums (name -> number) and gradients, in place, over all processes of torchrun."""
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        for tensor in (totals, *gradients):
            dist.all_reduce(tensor)
        for name, total in zip(list(sums), totals.tolist()):
            sums[name] = total


@torch.no_grad()
def in_chunks(function, model, size, *tensors, key=None, **kwargs):
    """function(model, *tensors, **kwargs) without gradients, on `size` rows at a time, sorted by key, then length.

    The processes of torchrun share the rows; every one gets the whole result.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    order = sum(mask.flatten(1).sum(1) for mask in tensors[:4] if mask.dtype == torch.bool).argsort(stable=True)
    order = order if key is None else order[key[order].argsort(stable=True)]
    mine = order.repeat(world)[: -(-len(order) // world) * world][rank::world]  # equally many for every process
    parts = [function(model, *(tensor[rows] for tensor in tensors), **kwargs) for rows in mine.split(size)]
    return gather(torch.cat(parts))[order.argsort()]


# rollout
def generate(model, context_ids, context_mask, uniforms, num_tokens, eos, temperature):
    """Continues every row of a left-padded context (B, C) until EOS or its own budget num_tokens (B,).

    -> generated_ids (B, R), 0 after the end. Token t is the inverse CDF at uniforms[row, t], so a row's tokens do not
    depend on the rows beside it. The context is one forward pass; finished rows leave the batch and the cache.
    """
    generated_ids = torch.zeros_like(uniforms, dtype=torch.long)  # (B, R)
    rows, cache = torch.arange(len(uniforms), device=uniforms.device), DynamicCache(config=model.config)
    going, (ids, mask) = torch.ones_like(rows, dtype=torch.bool), trim(context_ids, context_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(uniforms.shape[1]):
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        cdf = (model.get_output_embeddings()(hidden).float() / temperature).softmax(-1).cumsum(-1)  # (rows, V)
        tokens = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True).squeeze(1)
        generated_ids[rows, t] = tokens * going
        going &= (tokens != eos) & (num_tokens[rows] > t + 1)  # differs from official code: a row ends at EOS
        if not going.any():
            break
        if going.float().mean() < 0.9:  # copying the cache for every single row would take longer
            cache.batch_select_indices(going)
            rows, tokens, positions, mask, going = (x[going] for x in (rows, tokens, positions, mask, going))
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return generated_ids


def mask_to_eos(response_ids, eos):
    """Response mask (B, R): True up to and including the first EOS."""
    is_eos = (response_ids == eos).long()
    return is_eos.cumsum(1) - is_eos == 0  # differs from official code (drpo.py:874, 881): nothing after EOS counts


# measurement and files
@contextmanager
def writing(path):
    """A full disk, a folder that cannot be written: one line, and nothing half-written stays."""
    try:
        yield
    except Exception as error:  # torch and safetensors raise kinds of their own, torch over the one that says why
        if os.path.isfile(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        reason = error.__context__ or error
        fail(f"cannot write {path}: {(str(reason) or repr(reason)).splitlines()[0]}")


def log_metrics(run_dir, writer, metrics):
    """One line of metrics.jsonl; the same numbers to TensorBoard where it is installed."""
    path = os.path.join(run_dir, "metrics.jsonl")
    with writing(path), open(path, "a") as file:
        file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items() if writer else ():
            writer.add_scalar(name, value, metrics["update"])


def save_folder(path, *parts):
    """save_pretrained of every part under a temporary name, then renamed; an earlier `path` becomes path.1, path.2."""
    path = os.path.normpath(path)
    with writing(path):
        for part in parts:
            if hasattr(part, "merge_and_unload"):  # with LoRA: the adapter alone, and the weights with it added
                part.save_pretrained(os.path.join(f"{path}.tmp", "adapter"), save_embedding_layers=False)
                part = part.merge_and_unload(safe_merge=True)  # safe: on a copy
            part.save_pretrained(f"{path}.tmp")
        if os.path.exists(path):
            number = next(n for n in range(1, 10**6) if not os.path.exists(f"{path}.{n}"))
            print(f"keeping the earlier {path} as {path}.{number}")
            os.rename(path, f"{path}.{number}")
        os.rename(f"{path}.tmp", path)


# runs that survive their process
def checkpoints(run_dir):
    """Paths of the run's checkpoints, oldest first."""
    names = sorted(name for name in os.listdir(run_dir) if re.fullmatch(r"checkpoint_\d+_\w+\.pt", name))
    return [os.path.join(run_dir, name) for name in names]


def claim_run(run_dir, args):
    """Takes the folder of a new run, or of --resume, for this process alone; what a killed one left half-written goes."""
    folder = run_dir if args.resume else f"{run_dir}.tmp{os.getpid()}"
    with writing(f"in {run_dir}, where another process may be at work"):
        os.makedirs(folder, exist_ok=True)
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as the process lives
        for path in [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tmp")]:
            (shutil.rmtree if os.path.isdir(path) else os.remove)(path)
        with open(os.path.join(folder, "args.json.tmp"), "w") as file:
            json.dump({"script": os.path.basename(__file__)} | vars(args), file, indent=2)
        os.replace(os.path.join(folder, "args.json.tmp"), os.path.join(folder, "args.json"))
        if not args.resume:
            os.rename(folder, run_dir)  # fails where another run has the name by now


def cut_metrics(run_dir, update):
    """Leaves the lines of metrics.jsonl, one an update, up to this one; those after the checkpoint will come again."""
    path = os.path.join(run_dir, "metrics.jsonl")
    lines = open(path).readlines() if os.path.exists(path) else []
    with writing(path):
        with open(f"{path}.tmp", "w") as file:
            file.writelines(lines[:update])
        os.replace(f"{path}.tmp", path)


def open_run(run_dir, args, parameters, optimizer):
    """Claims the run's folder and goes back to its last whole checkpoint, if there is one.

    -> updates done, history as it was saved. No generator is restored: every draw is fixed by seed and update.
    """
    state = {"update": 0, "history": None, "parameters": {}}
    first = not dist.is_initialized() or dist.get_rank() == 0  # it alone writes, then the others read
    if first:
        claim_run(run_dir, args)
    else:
        barrier()
    for path in reversed(checkpoints(run_dir)) if args.resume else ():
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() in path:
                state = torch.load(path, map_location="cpu", weights_only=True)
                optimizer.load_state_dict(state["optimizer"])
                break
        print(f"note: {path} is damaged, now {path}.damaged")
        os.rename(path, f"{path}.damaged")
    with torch.no_grad():
        for name, saved in state["parameters"].items():
            parameters[name].copy_(saved)
    if first:
        cut_metrics(run_dir, state["update"])
        barrier()
    return state["update"], state["history"]


def save_checkpoint(run_dir, args, parameters, optimizer, rank, update, history):
    """Written under a temporary name, then renamed to one with its checksum; the newest --keep-checkpoints stay."""
    path = os.path.join(run_dir, f"checkpoint_{update:08d}")
    if rank > 0 or any(name.startswith(path) for name in checkpoints(run_dir)):
        return
    state = {"update": update, "history": history, "parameters": parameters, "optimizer": optimizer.state_dict()}
    with writing(path):
        with open(os.path.join(run_dir, "metrics.jsonl"), "a") as file:
            os.fsync(file.fileno())  # a power cut must not leave fewer lines than the checkpoint has updates
        with open(f"{path}.tmp", "wb+") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        os.rename(f"{path}.tmp", f"{path}_{checksum}.pt")
    for old in checkpoints(run_dir)[: -args.keep_checkpoints]:
        os.remove(old)


def catch_signals():
    """A list that SIGTERM or Ctrl-C goes into, for the end of the update; Ctrl-C after that ends the program at once."""
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def receive(number, _):
        received.append(number)
        os.write(2, b"\nstopping after this update; Ctrl-C: at once\n")  # note: print is not safe here
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM comes twice where torchrun and a scheduler both send it

    for number in numbers:
        signal.signal(number, receive)
    return received


def fail_not_finite(update, rows, tensors, parameters):
    """Ends the program; names what holds NaN or infinity, at most five of them, and the rows that were at work."""
    barrier()  # rank 0 may still be saving
    tensors = tensors | {f"gradient of {name}": p.grad for name, p in parameters.items() if p.grad is not None}
    names = [name for name, value in tensors.items() if not torch.as_tensor(value).isfinite().all()]
    rows = ", ".join(map(str, sorted(rows.tolist())))
    fail(f"update {update}: not finite: {', '.join(names[:5])}; rows {rows} of --train-split")


if __name__ == "__main__":
    # arguments
    args = read_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_numbers(args, ("seed", "lora_rank", "learning_rate"))
    device, rank, world = start_processes(args.process_timeout)
    if args.batch_size % world:
        fail(f"--batch-size {args.batch_size} must be a multiple of the {world} processes")
    run_name = args.resume or args.run_name or f"{os.path.basename(__file__)[:-3]}__{args.seed}__{int(time.time())}"
    run_dir = os.path.join("runs", run_name)
    if os.path.exists(run_dir) and not args.resume and rank == 0:
        fail(f"--run-name {run_name}: {run_dir} already exists, choose another name")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for large tensors, read at the first of them
    torch.set_autocast_dtype(device.type, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # note: its copies of the weights would outlive an optimizer step
    torch.set_autocast_enabled(device.type, args.dtype == "bfloat16")
    DATA, SAMPLING = 1, 2  # a draw is fixed by (seed, one of these, epoch or update), nothing else

    # data and model
    size, tokenizer = args.micro_batch_size, load(AutoTokenizer, args.base_model)
    eos = tokenizer.eos_token_id
    names = (args.train_split, args.validation_split)
    splits = load_rows(args.dataset, args.dataset_config, names, ("prompt", "completion"), args.base_model)
    for split, rows in splits.items():
        prompts = encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)
        responses = encode(tokenizer, [row["completion"] for row in rows], "responses", args.response_length)
        splits[split] = [row | {"prompt_ids": p, "response_ids": r} for row, p, r in zip(rows, prompts, responses)]
    has_weights = not os.path.isdir(args.base_model) or any(
        name.endswith((".safetensors", ".safetensors.index.json")) for name in os.listdir(args.base_model)
    )
    if has_weights:
        policy = load(AutoModelForCausalLM, args.base_model, dtype=torch.float32).to(device)
    else:
        print(f"{args.base_model} holds no weights: initialising at random from its config")
        torch.manual_seed(args.seed)
        policy = AutoModelForCausalLM.from_config(load(AutoConfig, args.base_model), dtype=torch.float32).to(device)
    check_size(policy, args.base_model, tokenizer, args.prompt_length + args.response_length)
    policy.eval()  # note: no dropout, here as in the RL scripts
    trained = make_trainable(policy, policy, args)
    parameters = trainable(policy=policy)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True
    )
    train, validation = (splits[name] for name in names)
    num_updates = args.num_epochs * len(train) // args.batch_size
    if num_updates < 1:
        fail(f"--num-epochs {args.num_epochs} of {len(train)} rows do not fill --batch-size {args.batch_size}")
    epochs = range(args.num_epochs)  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # log
    done, history = open_run(run_dir, args, parameters, optimizer)
    save = partial(save_checkpoint, run_dir, args, parameters, optimizer, rank)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    writer = rank == 0 and SummaryWriter and SummaryWriter(run_dir, purge_step=done + 1)

    def tensors_of(rows, train_on_prompt):
        """prompt ids, mask (B, P) and target ids, mask (B, R) of some rows, padded to the longest."""
        pairs = [(row["prompt_ids"], row["response_ids"]) for row in rows]
        if train_on_prompt:  # everything after the first token becomes the response
            pairs = [(prompt[:1], prompt[1:] + response) for prompt, response in pairs]
        prompts, responses = zip(*pairs)
        return (*pad(prompts, "left", device), *pad(responses, "right", device))

    history = history or []  # validation losses
    signals = catch_signals()
    progress = tqdm(range(done + 1, num_updates + 1), initial=done, total=num_updates, unit="update", disable=rank > 0)
    for update in progress:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 1 next-token loss on a batch
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        rows = [train[i] for i in picked]
        rows.sort(key=lambda row: len(row["prompt_ids"] + row["response_ids"]))  # micro-batches with little padding
        batch = tensors_of(rows, args.train_on_prompt)
        num_tokens, sums = batch[-1].sum(), Counter()
        for part in zip(*(tensor[rank::world].split(size) for tensor in batch)):
            part_loss = -token_logprobs(policy, *part, part[-1], temperature=1.0).sum() / num_tokens
            part_loss.backward()
            sums["loss"] += part_loss.item()

        # 2 step
        sum_over_processes(sums, parameters)
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters.values() if p.grad is not None)
        grad_norm = norm.item()
        if not math.isfinite(sums["loss"] + grad_norm):
            save(update - 1, history)  # the weights from before this step
            fail_not_finite(update, picked, dict(sums), parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()

        # 3 log; once an epoch the loss per response token on the validation split
        metrics = {"update": update, "epoch": update * args.batch_size / len(train), **sums}
        metrics |= {"policy/grad_norm": grad_norm, "learning_rate": group["lr"]}
        metrics["time/update"] = time.perf_counter() - start
        if update == num_updates or update % max(1, len(train) // args.batch_size) == 0:
            batch = tensors_of(validation, False)
            logprobs = in_chunks(token_logprobs, policy, size, *batch, batch[-1], temperature=1.0)
            metrics["eval/loss"] = (-logprobs.sum() / batch[-1].sum()).item()
            history.append(metrics["eval/loss"])
            progress.set_postfix(loss=sums["loss"], validation=history[-1])
        if rank == 0:
            log_metrics(run_dir, writer, metrics)
        sum_over_processes(stop := {"signals": len(signals)}, {})
        if update % args.save_every == 0 or update == num_updates or stop["signals"]:
            save(update, history)
        if stop["signals"]:
            barrier(last=True)
            sys.exit(
                f"stopped after update {update} of {num_updates}; to go on: --resume {run_name}" if rank == 0 else 1
            )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # nothing left to finish

    # 4 save, show samples
    if rank == 0:
        save_folder(args.output_dir, trained, tokenizer)
    rows = validation
    prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (B, P), mask (B, P)
    rng = np.random.default_rng([args.seed, SAMPLING])
    uniforms = torch.from_numpy(rng.random((len(rows), args.response_length), dtype=np.float32)).to(device)
    budget = torch.full((len(rows),), args.response_length, device=device)
    sampled = in_chunks(generate, policy, 4 * size, *prompts, uniforms, budget, eos=eos, temperature=args.temperature)
    masks = mask_to_eos(sampled, eos)
    texts = [tokenizer.decode(ids[keep], skip_special_tokens=True) for ids, keep in zip(sampled, masks)]
    for row, text in list(zip(rows, texts))[:3]:
        print(f"\n{row['prompt']}\n  reference:{row['completion']}\n  SFT:      {text}")
    print(f"\nvalidation loss (nats per token) {history[-1]:10.3f}")
    print(f"validation samples with an EOS    {(sampled == eos).any(1).float().mean():9.3f}")
    print(f"policy: {args.output_dir}   metrics, arguments: {run_dir}")
    barrier(last=True)
