"""Models: loaded and checked, made trainable in little memory, saved."""

import os
import re
import subprocess
import sys
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, DynamicCache

from plumbing import ROOT, fail, find, writing
from plumbing.logits import output_head
from plumbing.processes import barrier, rank
from plumbing.sharding import is_sharded, shard, whole

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
WEIGHTS = r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$"


def load(auto_class, path, **kwargs):
    """`from_pretrained` of a folder or hub name, whose code never runs; what fails there becomes one line."""
    try:
        return auto_class.from_pretrained(find(path), trust_remote_code=False, **kwargs)
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        fail(f"cannot load {path}: {(str(error) or repr(error)).strip().splitlines()[0]}")


def load_model(auto_class, path, tokenizer, args, device, may_be_empty=False, **config):
    """A model that fits tokenizer, lengths and role, in float32, without dropout, on the device or sharded.

    Weights come from safetensors alone, all of them, but for the head where `num_labels` asks for a new one. may_be_empty:
    a folder without weights of any kind is initialised at random from its config.
    """
    folder = find(path)
    if may_be_empty and os.path.isdir(folder) and not any(re.search(WEIGHTS, name) for name in os.listdir(folder)):
        print(f"{path} holds no weights: initialising at random from its config")
        torch.manual_seed(args.seed)
        model, info = auto_class.from_config(load(AutoConfig, path), dtype=torch.float32), {}
    else:
        report = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # check_weights names what does not fit
        model, info = load(auto_class, path, dtype=torch.float32, use_safetensors=True, **report, **config)
    check_fit(model, path, tokenizer, args.prompt_length + args.response_length)
    check_weights(model, path, info, new_head="num_labels" in config)
    sharded = getattr(args, "shard", False)  # judge.py has no --shard
    model = (model if sharded else model.to(device)).eval()
    check_reading(model, path)
    if args.dtype != "float32" and hasattr(model, "score"):
        keep_float32(model.score)
    return shard(model) if sharded else model


def check_weights(model, path, info, new_head):
    """Ends the program at weights that the file lacks, where random numbers would stand, or has too many, or not finite."""
    missing, unexpected = set(info.get("missing_keys", ())), set(info.get("unexpected_keys", ()))
    if new_head and missing == {"score.weight"}:  # in the place of the output head, which is no part of the body
        missing, unexpected = set(), {name for name in unexpected if name.startswith(f"{model.base_model_prefix}.")}
    problems = {"lacks": missing, "has the unknown": unexpected, "has in another shape": info.get("mismatched_keys")}
    problems["holds NaN or infinity in"] = {name for name, p in model.named_parameters() if not p.isfinite().all()}
    for problem, names in problems.items():
        if names:
            names = sorted(map(str, names))
            fail(f"{path} {problem} {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5))


@torch.no_grad()
def check_reading(model, path):
    """Ends the program unless the model, read as the scripts do, gives the outputs of its own forward pass.

    That is: whole; and as in a rollout, padded on the left, from a cache that finished rows leave.
    """
    ids = 1 + torch.arange(10, device=model.device).view(2, 5) % (model.get_input_embeddings().num_embeddings - 1)
    ids[ids == getattr(model.config, "pad_token_id", None)] += 1
    mask, positions = F.pad(torch.ones_like(ids), (2, 0)).bool(), torch.arange(5, device=ids.device).expand(2, -1)
    try:
        with torch.autocast(model.device.type, enabled=False):
            own = torch.cat([model(input_ids=row[None]).logits for row in ids])  # (2, 5, V), or (2, 1) scores
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (2, 5, d)
            if hasattr(model, "score"):
                pairs = [(model.score(hidden[:, -1]), own)]
            else:
                cache, logits = DynamicCache(config=model.config), output_head(model)
                read = partial(model.base_model, past_key_values=cache, use_cache=True)
                padded = {"input_ids": F.pad(ids[:, :4], (2, 0)), "position_ids": F.pad(positions[:, :4], (2, 0))}
                start = read(**padded, attention_mask=mask[:, :6]).last_hidden_state[:, 2:]
                cache.batch_select_indices(torch.tensor([False, True], device=ids.device))
                rest = read(input_ids=ids[1:, 4:], position_ids=positions[1:, 4:], attention_mask=mask[1:])
                pairs = [(logits(hidden), own), (logits(start), own[:, :4])]
                pairs.append((logits(rest.last_hidden_state), own[1:, 4:]))
    except Exception as error:  # models raise what they like at arguments that they do not know
        fail(f"{path}: {type(model).__name__} cannot be read as a decoder with a cache: {str(error).splitlines()[0]}")
    if not all(torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3) for ours, theirs in pairs):
        fail(f"{path}: {type(model).__name__} does more, before or behind its output head, than is supported here")


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
        adapted = get_peft_model(model, config)
    except ValueError as error:
        fail(f"--lora-target {args.lora_target}: {str(error).splitlines()[0]}")
    for name, module in [*model.named_modules()]:
        if hasattr(module, "base_layer"):  # else bfloat16 would round away much of what an adapter adds to its output
            for layer in (module.base_layer, frozen.get_submodule(name)):
                layer.register_forward_hook(lambda module, inputs, x: x.float() if x.dtype == torch.bfloat16 else x)
    return adapted


def keep_float32(module):
    """The module computes outside autocast: scores and values are float32 numbers, not bfloat16 ones."""

    def before(module, inputs):
        torch.set_autocast_enabled(inputs[0].device.type, False)
        return tuple(x.float() for x in inputs)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(lambda module, inputs, _: torch.set_autocast_enabled(inputs[0].device.type, True))


def merge(model):
    """What make_trainable returned -> the model to be saved: with LoRA the adapters are added to the weights, in float32.

    From here on the script's own model is that model too; the adapter by itself is kept for save_model.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    from peft import get_peft_model_state_dict

    tensors = {
        name: x.cpu().clone() for name, x in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    adapter = model.peft_config["default"], tensors
    with torch.autocast(model.device.type, enabled=False):
        model = model.merge_and_unload(safe_merge=True)  # safe: on a copy
    model.adapter = adapter
    return model


def trainable(**models):
    """Name -> parameter of everything that is trained."""
    named = {kind: model.named_parameters() for kind, model in models.items()}
    return {f"{kind}.{name}": p for kind, pairs in named.items() for name, p in pairs if p.requires_grad}


def save_model(path, model, tokenizer):
    """save_pretrained of both under a temporary name, then renamed; an earlier `path` becomes path.1, path.2."""
    path = os.path.normpath(path)
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()} if is_sharded(model) else None
    if rank() > 0:
        return
    with writing(path):
        if hasattr(model, "adapter"):
            config, tensors = model.adapter
            config.save_pretrained(os.path.join(f"{path}.tmp", "adapter"))
            save_file(tensors, os.path.join(f"{path}.tmp", "adapter", "adapter_model.safetensors"))
        model.save_pretrained(f"{path}.tmp", state_dict=weights)
        tokenizer.save_pretrained(f"{path}.tmp")
        if os.path.exists(path):
            number = next(n for n in range(1, 10**6) if not os.path.exists(f"{path}.{n}"))
            print(f"keeping the earlier {path} as {path}.{number}")
            os.rename(path, f"{path}.{number}")
        os.rename(f"{path}.tmp", path)
