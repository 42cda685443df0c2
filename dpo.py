"""DPO (Direct Preference Optimization): the policy learns from preference pairs, without reward model or sampling.

The log-ratio of policy and SFT policy, times beta, is an implicit reward; its Bradley-Terry loss on pairs has the same
optimum as KL-penalised RL on the reward model of those pairs. The offline baseline of the DR-PO paper.

    python dpo.py                                          # embedded task; trains models/sft if missing
    python dpo.py --sft-path my_sft --dataset trl-lib/tldr-preference --learning-rate 3e-6 --prompt-length 512

DPO = arXiv:2305.18290, DR-PO = arXiv:2404.08495v3. "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr:
 1. reference log-probs are computed once, by the policy before its first step; the official code keeps a second model.
 2. linear learning-rate decay (the paper's; the official code decays by a cosine), no weight decay, clipped gradient
    norm; all randomness comes from --seed; full fine-tuning by default, one process.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import tyro
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass
class Args:
    seed: int = 1
    """seed of every random draw: data order"""
    dataset: str = "data/tldr_mini/preference"
    """hub name, folder or .jsonl/.parquet file with `prompt`, `chosen` and `rejected`"""
    dataset_config: str = ""
    """configuration of a hub dataset, such as 3.0.0 of cnn_dailymail"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT): start and KL anchor; the default is trained if missing"""
    output_dir: str = "models/dpo"
    """folder for the final model; a folder already there is kept under a numbered name"""
    run_name: str = ""
    """folder under runs/ for metrics.jsonl, args.json and result.json; empty: script, seed and time"""
    eval_every: int = 5
    """updates between two evaluations on the validation split"""
    eval_rows: int = 1000
    """validation rows per evaluation"""

    # algorithm
    beta: float = 0.05
    """KL strength (beta in DPO; not the reset probability of drpo.py); 0.05 in the paper"""
    num_epochs: int = 1
    """passes over the train split; 1 in the paper"""
    batch_size: int = 64
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
    learning_rate: float = 3e-4
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
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
        elif not os.path.isdir(path):
            print(f"{path} does not exist yet: running {script} on the embedded task first", flush=True)
            if subprocess.run([sys.executable, os.path.join(os.path.dirname(__file__), script)]).returncode != 0:
                fail(f"{script} did not finish")


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
    prompt_ids, prompt_mask = trim(prompt_ids, prompt_mask)
    input_ids = torch.cat([prompt_ids, response_ids], dim=1)  # (B, P + R)
    mask = torch.cat([prompt_mask, response_mask], dim=1)  # (B, P + R)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model.base_model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[:, prompt_ids.shape[1] - 1 :]


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


@torch.no_grad()
def in_chunks(function, model, size, *tensors, key=None, **kwargs):
    """function(model, *tensors, **kwargs) without gradients, on `size` rows at a time, sorted by key, then prompt."""
    order = tensors[1].sum(1).argsort(stable=True)  # prompts of one length together need little padding
    order = order if key is None else order[key[order].argsort(stable=True)]
    parts = [function(model, *(tensor[rows] for tensor in tensors), **kwargs) for rows in order.split(size)]
    return torch.cat(parts)[order.argsort()]


def pair_logprobs(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share):
    """Log-probs (B, 2) of the whole chosen and the whole rejected response, EOS included, at temperature 1."""
    states = pair_states(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share)[:, :-1].unflatten(0, (-1, 2))
    logits = model.get_output_embeddings()(states[pair_mask])  # (tokens, V)
    picked = TokenLogprob.apply(logits, pair_ids[pair_mask], 1.0)
    return torch.zeros_like(pair_mask, dtype=picked.dtype).masked_scatter(pair_mask, picked).sum(2)


# loss
def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta):
    """Bradley-Terry negative log-likelihood per pair (B,) of the implicit rewards (DPO Eq. 7)."""
    return -F.logsigmoid(beta * ((chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)))


def pair_terms(logprobs, ref_logprobs, beta):
    """Log-probs (B, 2) -> the loss of every pair and what is logged about it, each (B,)."""
    chosen_rewards, rejected_rewards = (beta * (logprobs - ref_logprobs)).unbind(1)  # implicit (DPO Eq. 5)
    margins = chosen_rewards - rejected_rewards
    terms = {"loss": dpo_loss(*logprobs.unbind(1), *ref_logprobs.unbind(1), beta)}
    terms |= {"accuracy": 0.5 + 0.5 * margins.sign(), "margin": margins}  # a tie counts half
    terms |= {"rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards}
    return terms | {"logprobs/chosen": logprobs[:, 0], "logprobs/rejected": logprobs[:, 1]}


# files
def log_metrics(run_dir, writer, metrics):
    """One line of metrics.jsonl; the same numbers to TensorBoard where it is installed."""
    with open(os.path.join(run_dir, "metrics.jsonl"), "a") as file:
        file.write(json.dumps(metrics) + "\n")
    for name, value in metrics.items() if writer else ():
        writer.add_scalar(name, value, metrics["update"])


def save_folder(path, *parts):
    """save_pretrained of every part under a temporary name, then renamed; an earlier `path` becomes path.1, path.2."""
    path = os.path.normpath(path)
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


if __name__ == "__main__":
    # arguments
    args = tyro.cli(Args)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_numbers(args, ("seed", "lora_rank", "learning_rate"))
    run_name = args.run_name or f"{os.path.basename(__file__)[:-3]}__{args.seed}__{int(time.time())}"
    run_dir = os.path.join("runs", run_name)
    if os.path.exists(run_dir):
        fail(f"--run-name {run_name}: {run_dir} already exists, choose another name")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_autocast_dtype(device.type, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # note: its copies of the weights would outlive an optimizer step
    torch.set_autocast_enabled(device.type, args.dtype == "bfloat16")
    DATA = 1  # a draw is fixed by (seed, this, epoch), nothing else

    # data and model
    columns = ("prompt", "chosen", "rejected")
    names = (args.train_split, args.validation_split)
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path)
    splits[args.validation_split] = splits[args.validation_split][: args.eval_rows]
    train, validation = (splits[name] for name in names)
    num_updates = args.num_epochs * len(train) // args.batch_size
    if num_updates < 1:
        fail(f"--num-epochs {args.num_epochs} of {len(train)} rows do not fill --batch-size {args.batch_size}")
    build_missing((args.sft_path, Args.sft_path, "sft.py"))
    size, tokenizer = args.micro_batch_size, load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        ids = {"prompt_ids": encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)}
        for name in ("chosen", "rejected"):
            texts = [row[name] for row in rows]
            ids[f"{name}_ids"] = encode(tokenizer, texts, "responses", args.response_length)
        for number, row in enumerate(rows):
            row |= {name: column[number] for name, column in ids.items()}
    policy = load(AutoModelForCausalLM, args.sft_path, dtype=torch.float32).to(device)
    check_size(policy, args.sft_path, tokenizer, args.prompt_length + args.response_length)
    policy.eval()  # note: no dropout, or the policy would not start equal to the reference
    trained = make_trainable(policy, policy, args)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    epochs = range(args.num_epochs)  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # log
    os.makedirs(run_dir)
    with open(os.path.join(run_dir, "args.json"), "w") as file:
        json.dump(vars(args), file, indent=2)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        SummaryWriter = None
    writer = SummaryWriter and SummaryWriter(run_dir)

    def tensors_of(rows):
        """Prompt ids, mask (B, P) and ids, mask (B, 2, R) of chosen and rejected, padded to the longest."""
        pairs = pad([row[name] for row in rows for name in ("chosen_ids", "rejected_ids")], "right", device)
        return *pad([row["prompt_ids"] for row in rows], "left", device), *(x.unflatten(0, (-1, 2)) for x in pairs)

    logprobs_of = partial(pair_logprobs, share=not args.gradient_checkpointing)

    # 1 reference log-probs of every pair, once: the policy before its first step is the reference
    # differs from official code (dpo.py): no second model in memory, no second forward pass per batch
    ref_logprobs, start = {}, time.perf_counter()  # split -> (rows, 2)
    for split, rows in splits.items():
        starts = tqdm(range(0, len(rows), size), desc=f"reference log-probs, {split}")
        parts = [in_chunks(logprobs_of, policy, size, *tensors_of(rows[start : start + size])) for start in starts]
        ref_logprobs[split] = torch.cat(parts)
    reference_seconds = time.perf_counter() - start
    terms = pair_terms(ref_logprobs[args.validation_split], ref_logprobs[args.validation_split], args.beta)
    results = {"before": {name: term.mean().item() for name, term in terms.items()}}

    progress = tqdm(range(1, num_updates + 1), unit="update")
    for update in progress:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 2 loss on a batch of pairs
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        picked = sorted(picked, key=lambda i: len(train[i]["prompt_ids"]))  # micro-batches with little padding
        batch = (*tensors_of([train[i] for i in picked]), ref_logprobs[args.train_split][picked])
        means = Counter()
        for *part, part_ref_logprobs in zip(*(tensor.split(size) for tensor in batch)):
            terms = pair_terms(logprobs_of(policy, *part), part_ref_logprobs, args.beta)
            terms = {name: term.sum() / len(picked) for name, term in terms.items()}
            terms["loss"].backward()
            means.update({name: term.item() for name, term in terms.items()})

        # 3 step
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()

        # 4 log; every few updates the same means on the validation split
        metrics = {"update": update, "epoch": update * args.batch_size / len(train), **means}
        metrics |= {"grad_norm": grad_norm, "learning_rate": group["lr"]}
        metrics |= {"time/update": time.perf_counter() - start, "time/reference": reference_seconds}
        if update % args.eval_every == 0 or update == num_updates:
            logprobs = in_chunks(logprobs_of, policy, size, *tensors_of(validation))
            terms = pair_terms(logprobs, ref_logprobs[args.validation_split], args.beta)
            results["after"] = {name: term.mean().item() for name, term in terms.items()}
            metrics |= {f"eval/{name}": value for name, value in results["after"].items()}
            progress.set_postfix(loss=means["loss"], validation=metrics["eval/loss"])
        log_metrics(run_dir, writer, metrics)

    # 5 save, compare the validation split before and after
    save_folder(args.output_dir, trained, tokenizer)
    with open(os.path.join(run_dir, "result.json"), "w") as file:
        json.dump(results, file, indent=2)
    print(f"\n{len(validation)} pairs of validation".ljust(26) + "".join(f"{name:>10}" for name in results))
    for name in results["before"]:
        print(f"{name:25}" + "".join(f"{row[name]:10.3f}" for row in results.values()))
    print(f"\nfinal policy: {args.output_dir}   metrics, arguments: {run_dir}")
