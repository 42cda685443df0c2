"""Models: loaded and checked, made trainable in little memory, read in little memory, saved."""

import os
import subprocess
import sys
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoTokenizer

from plumbing import ROOT, fail, find
from plumbing.files import writing
from plumbing.processes import barrier, rank
from plumbing.sharding import is_sharded, shard, whole

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(auto_class, path, **kwargs):
    """`from_pretrained` of a folder or hub name; what fails there becomes one line."""
    try:
        return auto_class.from_pretrained(find(path), **kwargs)
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        fail(f"cannot load {path}: {(str(error) or repr(error)).strip().splitlines()[0]}")


def load_model(auto_class, path, tokenizer, args, device, may_be_empty=False, **config):
    """A model that fits tokenizer, lengths and role, in float32, without dropout, on the device or sharded.

    Weights come from safetensors alone. may_be_empty: a folder without any is initialised at random from its config.
    """
    folder = find(path)
    if may_be_empty and os.path.isdir(folder) and not any(".safetensors" in name for name in os.listdir(folder)):
        print(f"{path} holds no weights: initialising at random from its config")
        torch.manual_seed(args.seed)
        model = auto_class.from_config(load(AutoConfig, path), dtype=torch.float32)
    else:
        model = load(auto_class, path, dtype=torch.float32, use_safetensors=True, **config)
    check_fit(model, path, tokenizer, args.prompt_length + args.response_length)
    model = shard(model) if getattr(args, "shard", False) else model.to(device)  # judge.py has no --shard
    return model.eval()


def check_model(auto_class, path, tokenizer, length):
    """As load_model checks, before there is time or memory for the weights."""
    with torch.device("meta"):  # shapes alone
        check_fit(auto_class.from_config(load(AutoConfig, path)), path, tokenizer, length)


def check_fit(model, path, tokenizer, length):
    """Ends the program if the model does not fit the tokenizer, `length` tokens or, with a scalar head, its role."""
    rows, positions = model.get_input_embeddings().num_embeddings, getattr(model.config, "max_position_embeddings", 0)
    if rows < len(tokenizer):
        fail(f"{path}: the embedding has {rows} rows, the tokenizer {len(tokenizer)} tokens; take its own tokenizer")
    if positions and positions < length:
        fail(f"{path} has {positions} positions; --prompt-length and --response-length add up to {length}")
    if find(path) != tokenizer.name_or_path and load(AutoTokenizer, path).get_vocab() != tokenizer.get_vocab():
        fail(f"{path} has another vocabulary than {tokenizer.name_or_path}")
    scalar = "SequenceClassification" in type(model).__name__
    if scalar and (model.config.num_labels != 1 or not hasattr(model, "score")):
        fail(f"{path} is no reward model of a decoder: it must have exactly one output, named score")


def build_missing(*wanted):
    """Checks every checkpoint (path, default path, script) that the user named, then trains the missing defaults."""
    for path, default, script in sorted(wanted, key=lambda item: item[0] == item[1]):
        if path != default:
            load(AutoTokenizer, path)
        elif not os.path.isdir(path) and os.environ.get("RANK", "0") == "0":
            print(f"{path} does not exist yet: running {script} on the embedded task first", flush=True)
            alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
            if subprocess.run([sys.executable, os.path.join(ROOT, script)], env=alone).returncode != 0:
                fail(f"{script} did not finish")
    barrier()


def make_trainable(model, frozen, args):
    """Recomputed layers and LoRA adapters (arXiv:2106.09685) where args ask for them; -> what save_model takes.

    Under the adapters, at first without effect, lie the weights of `frozen`, stored once. The head `score` is trained too.
    """
    if args.gradient_checkpointing:
        from torch.utils.checkpoint import checkpoint  # here, because it takes a second
        from transformers.modeling_layers import GradientCheckpointingLayer

        for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # every decoder layer is one
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


def trainable(**models):
    """Name -> parameter of everything that is trained."""
    named = {kind: model.named_parameters() for kind, model in models.items()}
    return {f"{kind}.{name}": p for kind, pairs in named.items() for name, p in pairs if p.requires_grad}


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


def selected_logprobs(head, hidden, tokens, temperature):
    """log_softmax(head(hidden) / temperature) at the tokens: hidden (N, d), tokens (N,) -> (N,)."""
    rows = len(tokens) if torch.is_grad_enabled() else 256  # without gradients, logits need not live on
    parts = zip(hidden.split(rows), tokens.split(rows))
    return torch.cat([TokenLogprob.apply(head(part), aim, temperature) for part, aim in parts])


def save_model(path, model, tokenizer):
    """save_pretrained of both under a temporary name, then renamed; an earlier `path` becomes path.1, path.2."""
    path = os.path.normpath(path)
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()} if is_sharded(model) else None
    if rank() > 0:
        return
    with writing(path):
        if hasattr(model, "merge_and_unload"):  # with LoRA: the adapter alone, and the weights with it added
            model.save_pretrained(os.path.join(f"{path}.tmp", "adapter"), save_embedding_layers=False)
            model = model.merge_and_unload(safe_merge=True)  # safe: on a copy
        model.save_pretrained(f"{path}.tmp", state_dict=weights)
        tokenizer.save_pretrained(f"{path}.tmp")
        if os.path.exists(path):
            number = next(n for n in range(1, 10**6) if not os.path.exists(f"{path}.{n}"))
            print(f"keeping the earlier {path} as {path}.{number}")
            os.rename(path, f"{path}.{number}")
        os.rename(f"{path}.tmp", path)
