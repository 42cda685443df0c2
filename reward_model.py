r"""Reward model: a scalar head on the SFT model, trained on preference pairs with the Bradley-Terry loss.

The score of a prompt with a response is read at the response's last token, its EOS. After training the scores are
centred so that reference responses average 0; the constant is stored in the config as `score_mean`.

    python reward_model.py                                 # embedded task, about a minute on two cores
    python reward_model.py --sft-path my_sft --dataset trl-lib/tldr-preference --reference-dataset trl-lib/tldr \
        --eval-split validation --learning-rate 3e-6 --num-epochs 1 --batch-size 64 --prompt-length 512

DR-PO = arXiv:2404.08495v3, N+ = arXiv:2403.17031. "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr:
 1. references are scored at their real EOS; the official centring (rm.py:587) reads a padding position.
 2. linear learning-rate decay (the paper's; the official code decays by a cosine).
 3. a small penalty on each pair's mean score (--center-coef) and two epochs: the tiny model needs both, docs/ says why.
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
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class Args:
    seed: int = 1
    """seed of every random draw: data order, initial weights of the head"""
    dataset: str = "data/tldr_mini/preference"
    """hub name, folder or .jsonl/.parquet file with `prompt`, `chosen` and `rejected` (and `rubric`, for the table by margin)"""
    dataset_config: str = ""
    """configuration of a hub dataset, such as 3.0.0 of cnn_dailymail"""
    train_split: str = "train"
    """split to train on"""
    reference_dataset: str = "data/tldr_mini/reference"
    """dataset with `prompt` and `completion`, whose scores are centred to average 0"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT) to start from; the default is trained if missing"""
    output_dir: str = "models/reward"
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
    eval_split: str = "test"
    """split for the final table"""

    # algorithm
    num_epochs: int = 2
    """passes over the train split; 1 in the paper, whose models are pretrained"""
    batch_size: int = 16
    """pairs per optimizer step"""
    micro_batch_size: int = 64
    """pairs per forward and backward pass; lower it to save memory, results agree to rounding"""
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
    learning_rate: float = 1e-3
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
    center_coef: float = 0.05
    """weight of the squared sum of a pair's scores, which pulls every prompt's mean score to 0; 0 in the paper"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 40
    """most response tokens, EOS included; longer than the policies' so that rambling pairs are seen whole"""


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


def build_missing(*wanted):
    """Checks every checkpoint (path, default path, script) that the user named, then trains the missing defaults."""
    for path, default, script in sorted(wanted, key=lambda item: item[0] == item[1]):
        if path != default:
            load(AutoTokenizer, path)
        elif not os.path.isdir(path) and os.environ.get("RANK", "0") == "0":
            print(f"{path} does not exist yet: running {script} on the embedded task first", flush=True)
            alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            command = [sys.executable, os.path.join(os.path.dirname(__file__), script)]
            if subprocess.run(command, env=alone).returncode != 0:
                fail(f"{script} did not finish")
    barrier()


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


FUNCTION_WORDS = frozenset(
    "a about and at because but feel felt i in is it my now of on should so that the them this to was with".split()
)


def rubric_score(summary, facts):
    """Quality of `summary` (text) against `facts` (the key phrases of the post), in [-1, 1]; data/tldr_mini/README.md.

    +1 for each fact stated word for word, -1/2 for each repetition of a fact and for each content word that belongs
    to no stated fact, all over the number of facts; -0.05 for each word past the length of all facts plus six.
    """
    words = re.findall(r"[a-z']+", summary.lower())
    text, stated, repeated = f" {' '.join(words)} ", 0, 0
    for fact in facts:
        count = text.count(f" {fact} ")
        stated, repeated = stated + (count > 0), repeated + max(0, count - 1)
        text = text.replace(f" {fact} ", " | ")
    unsupported = sum(word != "|" and word not in FUNCTION_WORDS for word in text.split())
    excess = max(0, len(words) - sum(len(fact.split()) for fact in facts) - 6)
    return max(-1.0, (stated - 0.5 * repeated - 0.5 * unsupported) / len(facts) - 0.05 * excess)


# scores
def response_states(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Hidden states (B, R + 1, d): column t has read the prompt and t response tokens. The only place that shifts."""
    mask = torch.cat([prompt_mask, response_mask], dim=1)  # (B, P + R)
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : mask.sum(1).max()]  # (B, L): what is real comes first
    ids = torch.cat([prompt_ids, response_ids], dim=1).gather(1, order)  # note: nothing sees padding on its right
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, d)
    column = torch.arange(-1, response_ids.shape[1], device=mask.device) + prompt_mask.sum(1)[:, None]  # (B, R + 1)
    return hidden.gather(1, column.clamp(max=ids.shape[1] - 1).unsqueeze(2).expand(-1, -1, hidden.shape[2]))


def sequence_scores(reward_model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Scores (B,), read at the last real token (N+ detail 12), centred so that references average 0 (N+ detail 15)."""
    states = response_states(reward_model, prompt_ids, prompt_mask, response_ids, response_mask)
    last = states[torch.arange(len(states)), response_mask.sum(1)]  # (B, d)
    return reward_model.score(last).squeeze(-1).float() - getattr(reward_model.config, "score_mean", 0.0)


def pair_states(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share):
    """As response_states, for two responses (B, 2, R) to every prompt: (2 B, R + 1, d).

    With `share` the prompt is read once and both go on from its cache, which recomputed layers (share off) cannot do.
    """
    response_ids, response_mask = pair_ids.flatten(0, 1), pair_mask.flatten(0, 1)  # (2 B, R)
    if not share:
        prompts = prompt_ids.repeat_interleave(2, 0), prompt_mask.repeat_interleave(2, 0)
        return response_states(model, *prompts, response_ids, response_mask)
    prompt_ids, prompt_mask = trim(prompt_ids, prompt_mask)
    cache = DynamicCache(config=model.config)
    read = partial(model.base_model, past_key_values=cache, use_cache=True)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    first = read(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions).last_hidden_state[:, -1:]
    cache.batch_repeat_interleave(2)
    mask = torch.cat([prompt_mask.repeat_interleave(2, 0), response_mask], dim=1)  # (2 B, P + R)
    positions = (mask.cumsum(1) - 1)[:, prompt_ids.shape[1] :]
    rest = read(input_ids=response_ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return torch.cat([first.repeat_interleave(2, 0), rest], dim=1)


def pair_scores(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share):
    """Scores (B, 2) of the chosen and the rejected response."""
    states = pair_states(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share)
    last = states[torch.arange(len(states)), pair_mask.flatten(0, 1).sum(1)]  # (2 B, d)
    return (model.score(last).float() - getattr(model.config, "score_mean", 0.0)).view(-1, 2)


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


def preference_loss(chosen_scores, rejected_scores):
    """Bradley-Terry negative log-likelihood per pair (B,) (DR-PO Eq. 1)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


# files
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
    check_numbers(args, ("seed", "lora_rank", "learning_rate", "center_coef"))
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
    DATA = 1  # a draw is fixed by (seed, this, epoch), nothing else

    # data and model
    columns = ("prompt", "chosen", "rejected")
    names = (args.train_split, args.eval_split)
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path)
    columns, config = ("prompt", "completion"), args.dataset_config if args.reference_dataset == args.dataset else ""
    references = load_rows(args.reference_dataset, config, names[:1], columns, args.sft_path)[args.train_split][:1000]
    build_missing((args.sft_path, Args.sft_path, "sft.py"))
    size, tokenizer = args.micro_batch_size, load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        ids = {"prompt_ids": encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)}
        for name in ("chosen", "rejected"):
            texts = [row[name] for row in rows]
            ids[f"{name}_ids"] = encode(tokenizer, texts, "responses", args.response_length)
        for number, row in enumerate(rows):
            row |= {name: column[number] for name, column in ids.items()}
    reference_prompts = encode(tokenizer, [row["prompt"] for row in references], "prompts", args.prompt_length)
    reference_ids = encode(tokenizer, [row["completion"] for row in references], "responses", args.response_length)
    model = load(AutoModelForSequenceClassification, args.sft_path, dtype=torch.float32, num_labels=1).to(device)
    check_size(model, args.sft_path, tokenizer, args.prompt_length + args.response_length)
    model.config.pad_token_id = tokenizer.pad_token_id  # where AutoModelForSequenceClassification looks for the end
    torch.manual_seed(args.seed)
    torch.nn.init.normal_(model.score.weight, std=1 / np.sqrt(model.score.in_features + 1))  # N+ detail 11
    model.eval()  # note: no dropout, here as in the RL scripts
    trained = make_trainable(model, model, args)
    parameters = trainable(reward_model=model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    train = splits[args.train_split]
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

    def tensors_of(rows):
        """Prompt ids, mask (B, P) and ids, mask (B, 2, R) of chosen and rejected, padded to the longest."""
        pairs = pad([row[name] for row in rows for name in ("chosen_ids", "rejected_ids")], "right", device)
        return *pad([row["prompt_ids"] for row in rows], "left", device), *(x.unflatten(0, (-1, 2)) for x in pairs)

    scores_of = partial(pair_scores, share=not args.gradient_checkpointing)
    signals = catch_signals()
    progress = tqdm(range(done + 1, num_updates + 1), initial=done, total=num_updates, unit="update", disable=rank > 0)
    for update in progress:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 1 loss on a batch of pairs
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        rows = [train[i] for i in picked]
        sums = Counter()
        rows.sort(key=lambda row: len(row["prompt_ids"]))  # micro-batches with little padding
        for part in zip(*(tensor[rank::world].split(size) for tensor in tensors_of(rows))):
            chosen_scores, rejected_scores = scores_of(model, *part).unbind(1)
            losses = preference_loss(chosen_scores, rejected_scores)
            # differs from paper: pairs leave each prompt's mean score free, as noise for PPO; this pulls it to 0
            losses = losses + args.center_coef * (chosen_scores + rejected_scores) ** 2
            part_loss = losses.sum() / len(rows)
            part_loss.backward()
            correct = (chosen_scores > rejected_scores).float().sum() / len(rows)
            sums.update({"loss": part_loss.item(), "accuracy": correct.item()})

        # 2 step
        sum_over_processes(sums, parameters)
        norm = torch.nn.utils.get_total_norm(p.grad for p in parameters.values() if p.grad is not None)
        grad_norm = norm.item()
        if not math.isfinite(sums["loss"] + grad_norm):
            save(update - 1, None)  # the weights from before this step
            fail_not_finite(update, picked, dict(sums), parameters)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()

        # 3 log
        metrics = {"update": update, "epoch": update * args.batch_size / len(train), **sums}
        metrics |= {"grad_norm": grad_norm, "learning_rate": group["lr"]}
        metrics["time/update"] = time.perf_counter() - start
        progress.set_postfix(loss=sums["loss"], accuracy=sums["accuracy"])
        if rank == 0:
            log_metrics(run_dir, writer, metrics)
        sum_over_processes(stop := {"signals": len(signals)}, {})
        if update % args.save_every == 0 or update == num_updates or stop["signals"]:
            save(update, None)
        if stop["signals"]:
            barrier(last=True)
            sys.exit(
                f"stopped after update {update} of {num_updates}; to go on: --resume {run_name}" if rank == 0 else 1
            )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # nothing left to finish

    # 4 centre the scores so that the references average 0 (N+ detail 15)
    # differs from official code (rm.py:587): read at the real EOS, not at a padding position
    batch = (*pad(reference_prompts, "left", device), *pad(reference_ids, "right", device))
    reference_scores = in_chunks(sequence_scores, model, size, *batch)
    model.config.score_mean = reference_scores.mean().item()
    if rank == 0:
        save_folder(args.output_dir, trained, tokenizer)

    # 5 accuracy on held-out pairs, by rubric margin, next to the best that these noisy labels allow
    rows = splits[args.eval_split]
    chosen_scores, rejected_scores = in_chunks(scores_of, model, size, *tensors_of(rows)).unbind(1)
    correct = (chosen_scores > rejected_scores).float().cpu().numpy()
    result = {"all": {"pairs": len(rows), "accuracy": float(correct.mean())}}
    if "rubric" in rows[0]:
        quality = [[rubric_score(row[name], row["rubric"]) for row in rows] for name in ("chosen", "rejected")]
        margin = np.subtract(*quality)
        best = 0.5 + 0.5 * np.sign(margin)  # who ranks by the rubric itself
        bins = {"all": (0, 9), "rubric margin 0 to 0.1": (0, 0.1), "rubric margin 0.1 to 0.3": (0.1, 0.3)}
        bins |= {"rubric margin 0.3 to 0.6": (0.3, 0.6), "rubric margin 0.6 up": (0.6, 9)}
        for name, (low, high) in bins.items():
            inside = (np.abs(margin) >= low) & (np.abs(margin) < high)
            if inside.any():
                means = {"accuracy": float(correct[inside].mean()), "best": float(best[inside].mean())}
                result[name] = {"pairs": int(inside.sum())} | means
    for row in result.values():
        row["stderr"] = (row["accuracy"] * (1 - row["accuracy"]) / row["pairs"]) ** 0.5  # of the accuracy
    path = os.path.join(run_dir, "result.json") if rank == 0 else os.devnull
    with writing(path), open(path, "w") as file:
        json.dump(result, file, indent=2)
    print(f"\n{args.eval_split} pairs".ljust(26) + "".join(f"{name:>10}" for name in result["all"]))
    for name, row in result.items():
        print(f"{name:25}" + "".join(f"{x:10.3f}" if isinstance(x, float) else f"{x:10}" for x in row.values()))
    print(f"\nreference scores: mean 0 (shifted by {model.config.score_mean:.3f}), std {reference_scores.std():.3f}")
    print(f"reward model: {args.output_dir}   metrics, arguments: {run_dir}")
    barrier(last=True)
