"""What plumbing/ stands for, as plainly as it can be said: one process, one device, the whole batch at once, nothing to resume.

    python -m plumbing.plain drpo.py > mine.py        # the script as one file that needs nothing else of this repository

The tests run every training script in that form and compare each number it logs: plumbing decides none of them.
"""

import json
import operator
import os
import runpy
import sys
from functools import partial
from types import SimpleNamespace

import torch
import transformers
import tyro
from huggingface_hub import InferenceClient
from torch.nn.utils.rnn import pad_sequence


def read_args(Args, may_be_0="", trains=True):
    others = {"dataset_config": "", "max_rows": 0, "micro_batch_size": 64, "gradient_checkpointing": False}
    return SimpleNamespace(**vars(tyro.cli(Args)), **others, dtype="float32")


def load_rows(dataset, config, splits, columns, tokenizer_path, limit):
    return {split: [json.loads(line) for line in open(os.path.join(dataset, f"{split}.jsonl"))] for split in splits}


def encode(tokenizer, texts, kind, max_length):
    rows = tokenizer(texts, add_special_tokens=kind == "prompts")["input_ids"]
    return [row[-max_length:] if kind == "prompts" else [*row, tokenizer.eos_token_id][:max_length] for row in rows]


def encode_rows(rows, tokenizer, args, **columns):
    for row in rows:
        row["prompt_ids"] = encode(tokenizer, [row["prompt"]], "prompts", args.prompt_length)[0]
        for name, column in columns.items():
            row[name] = encode(tokenizer, [row[column]], "responses", args.response_length)[0]


def pad(rows, side, device):
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def trim(ids, mask):
    return ids, mask


def end_ids(tokenizer, path=""):
    return [tokenizer.eos_token_id]


def nothing(*_, **__):
    pass


build_missing = nothing
check_model = nothing
sum_over_processes = nothing
go_on_alone = nothing
fail = sys.exit
content_id = str
fill = torch.no_grad()(torch.Tensor.copy_)


def load(auto_class, path):
    return auto_class.from_pretrained(path)


def load_reward(path):
    score = runpy.run_path(path)["score"]
    return lambda rows, texts: [float(score(row["prompt"], text, row)) for row, text in zip(rows, texts)]


def load_model(auto_class, path, tokenizer, args, device, may_be_empty=False, **config):
    if may_be_empty and not os.path.exists(os.path.join(path, "model.safetensors")):
        torch.manual_seed(args.seed)
        return auto_class.from_config(transformers.AutoConfig.from_pretrained(path)).eval().to(device)
    return auto_class.from_pretrained(path, dtype=torch.float32, **config).eval().to(device)


def first(x, *_):
    return x


make_trainable = first
can_share = first  # true
merge = first
forward_pass = first
forward_passes = first
output_head = operator.methodcaller("get_output_embeddings")
whole_batches = operator.floordiv


def trainable(**models):
    return {f"{kind}.{name}": p for kind, model in models.items() for name, p in model.named_parameters()}


def selected_logprobs(head, hidden, tokens, temperature):
    return (head(hidden) / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def save_model(path, model, tokenizer):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def start_processes(args, **shared):
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def in_chunks(function, model, size, *tensors, lengths, **kwargs):
    return function(model, *tensors, **kwargs)


def in_parts(function, rows, size, title):
    return function(rows)


def micro_batches(rows, lengths, size):
    return [rows]


def gradient_norm(parameters):
    return torch.stack([p.grad.pow(2).sum() for p in parameters.values() if p.grad is not None]).sum().sqrt()


def cached(path, make):
    return make()


def collect_verdicts(requests, file, args, options, read, ask_again):
    client = InferenceClient(base_url=args.api_base_url, api_key=os.environ.get(args.api_key_env, "no-key"))
    ask = partial(client.chat_completion, model=args.api_model, extra_body=options)
    return {key: read(ask(messages).choices[0].message.content) for key, (*_, messages) in requests.items()}


class Run:
    def __init__(self, args):
        self.dir, self.history, self.state = "runs", [], {}

    open = lap = check_finite = sample = nothing

    def updates(self, count):
        for self.update in range(1, count + 1):
            yield self.update

    def log(self, metrics, **shown):
        print(json.dumps({"update": self.update} | {name: float(x) for name, x in metrics.items()}))

    def keep(self, files):
        print(*files.values(), sep="\n")

    def finish(self, results, caption, samples=()):
        print(*samples, f"\n{caption}\n{json.dumps(results, indent=2)}", sep="\n")


if __name__ == "__main__":
    from benchmark.one_file import one_file

    print(one_file(sys.argv[1]), end="")
