"""Models: loaded and checked, made trainable in little memory, saved."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from operator import methodcaller

import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, DynamicCache, GenerationConfig

from plumbing import ROOT, fail, find, inputs, new_folder, writing
from plumbing.logits import output_head
from plumbing.processes import barrier, rank
from plumbing.sharding import is_sharded, shard, whole
from plumbing.tokens import end_ids

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
WEIGHTS = r"\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$"


def load(auto_class, path, **kwargs):
    """`from_pretrained` of a folder or hub name, whose code never runs; what fails there becomes one line."""
    if os.path.exists(os.path.join(find(path), "adapter_config.json")):
        fail(f"{path} holds LoRA adapters alone; name the folder of the whole model, for a run's own the one above it")
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
    if rank() == 0 and path not in inputs:
        inputs[path] = content_id(path)
    made_here = "num_labels" in config or hasattr(model.config, "score_mean") or not hasattr(model, "score")
    if not made_here and model.config.pad_token_id in end_ids(tokenizer, path):
        print(f"note: {path} pads with its EOS: trained to be read one token before it, it is read at it here")
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

    That is: whole; and in a rollout, from a cache that finished rows leave. Notes whether rows can share a cache.
    """
    ids = 1 + torch.arange(10, device=model.device).view(2, 5) % (model.get_input_embeddings().num_embeddings - 1)
    ids[ids == getattr(model.config, "pad_token_id", None)] += 1
    scalar, name = hasattr(model, "score"), f"{path}: {type(model).__name__}"
    with torch.autocast(model.device.type, enabled=False):
        try:
            own = torch.cat([model(input_ids=row[None]).logits for row in ids])  # (2, 5, V), or (2, 1) scores
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (2, 5, d)
            ours = model.score(hidden[:, -1]) if scalar else output_head(model)(hidden)
        except Exception as error:  # models raise what they like at arguments that they do not know
            fail(f"{name} cannot be read as a decoder: {str(error).splitlines()[0]}")
        if not close(ours, own):
            fail(f"{name} does more, before or behind its output head, than is supported here")
        leave = methodcaller("batch_select_indices", torch.tensor([False, True], device=ids.device))
        if not scalar and not reads_on(model, ids, hidden, [1], leave):
            fail(f"{name} cannot be read as a decoder with a cache of keys and values")
        model.can_share = reads_on(model, ids, hidden, [0, 0, 1, 1], methodcaller("batch_repeat_interleave", 2))


close = partial(torch.allclose, rtol=1e-3, atol=1e-3)


def reads_on(model, ids, hidden, rows, change):
    """Whether the model finds the hidden states (2, 5, d) also where the last id of `rows` goes on from a changed cache.

    The prompt is padded on the left, as in the scripts.
    """
    mask, positions = F.pad(torch.ones_like(ids), (2, 0)).bool(), torch.arange(5, device=ids.device).expand(2, -1)
    with suppress(Exception):  # a cache that cannot be changed, or that the model does not take
        cache = DynamicCache(config=model.config)
        read = partial(model.base_model, past_key_values=cache, use_cache=True)
        padded = {"input_ids": F.pad(ids[:, :4], (2, 0)), "position_ids": F.pad(positions[:, :4], (2, 0))}
        start = read(**padded, attention_mask=mask[:, :6]).last_hidden_state[:, 2:]
        change(cache)
        rest = read(input_ids=ids[rows, 4:], position_ids=positions[rows, 4:], attention_mask=mask[rows])
        return close(start, hidden[:, :4]) and close(rest.last_hidden_state, hidden[rows, 4:])
    return False


def can_share(model, args):
    """Whether two responses may go on from one reading of their prompt, which recomputed layers cannot do either."""
    return getattr(model, "can_share", True) and not args.gradient_checkpointing


def content_id(path):
    """Hash of what a model in a local folder is read from; the name and commit of a model on the hub."""
    if not os.path.isdir(find(path)):
        return f"{path}@{getattr(load(AutoConfig, path), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for name in sorted(os.listdir(find(path))):
        if re.search(r"\.(safetensors|json|jinja|model|tiktoken|txt)$", name):
            with open(os.path.join(find(path), name), "rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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
            with writing(f"the folder {path}"):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                lock = FileLock(f"{path}.lock").acquire()  # a second first run waits here
            with lock:
                if not os.path.isdir(path):
                    build(path, script)
    barrier()


def build(path, script):
    """Runs a script alone; a signal goes on to it, which ends it and then this program."""
    print(f"{path} does not exist yet: running {script} on the embedded task first", flush=True)
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    child = subprocess.Popen([sys.executable, os.path.join(ROOT, script)], env=alone)
    handlers = {n: signal.signal(n, lambda *_: child.terminate()) for n in (signal.SIGINT, signal.SIGTERM)}
    if child.wait() != 0:  # note: by a second SIGINT, after a terminal's own, it would not finish its update
        fail(f"{script} did not finish")
    for number, handler in handlers.items():
        signal.signal(number, handler)


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

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = model.peft_config["default"], {name: x.cpu().clone() for name, x in tensors.items()}
    with torch.autocast(model.device.type, enabled=False):
        model = model.merge_and_unload(safe_merge=True)  # safe: on a copy
    model.adapter = adapter
    return model


def trainable(**models):
    """Name -> parameter of everything that is trained."""
    named = {kind: model.named_parameters() for kind, model in models.items()}
    return {f"{kind}.{name}": p for kind, pairs in named.items() for name, p in pairs if p.requires_grad}


def save_model(path, model, tokenizer):
    """save_pretrained of both as a new folder (new_folder), with the ids that end a response where `generate` looks."""
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()} if is_sharded(model) else None
    if rank() > 0:
        return
    if not hasattr(model, "score"):
        ends = end_ids(tokenizer)
        try:
            model.generation_config.validate(strict=True)
        except ValueError:  # transformers would refuse to save what it has loaded
            model.generation_config = GenerationConfig.from_model_config(model.config)
        for config in (model.config, model.generation_config):
            config.eos_token_id = ends if len(ends) > 1 else ends[0]
    with new_folder(path) as folder:
        if hasattr(model, "adapter") and not hasattr(model, "score"):  # note: a score's centre is not in an adapter
            config, tensors = model.adapter
            if os.path.isdir(config.base_model_name_or_path):
                config.base_model_name_or_path = os.path.abspath(config.base_model_name_or_path)
            config.save_pretrained(os.path.join(folder, "adapter"))
            save_file(tensors, os.path.join(folder, "adapter", "adapter_model.safetensors"))
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
