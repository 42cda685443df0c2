"""DR-PO for models that do not fit on one device: drpo.py with all parameters sharded over the processes (FSDP2).

    torchrun --nproc-per-node 8 drpo_fsdp.py --sft-path models/sft --reward-path models/reward
    torchrun --nproc-per-node 8 drpo_fsdp.py --beta 0     # PPO, sharded

Policy, critic, reference and reward model are split by torch's fully_shard; a layer is gathered while it computes, and for
a rollout the whole policy, once. `diff drpo.py drpo_fsdp.py` is what that takes: the algorithm is the same, the numbers
agree to rounding. Checkpoints are written by torch.distributed.checkpoint, every process its part; the final policy is an
ordinary save_pretrained folder. Every process reads one whole model at a time into CPU memory. No LoRA.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, wraps
from types import MethodType
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import tyro
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class Args:
    seed: int = 1
    """seed of every random draw: data order, sampling, minibatches"""
    dataset: str = "data/tldr_mini/reference"
    """hub name, folder or .jsonl/.parquet file with `prompt` and `completion` (and `rubric`, if quality can be computed)"""
    dataset_config: str = ""
    """configuration of a hub dataset, such as 3.0.0 of cnn_dailymail"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT): start and KL anchor; the default is trained if missing"""
    reward_path: str = "models/reward"
    """folder or hub name of the reward model; the default belongs to models/sft and is trained if missing"""
    output_dir: str = "models/drpo"
    """folder for the final model; a folder already there is kept under a numbered name"""
    run_name: str = ""
    """folder under runs/ for metrics.jsonl, args.json and the picture; empty: script, seed and time"""
    resume: str = ""
    """run to go on with: its name under runs/; the other flags are those of the run"""
    save_every: int = 20
    """updates between two checkpoints in the run's folder, for --resume"""
    keep_checkpoints: int = 2
    """newest checkpoints to keep"""
    process_timeout: int = 1800
    """seconds that the processes of torchrun wait for each other before the run fails"""
    eval_split: str = "test"
    """split for the final table; the picture uses `validation`"""
    eval_every: int = 5
    """updates between two evaluations on the validation split"""
    eval_rows: int = 128
    """validation rows per evaluation"""

    # algorithm
    total_episodes: int = 5120
    """responses to sample in the whole run"""
    batch_size: int = 64
    """responses per update"""
    minibatch_size: int = 64
    """responses per optimizer step"""
    micro_batch_size: int = 64
    """responses per forward and backward pass; lower it to save memory, results agree to rounding"""
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
    num_ppo_epochs: int = 4
    """passes over each batch"""
    learning_rate: float = 3e-4
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
    kl_coef: float = 0.05
    """weight of the per-token KL penalty (lambda)"""
    gamma: float = 1.0
    """discount (gamma)"""
    gae_lambda: float = 0.95
    """bias-variance trade-off of the advantage estimate (lambda in GAE)"""
    clip_coef: float = 0.2
    """clip range of the ratio and of the value (epsilon)"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    max_grad_norm: float = 1.0
    """the gradient of policy and critic together is scaled down to this norm"""
    temperature: float = 1.0
    """sampling temperature, also applied to every log-prob"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""
    missing_eos_score: float = -1.0
    """score of a response without EOS; references average 0"""
    # new in DR-PO:
    beta: float = 1.0
    """probability that a rollout starts from a dataset state instead of the prompt (beta); 0 is PPO"""
    reset_column: str = "completion"
    """column whose text the rollouts are reset into"""


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


# log-probs, values, scores
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


def token_values(critic, prompt_ids, prompt_mask, response_ids, response_mask):
    """Values (B, R): expected return before response token t is emitted."""
    states = response_states(critic, prompt_ids, prompt_mask, response_ids, response_mask)[:, :-1]
    return critic.score(states).squeeze(-1).float() - getattr(critic.config, "score_mean", 0.0)


def sequence_scores(reward_model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Scores (B,), read at the last real token (N+ detail 12), centred so that references average 0 (N+ detail 15)."""
    states = response_states(reward_model, prompt_ids, prompt_mask, response_ids, response_mask)
    last = states[torch.arange(len(states)), response_mask.sum(1)]  # (B, d)
    return reward_model.score(last).squeeze(-1).float() - getattr(reward_model.config, "score_mean", 0.0)


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


# new in DR-PO: resets
def sample_reset_len(lengths, beta, rng):
    """Dataset tokens to keep (B,): 0 with probability 1 - beta or if L < 2, else uniform on 1..L-1; L counts EOS."""
    reset = (rng.random(len(lengths)) < beta) & (lengths >= 2)
    return np.where(reset, 1 + np.floor(rng.random(len(lengths)) * (lengths - 1)), 0).astype(np.int64)


def splice_response(offline_ids, generated_ids, reset_len):
    """Response (B, R): the dataset's token where t < reset_len, then the generated ones."""
    t = torch.arange(generated_ids.shape[1], device=reset_len.device) - reset_len.unsqueeze(1)  # (B, R)
    offline_ids = F.pad(offline_ids, (0, generated_ids.shape[1] - offline_ids.shape[1]))
    return torch.where(t < 0, offline_ids, generated_ids.gather(1, t.clamp(min=0)))


# new in FSDP: sharding
def shard(model):
    """Splits every parameter over the processes, layer by layer; -> the model, on their devices."""
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer)
    fully_shard(model)
    for part in (module for module in model.modules() if isinstance(module, FSDPModule)):
        part.set_gradient_divide_factor(1.0)  # gradients are added up, as everywhere here
        part.set_force_sum_reduction_for_comms(True)  # the one that gloo has
    return model


def between_hooks(function):
    """function(model, ...) as it was, but FSDP sees it begin and end, to gather and free what belongs to no layer.

    For a rollout the whole model is gathered, once instead of once per layer and token.
    """

    @wraps(function)
    def call(model, *args, **kwargs):
        name = f"fsdp_{function.__name__}"
        if not hasattr(model, name):
            setattr(model, name, MethodType(function, model))
            register_fsdp_forward_method(model, name)
        parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for part in parts if function.__name__ == "generate" else ():
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        result = getattr(model, name)(*args, **kwargs)
        for part in parts if function.__name__ == "generate" else ():
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
        return result

    return call


generate, token_logprobs, token_values, sequence_scores = map(
    between_hooks, (generate, token_logprobs, token_values, sequence_scores)
)


def training_state(parameters, optimizer):
    """Name -> tensor, sharded: parameters and what AdamW keeps of each, made if it is not there yet."""
    for p in parameters.values():
        if not optimizer.state[p]:
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p].update(step=torch.zeros((), device=p.device), **zeros)
    found = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    return found | {f"{key}.{name}": x for name, p in parameters.items() for key, x in optimizer.state[p].items()}


# rewards, advantages, losses
def masked_whiten(x, mask):
    """Mean 0 and variance 1 over the True entries, 0 elsewhere (N+ detail 25)."""
    mean = (x * mask).sum() / mask.sum()
    var = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def make_rewards(kl, scores, action_mask, response_mask, kl_coef):
    """Rewards (B, R): -kl_coef * kl on every action, plus the score (B,) on the last real token."""
    rewards = -kl_coef * kl * action_mask
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
    return rewards


def compute_gae(rewards, values, action_mask, gamma, gae_lambda):
    """Advantages and returns (B, R) over the actions, which are contiguous in each row (GAE Eq. 16, truncated)."""
    values = values * action_mask
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = (delta + gamma * gae_lambda * running) * action_mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def policy_loss(new_logprobs, logprobs, advantages, clip_coef):
    """Clipped surrogate per token (M, R), negated for descent (PPO Eq. 7)."""
    ratio = torch.exp(new_logprobs - logprobs)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))


def value_loss(new_values, values, returns, clip_coef):
    """Half squared error per token (M, R), with the step away from the old value clipped as in N+."""
    clipped = values + (new_values - values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)


# measurement and files
def matmul_rate(device, dtype, size=8192):
    """FLOP/s of one large matrix product here: `time/mfu` is a share of it."""
    x, seconds = torch.randn(size, size, device=device, dtype=getattr(torch, dtype)), []
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def training_flops(weights):
    """FLOPs per token, forward and backward, of matrices; attention scores and recomputation do not count, as usual."""
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in weights if p.ndim == 2)


def evaluate(policy, ref_policy, reward_model, tokenizer, rows, args, device):
    """Samples one response per row from its prompt, at the training temperature and from one fixed table of uniforms.

    -> texts and means: win rate against the reference (by rubric, else by score; a tie is half a win), rubric, score,
    KL to SFT (nats per response), length (tokens, EOS included), share of responses that ended with EOS.
    """
    size, eos, temperature = args.micro_batch_size, tokenizer.eos_token_id, args.temperature
    prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (B, P), mask (B, P)
    offline = pad([row["offline_ids"] for row in rows], "right", device)
    table = np.random.default_rng(args.seed).random((len(rows), args.response_length), dtype=np.float32)
    uniforms, budget = torch.from_numpy(table).to(device), torch.full((len(rows),), args.response_length, device=device)
    response_ids = in_chunks(generate, policy, 4 * size, *prompts, uniforms, budget, eos=eos, temperature=temperature)
    mask, ended = mask_to_eos(response_ids, eos), (response_ids == eos).any(1)
    batch = (*prompts, response_ids, mask)
    scores = torch.where(ended, in_chunks(sequence_scores, reward_model, size, *batch), args.missing_eos_score)
    logprobs = in_chunks(token_logprobs, policy, size, *batch, mask, temperature=temperature)
    ref_logprobs = in_chunks(token_logprobs, ref_policy, size, *batch, mask, temperature=temperature)
    texts = [tokenizer.decode(ids[keep], skip_special_tokens=True) for ids, keep in zip(response_ids, mask)]
    means = {"score": scores, "kl": (logprobs - ref_logprobs).sum(1), "length": mask.sum(1), "eos": ended}
    if "rubric" in rows[0]:
        quality = torch.tensor([rubric_score(text, row["rubric"]) for text, row in zip(texts, rows)])
        target = torch.tensor([rubric_score(row["completion"], row["rubric"]) for row in rows])
        means = {"rubric": quality} | means
    else:
        quality, target = scores, in_chunks(sequence_scores, reward_model, size, *prompts, *offline)
    means = {"win_rate": 0.5 + 0.5 * (quality - target).sign()} | means
    return texts, {name: value.float().mean().item() for name, value in means.items()}


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


def plot_run(history, path):
    """Rubric, score and KL on the validation split against episodes, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("no picture of the run: pip install matplotlib")
    names = [name for name in ("rubric", "score", "kl") if name in history[0]]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names):
        axes.plot([point["episodes"] for point in history], [point[name] for point in history], marker="o", ms=3)
        axes.set(title={"score": "reward-model score", "kl": "KL to SFT (nats)"}.get(name, name), xlabel="episodes")
    with writing(path):
        figure.savefig(path, dpi=120)


# runs that survive their process
def sharded_checkpoints(run_dir):
    """Folders of the run's checkpoints, oldest first."""
    return sorted(os.path.join(run_dir, name) for name in os.listdir(run_dir) if re.fullmatch(r"checkpoint_\d+", name))


def checksums(path):
    """File name -> sha256 of everything in a checkpoint but its manifest."""
    found = {}
    for name in sorted(set(os.listdir(path)) - {"manifest.json"}):
        with open(os.path.join(path, name), "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


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


def open_sharded_run(run_dir, args, parameters, optimizer, rank):
    """Claims the run's folder and goes back to its last whole checkpoint, if there is one.

    -> updates done, history as it was saved. No generator is restored: every draw is fixed by seed and update.
    """
    found = [None, 0, None]
    if rank == 0:
        claim_run(run_dir, args)
        for path in reversed(sharded_checkpoints(run_dir)):
            with suppress(OSError, ValueError, KeyError), open(os.path.join(path, "manifest.json")) as file:
                manifest = json.load(file)
                if manifest["files"] == checksums(path):
                    found = [path, manifest["update"], manifest["history"]]
                    break
            print(f"note: {path} is damaged, now {path}.damaged")
            os.rename(path, f"{path}.damaged")
        cut_metrics(run_dir, found[1])
    dist.broadcast_object_list(found)
    path, *rest = found
    if path:
        dcp.load(training_state(parameters, optimizer), checkpoint_id=path)
    return rest


def save_sharded_checkpoint(run_dir, args, parameters, optimizer, rank, update, history):
    """A folder, every process its part; then a manifest with checksums, then renamed. The newest --keep-checkpoints stay."""
    path = os.path.join(run_dir, f"checkpoint_{update:08d}")
    known = [rank == 0 and os.path.exists(path), run_dir]
    dist.broadcast_object_list(known)  # a run's name may hold the time, so rank 0's is taken
    if known[0]:
        return
    path = os.path.join(known[1], f"checkpoint_{update:08d}")
    with writing(path):
        failure = None
        try:
            dcp.save(training_state(parameters, optimizer), checkpoint_id=f"{path}.tmp")
        except dcp.CheckpointException as error:  # a BaseException, with what happened to each process
            failure = next(iter(error.failures.values()))[0]
        if failure:
            if rank == 0:
                shutil.rmtree(f"{path}.tmp", ignore_errors=True)
            raise failure
        if rank == 0:
            with open(os.path.join(known[1], "metrics.jsonl"), "a") as file:
                os.fsync(file.fileno())  # a power cut must not leave fewer lines than the checkpoint has updates
            with open(os.path.join(f"{path}.tmp", "manifest.json"), "w") as file:
                json.dump({"update": update, "history": history, "files": checksums(f"{path}.tmp")}, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(f"{path}.tmp", path)
    for old in sharded_checkpoints(run_dir)[: -args.keep_checkpoints] if rank == 0 else ():
        shutil.rmtree(old)


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
    check_numbers(args, ("seed", "lora_rank", "learning_rate", "kl_coef", "vf_coef", "gamma", "gae_lambda", "beta"))
    if "RANK" not in os.environ or args.lora_rank:  # new in FSDP:
        fail("drpo_fsdp.py runs under torchrun (torchrun --nproc-per-node N drpo_fsdp.py ...) and without --lora-rank")
    device, rank, world = start_processes(args.process_timeout)
    num_updates = args.total_episodes // args.batch_size
    if num_updates < 1 or args.batch_size % args.minibatch_size:
        fail("--total-episodes must be at least --batch-size, and --minibatch-size must divide --batch-size")
    if args.minibatch_size % world:
        fail(f"--minibatch-size {args.minibatch_size} must be a multiple of the {world} processes")
    if not 0 <= args.beta <= 1:  # new in DR-PO:
        fail(f"--beta {args.beta} is a probability, it must lie in 0..1")
    run_name = args.resume or args.run_name or f"{os.path.basename(__file__)[:-3]}__{args.seed}__{int(time.time())}"
    run_dir = os.path.join("runs", run_name)
    if os.path.exists(run_dir) and not args.resume and rank == 0:
        fail(f"--run-name {run_name}: {run_dir} already exists, choose another name")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for large tensors, read at the first of them
    torch.set_autocast_dtype(device.type, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # note: its copies of the weights would outlive an optimizer step
    torch.set_autocast_enabled(device.type, args.dtype == "bfloat16")
    DATA, SAMPLING, MINIBATCHES, RESETS = 1, 2, 3, 4  # streams: a training draw is fixed by (seed, stream, update)

    # data and models
    names = (args.train_split, args.validation_split, args.eval_split)
    columns = ("prompt", "completion", args.reset_column)  # new in DR-PO:
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path)
    sft, reward = (args.sft_path, Args.sft_path, "sft.py"), (args.reward_path, Args.reward_path, "reward_model.py")
    build_missing(sft, reward)
    size, temperature, tokenizer = args.micro_batch_size, args.temperature, load(AutoTokenizer, args.sft_path)
    eos = tokenizer.eos_token_id
    if load(AutoTokenizer, args.reward_path).get_vocab() != tokenizer.get_vocab():
        fail(f"--reward-path {args.reward_path} has another vocabulary than --sft-path {args.sft_path}")
    for split, rows in splits.items():
        prompts = encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)
        offline = encode(tokenizer, [row["completion"] for row in rows], "responses", args.response_length)
        splits[split] = [row | {"prompt_ids": p, "offline_ids": o} for row, p, o in zip(rows, prompts, offline)]
        resets = encode(tokenizer, [row[args.reset_column] for row in rows], "responses", args.response_length)
        splits[split] = [row | {"reset_ids": ids} for row, ids in zip(splits[split], resets)]  # new in DR-PO:
    # eval mode, that is no dropout, or the ratios of the first epoch are not 1 (N+ detail 7)
    kind, path = AutoModelForCausalLM, args.sft_path
    # new in FSDP: one after the other, and only its shards reach the device
    policy, ref_policy = (shard(load(kind, path, dtype=torch.float32)).eval() for _ in range(2))
    kind, path = AutoModelForSequenceClassification, args.reward_path
    reward_model, critic = (shard(load(kind, path, dtype=torch.float32)).eval() for _ in range(2))
    for model, path in ((policy, args.sft_path), (reward_model, args.reward_path)):
        check_size(model, path, tokenizer, args.prompt_length + args.response_length)
    if reward_model.config.num_labels != 1:
        fail(f"--reward-path {args.reward_path} is no reward model: it must have exactly one output")
    trained = make_trainable(policy, ref_policy, args)
    make_trainable(critic, reward_model, args)  # differs from official code: LoRA freezes the value head there
    parameters = trainable(policy=policy, critic=critic)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    rollout = partial(in_chunks, generate, policy, 4 * size, eos=eos, temperature=temperature)  # more rows cost little
    train, validation, held_out = (splits[name] for name in names)
    epochs = range(-(-args.total_episodes // len(train)))  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # log
    done, history = open_sharded_run(run_dir, args, parameters, optimizer, rank)  # new in FSDP:
    save = partial(save_sharded_checkpoint, run_dir, args, parameters, optimizer, rank)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    writer = rank == 0 and SummaryWriter and SummaryWriter(run_dir, purge_step=done + 1)
    frozen = (ref_policy, reward_model, tokenizer)
    if not done:
        history = [{"episodes": 0} | evaluate(policy, *frozen, validation[: args.eval_rows], args, device)[1]]
    peak = matmul_rate(device, args.dtype) if device.type == "cuda" else None
    head, parts = list(policy.get_output_embeddings().parameters()), [*policy.base_model.modules(), *critic.modules()]
    body = [p for part in parts if not isinstance(part, torch.nn.Embedding) for p in part.parameters(recurse=False)]
    signals = catch_signals()
    progress = tqdm(range(done + 1, num_updates + 1), initial=done, total=num_updates, unit="update", disable=rank > 0)
    for update in progress:
        clock = [time.perf_counter()]
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 1 sample prompts
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        rows = [train[i] for i in picked]
        prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (B, P), mask (B, P)
        rng = np.random.default_rng([args.seed, SAMPLING, update])
        uniforms = torch.from_numpy(rng.random((args.batch_size, args.response_length), dtype=np.float32)).to(device)

        # 2 new in DR-PO: choose reset points, roll out from there; the uniforms of the prefix go unused
        offline_ids, offline_mask = pad([row["reset_ids"] for row in rows], "right", device)  # (B, L)
        rng = np.random.default_rng([args.seed, RESETS, update])  # differs from official code (drpo.py:635): seeded
        reset_len = torch.from_numpy(sample_reset_len(offline_mask.sum(1).cpu().numpy(), args.beta, rng)).to(device)
        states = [row["prompt_ids"] + row["reset_ids"][:k] for row, k in zip(rows, reset_len.tolist())]
        context = pad(states, "left", device)  # (B, up to P + L); differs from official code: read in one forward pass
        column = torch.arange(args.response_length, device=device)  # (R,)
        uniforms = uniforms.gather(1, (column + reset_len.unsqueeze(1)).clamp(max=args.response_length - 1))
        budget = args.response_length - reset_len
        generated_ids = rollout(*context, uniforms, budget, key=budget)
        response_ids = splice_response(offline_ids, generated_ids, reset_len)
        response_mask = mask_to_eos(response_ids, eos)  # (B, R), as response_ids
        action_mask = response_mask & (column >= reset_len.unsqueeze(1))  # the policy is not taught on dataset tokens
        lengths = prompts[1].sum(1) + response_mask.sum(1)  # (B,), sorted by which micro-batches have little padding
        clock.append(time.perf_counter())

        # 3 score; log-probs and values under the models as they are before the update
        batch = (*prompts, response_ids, response_mask)
        scores = in_chunks(sequence_scores, reward_model, size, *batch)  # (B,)
        ended = (response_ids == eos).any(1)  # differs from official code (drpo.py:803): EOS in the last column counts
        scores = torch.where(ended, scores, args.missing_eos_score)  # N+ detail 23
        logprobs = in_chunks(token_logprobs, policy, size, *batch, action_mask, temperature=temperature)
        ref_logprobs = in_chunks(token_logprobs, ref_policy, size, *batch, action_mask, temperature=temperature)
        values = in_chunks(token_values, critic, size, *batch)  # (B, R)
        found = {"scores": scores, "logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values}
        bad = torch.stack([~x.isfinite().view(len(x), -1).all(1) for x in found.values()]).any(0)  # (B,)
        if bad.any():
            save(update - 1, history)
            fail_not_finite(update, picked[bad.cpu()], found, {})

        # 4 KL penalty and advantages
        kl = logprobs - ref_logprobs  # (B, R), 0 off the actions: differs from official code (drpo.py:808)
        rewards = make_rewards(kl, scores, action_mask, response_mask, args.kl_coef)
        advantages, returns = compute_gae(rewards, values, action_mask, args.gamma, args.gae_lambda)
        advantages = masked_whiten(advantages, action_mask)  # differs from official code (drpo.py:817, 830): actions
        clock.append(time.perf_counter())

        # 5 PPO epochs
        stats, rng = [], np.random.default_rng([args.seed, MINIBATCHES, update])
        orders = [torch.from_numpy(rng.permutation(args.batch_size)).to(device) for _ in range(args.num_ppo_epochs)]
        for minibatch in [part for shuffled in orders for part in shuffled.split(args.minibatch_size)]:
            num_actions, sums = action_mask[minibatch].sum(), Counter()  # differs from official code (drpo.py:874)
            for micro in minibatch[lengths[minibatch].argsort(stable=True)][rank::world].split(size):
                mask, part = action_mask[micro], [tensor[micro] for tensor in batch]
                new_logprobs = token_logprobs(policy, *part, mask, temperature)
                log_ratio = new_logprobs - logprobs[micro]
                terms = {
                    "loss/policy": policy_loss(new_logprobs, logprobs[micro], advantages[micro], args.clip_coef),
                    "policy/approx_kl": log_ratio.expm1() - log_ratio,
                    "policy/clipfrac": log_ratio.expm1().abs() > args.clip_coef,
                    "policy/ratio_error": log_ratio.expm1().abs(),
                }  # each (micro, R)
                terms = {name: (term * mask).sum() / num_actions for name, term in terms.items()}
                terms["loss/policy"].backward()  # now, so that the critic's activations find its memory free
                losses = value_loss(token_values(critic, *part), values[micro], returns[micro], args.clip_coef)
                terms["loss/value"] = (losses * mask).sum() / num_actions
                (args.vf_coef * terms["loss/value"]).backward()
                sums.update({name: term.item() for name, term in terms.items()})
            # differs from official code: the gradient is clipped, and AdamW decays no weights
            sum_over_processes(sums, {})  # new in FSDP: it has added up the gradients
            norm = torch.nn.utils.get_total_norm(p.grad for p in parameters.values() if p.grad is not None)
            norm = norm.full_tensor()  # new in FSDP:
            sums["policy/grad_norm"] = norm.item()
            if not all(math.isfinite(x) for x in sums.values()):
                if not stats:  # else this update has begun, and the last checkpoint is the place to go back to
                    save(update - 1, history)
                fail_not_finite(update, picked[minibatch.cpu()], dict(sums), parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
            optimizer.step()
            optimizer.zero_grad()
            stats.append(sums)
        clock.append(time.perf_counter())

        # 6 log
        metrics = {"update": update, "episodes": update * args.batch_size, "learning_rate": group["lr"]}
        metrics |= {"objective/score": scores.mean().item(), "objective/kl": kl.sum(1).mean().item()}
        metrics |= {"objective/reward": rewards.sum(1).mean().item(), "response/eos": ended.float().mean().item()}
        metrics |= {"response/length": response_mask.sum(1).float().mean().item()}
        metrics |= {
            f"reset/{k}": x.float().mean().item() for k, x in (("fraction", reset_len > 0), ("length", reset_len))
        }
        metrics |= {"policy/entropy": (-logprobs.sum() / action_mask.sum()).item()}
        metrics["policy/first_ratio_error"] = stats[0]["policy/ratio_error"]
        metrics |= {name: float(np.mean([sums[name] for sums in stats])) for name in stats[0]}
        metrics |= {f"time/{name}": s for name, s in zip(("rollout", "score", "optimise"), np.diff(clock).tolist())}
        metrics["time/tokens_per_second"] = action_mask.sum().item() / metrics["time/rollout"]  # sampled ones
        if peak:
            flops = training_flops(body) * lengths.sum() + training_flops(head) * action_mask.sum()
            metrics["time/mfu"] = flops.item() * args.num_ppo_epochs / (metrics["time/optimise"] * peak * world)
        if update % args.eval_every == 0 or update == num_updates:
            point = evaluate(policy, *frozen, validation[: args.eval_rows], args, device)[1]
            history.append({"episodes": update * args.batch_size} | point)
            metrics |= {f"eval/{name}": value for name, value in point.items()}
        if rank == 0:
            log_metrics(run_dir, writer, metrics)
        progress.set_postfix(score=scores.mean().item(), kl=metrics["objective/kl"], win=history[-1]["win_rate"])
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

    # 7 save, evaluate on held-out prompts, show
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)  # new in FSDP:
    whole = get_model_state_dict(policy, options=options)
    if rank == 0:
        trained = load(AutoModelForCausalLM, args.sft_path, dtype=torch.float32)
        trained.load_state_dict(whole)
        save_folder(args.output_dir, trained, tokenizer)
        plot_run(history, os.path.join(run_dir, "run.png"))
    sft_texts, sft_result = evaluate(ref_policy, *frozen, held_out, args, device)
    texts, result = evaluate(policy, *frozen, held_out, args, device)
    results = {"SFT": sft_result, "DR-PO": result}
    path = os.path.join(run_dir, "result.json") if rank == 0 else os.devnull
    with writing(path), open(path, "w") as file:
        json.dump(results, file, indent=2)
    for row, sft_text, text in list(zip(held_out, sft_texts, texts))[:3]:
        print(f"\n{row['prompt']}\n  reference:{row['completion']}\n  SFT:      {sft_text}\n  tuned:    {text}")
    # new in DR-PO: from a reset, [dataset prefix] in brackets, then the policy's own tokens
    kept = sample_reset_len(
        np.array([len(row["reset_ids"]) for row in held_out[:3]]), 1.0, np.random.default_rng([args.seed, RESETS])
    )
    states = [row | {"prompt_ids": row["prompt_ids"] + row["reset_ids"][:k]} for row, k in zip(held_out, kept)]
    for row, k, own in zip(held_out, kept, evaluate(policy, *frozen, states, args, device)[0]):
        print(f"\n  from a reset: [{tokenizer.decode(row['reset_ids'][:k])}]{own}")
    print(f"\n{len(held_out)} prompts of {args.eval_split}".ljust(26) + "".join(f"{name:>10}" for name in result))
    for name, row in results.items():
        print(f"{name:25}" + "".join(f"{value:10.3f}" for value in row.values()))
    print(f"\nfinal policy: {args.output_dir}   metrics, arguments, picture: {run_dir}")
    barrier(last=True)
