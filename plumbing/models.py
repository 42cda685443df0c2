"""Models: loaded and checked, made trainable in little memory, saved."""

import hashlib
import os
import signal
import subprocess
import sys
import warnings
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, DynamicCache

from data import COMMANDS
from plumbing import ROOT, fail, find, inputs, new_folder, writing
from plumbing.logits import output_head
from plumbing.processes import barrier, rank
from plumbing.rewards import load_reward
from plumbing.sharding import decoder_layers, is_sharded, shard, whole
from plumbing.tokens import end_ids

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def load(auto_class, path, weights=True, **kwargs):
    """What a folder or hub name holds, or its config with random weights. Code from there never runs; errors are one line."""
    source, no_code = find(path), {"trust_remote_code": False}
    if os.path.exists(os.path.join(source, "adapter_config.json")):
        fail(f"{path} holds LoRA adapters alone; name a folder of the whole model, into which they are merged")
    try:
        if weights:
            return auto_class.from_pretrained(source, **no_code, **kwargs)
        return auto_class.from_config(AutoConfig.from_pretrained(source, **no_code), **no_code, **kwargs)
    except Exception as error:  # transformers, safetensors and the hub raise many kinds
        fail(f"cannot load {path}: {(str(error) or repr(error)).strip().splitlines()[0]}")


def load_model(auto_class, path, tokenizer, args, device, may_be_empty=False, **config):
    """A model that fits tokenizer, lengths and role, in float32, without dropout, on the device or sharded.

    may_be_empty: of a folder without weight files of any kind it is a random one. num_labels: its scalar head may be new.
    """
    folder, info = find(path), {}
    if may_be_empty and os.path.isdir(folder) and not any(name.endswith(WEIGHTS) for name in os.listdir(folder)):
        print(f"{path} holds no weights: initialising at random from its config")
        torch.manual_seed(args.seed)
        model = load(auto_class, path, weights=False, dtype=torch.float32)
    else:
        report = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # check_weights names what does not fit
        model, info = load(auto_class, path, dtype=torch.float32, use_safetensors=True, **report, **config)
    check_fit(model, path, tokenizer, args.prompt_length + args.response_length)
    check_weights(model, path, info, new_head="num_labels" in config)
    if rank() == 0 and path not in inputs:
        inputs[path] = content_id(path)
        print(f"{path}: {model.num_parameters():,} weights")
    model.get_input_embeddings().padding_idx = None  # what is padding elsewhere may be a token here, which is trained
    if hasattr(model, "score"):
        model.score.__class__ = Float32Head
        made_here = "num_labels" in config or hasattr(model.config, "score_mean")
        if not made_here and model.config.pad_token_id in end_ids(tokenizer, path):
            print(f"note: {path} pads with its EOS: trained to be read one token before it, it is read at it here")
    sharded = getattr(args, "shard", False)  # judge.py has no --shard
    model = (model if sharded else model.to(device)).eval()
    check_reading(model, path)
    return shard(model) if sharded else model


class Float32Head(torch.nn.Linear):
    """A scalar head outside autocast: scores and values are float32 numbers, not bfloat16 ones."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def check_model(auto_class, path, tokenizer, length):
    """As load_model checks, before there is time or memory for the weights."""
    with torch.device("meta"):  # shapes alone
        check_fit(load(auto_class, path, weights=False), path, tokenizer, length)


def check_fit(model, path, tokenizer, length):
    """Ends the program if the model does not fit the tokenizer, `length` tokens or, with a scalar head, its role."""
    rows, positions = model.get_input_embeddings().num_embeddings, getattr(model.config, "max_position_embeddings", 0)
    if rows < len(tokenizer):
        fail(f"{path}: the embedding has {rows} rows, the tokenizer {len(tokenizer)} tokens; take its own tokenizer")
    if positions and positions < length:
        fail(f"{path} has {positions} positions; --prompt-length and --response-length add up to {length}")
    if find(path) != tokenizer.name_or_path and load(AutoTokenizer, path).get_vocab() != tokenizer.get_vocab():
        fail(f"{path} has another vocabulary than {tokenizer.name_or_path}")
    if model.get_output_embeddings() is None and not (model.config.num_labels == 1 and hasattr(model, "score")):
        fail(f"{path} is no reward model of a decoder: it must have exactly one output, named score")


def check_weights(model, path, info, new_head):
    """Ends the program at weights that the file lacks, where random numbers would stand, has too many, or not finite."""
    missing, unexpected = set(info.get("missing_keys", ())), set(info.get("unexpected_keys", ()))
    if new_head and missing == {"score.weight"}:  # in the place of the output head, which is no part of the body
        missing, unexpected = set(), {name for name in unexpected if name.startswith(f"{model.base_model_prefix}.")}
    problems = {"lacks": missing, "has the unknown": unexpected, "has in another shape": info.get("mismatched_keys")}
    problems["holds NaN or infinity in"] = {name for name, p in model.named_parameters() if not p.isfinite().all()}
    for problem, names in problems.items():
        if names:
            fail(f"{path} {problem} {min(map(str, names))}" + f" and {len(names) - 1} more" * (len(names) > 1))


@torch.no_grad()
def check_reading(model, path):
    """Ends the program unless the model, read as the scripts do, gives the outputs of its own forward pass."""
    ids = 1 + torch.arange(10, device=model.device).view(2, 5) % (model.get_input_embeddings().num_embeddings - 1)
    ids[ids == getattr(model.config, "pad_token_id", None)] += 1
    scalar, close = hasattr(model, "score"), partial(torch.allclose, rtol=1e-3, atol=1e-3)
    whole = model.has_cache = False
    reason = "its outputs are not its head's on hidden states, or no cache of keys and values gives them"
    try:
        with torch.autocast(model.device.type, enabled=False):
            own = torch.cat([model(input_ids=row[None]).logits for row in ids])  # (2, 5, V), or (2, 1) scores
            hidden = model.base_model(input_ids=F.pad(ids, (0, 2)), use_cache=False).last_hidden_state[:, :5]
            whole = close(model.score(hidden[:, -1]) if scalar else output_head(model)(hidden), own)
            ids, rows, cache = F.pad(ids, (2, 0)), [0, 1, 1], DynamicCache(config=model.config)
            # for a policy also from a cache, padded on the left, whose rows are repeated and leave
            mask, read = ids > 0, partial(model.base_model, past_key_values=cache, use_cache=True)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            start = read(input_ids=ids[:, :6], attention_mask=mask[:, :6], position_ids=positions[:, :6])
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([False, True, True, True], device=ids.device))
            end = read(input_ids=ids[rows, 6:], attention_mask=mask[rows], position_ids=positions[rows, 6:])
            states = torch.cat([start.last_hidden_state[rows, 2:], end.last_hidden_state], dim=1)
            model.has_cache = close(states, hidden[rows])
    except Exception as error:  # models raise what they like at arguments that they do not know
        reason = str(error)
    if not whole or not (scalar or model.has_cache):
        fail(f"{path}: {type(model).__name__} cannot be read as a decoder: {reason}")


def can_share(model, args):
    """Whether two responses may go on from one reading of their prompt, which recomputed layers cannot do either."""
    return model.has_cache and not args.gradient_checkpointing


def content_id(path):
    """Hash of what a model in a local folder is read from; the name and commit of a model on the hub."""
    if not os.path.isdir(find(path)):
        return f"{path}@{getattr(load(AutoConfig, path), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for name in sorted(os.listdir(find(path))):
        if name.endswith((".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".txt")):
            with open(os.path.join(find(path), name), "rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def build_missing(*wanted):
    """Checks the models at the paths, then trains those that are missing and of which data/__init__.py says how."""
    for path in sorted(wanted, key=COMMANDS.__contains__):
        is_there = partial(os.path.exists, os.path.join(path, "config.json"))
        if path.endswith(".py"):
            load_reward(path)
        elif path not in COMMANDS:
            load(AutoTokenizer, path)
        elif not is_there() and os.environ.get("RANK", "0") == "0":
            with writing(f"the folder {path}"):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with FileLock(f"{path}.lock"):  # a second first run waits here
                    if not is_there():
                        build(path, *COMMANDS[path])
    barrier()


def build(path, script, *flags):
    """Runs a script alone; a signal goes on to it, which ends it and then this program."""
    print(f"{path} does not exist yet: running {' '.join((script, *flags))} first", flush=True)
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    child = subprocess.Popen([sys.executable, os.path.join(ROOT, script), *flags], env=alone)
    handlers = {n: signal.signal(n, lambda *_: child.terminate()) for n in (signal.SIGINT, signal.SIGTERM)}
    if child.wait() != 0:  # note: by a second SIGINT, after a terminal's own, it would not finish its update
        fail(f"{script} did not finish")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_trainable(model, frozen, args):
    """Recomputed layers and LoRA adapters (arXiv:2106.09685) where args ask for them; -> what save_model takes.

    Under the adapters, at first without effect, lie the weights of `frozen`, stored once. The head `score` is trained too.
    """
    words = " ".join(sys.argv).replace("_", "-")
    if model.num_parameters() > 10**7 and not (args.resume or "--learning-rate" in words):
        usual = "pretrained ones take about 1e-5, with --lora-rank about 1e-4"
        fail(f"--learning-rate must be given: {args.learning_rate} is for tiny models of the embedded task, {usual}")
    if args.gradient_checkpointing:
        for layer in decoder_layers(model):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if args.lora_rank == 0:
        return model
    torch.manual_seed(args.seed)
    model.load_state_dict(frozen.state_dict(), assign=True)
    kind = "SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM"
    names = args.lora_target if args.lora_target == "all-linear" else args.lora_target.split(",")
    try:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type=kind, r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules=names)
        adapted = get_peft_model(model, config)
    except ImportError:
        fail("--lora-rank needs peft: pip install peft")
    except ValueError as error:
        fail(f"--lora-target {args.lora_target}: {str(error).splitlines()[0]}")
    wide = partial(torch.promote_types, torch.float32)
    for name, lora in [*model.named_modules()]:
        if hasattr(lora, "base_layer"):  # else bfloat16 would round away much of what an adapter adds to its output
            for layer in (lora.base_layer, *([frozen.get_submodule(name)] if kind == "CAUSAL_LM" else [])):
                layer.register_forward_hook(lambda _, inputs, x, lora=lora: x if lora.merged else x.to(wide(x.dtype)))
    return adapted


def merge(model):
    """What make_trainable returned, with the adapters, if there are any, added to the weights in float32."""
    if hasattr(model, "merge_adapter"):
        with torch.autocast(model.device.type, enabled=False):
            model.merge_adapter(safe_merge=True)  # safe: on a copy, because the frozen model has the same weights
    return model


def trainable(**models):
    """Name -> parameter of everything that is trained."""
    named = {kind: model.named_parameters() for kind, model in models.items()}
    return {f"{kind}.{name}": p for kind, pairs in named.items() for name, p in pairs if p.requires_grad}


def save_model(path, model, tokenizer):
    """A new folder (new_folder) of both; with LoRA of the merged weights."""
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()} if is_sharded(model) else None
    if rank() > 0:
        return
    with new_folder(path) as folder:
        if hasattr(model, "merge_adapter"):
            with warnings.catch_warnings(action="ignore"):  # that they are merged already
                model = model.merge_and_unload()
        set_special_ids(model, tokenizer)
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def set_special_ids(model, tokenizer):
    """`generate` stops where responses end. A score is read there: by transformers at the last token that is no padding."""
    ends = end_ids(tokenizer)
    if not hasattr(model, "score"):
        model.config.eos_token_id = model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.generation_config._original_object_hash = hash(model.generation_config)  # what was loaded can be saved
        return
    special = [id for id, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    model.config.pad_token_id = next((id for id in (tokenizer.pad_token_id, *special) if id not in (None, *ends)), None)
    if model.config.pad_token_id is None:
        print("note: no special token but the EOS to pad with: transformers will score one row at a time")
    else:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
