"""Text -> token ids, and token ids -> padded tensors."""

import re

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing import fail


def encode_rows(rows, tokenizer, args, **columns):
    """Adds token ids to every row: `prompt_ids`, and for each name=column those of the response in that column."""
    ids = {"prompt_ids": encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)}
    for column in dict.fromkeys(columns.values()):  # each once, also where two names ask for it
        found = encode(tokenizer, [row[column] for row in rows], "responses", args.response_length)
        ids |= {name: found for name, wanted in columns.items() if wanted == column}
    for number, row in enumerate(rows):
        row |= {name: found[number] for name, found in ids.items()}


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


def cut_prompt(tokenizer, text, ids, limit):
    """At most `limit` ids of a text: a TL;DR post loses last paragraphs, then sentences; what is still too long, its start."""
    parts = re.fullmatch(r"(SUBREDDIT: .*?\n+POST: )(.*\S|)(\s*TL;DR:\s*)", text, re.DOTALL)
    post = parts[2][: len(tokenizer.decode(ids[:limit]))] if parts else ""  # more cannot fit, and each try takes time
    while len(ids) > limit and (kept := re.match(r".*\S(?=\s*\n)|.*[.!?](?= )", post, re.DOTALL)):
        post, ids = kept[0], tokenizer(f"{parts[1]}{kept[0]}{parts[3]}")["input_ids"]
    begin = ids[:1] == [tokenizer.bos_token_id]  # which stays
    return ids[:begin] + ids[begin + max(0, len(ids) - limit) :]


def pad(rows, side, device):
    """Lists of token ids -> ids (B, L) long with 0 where padded, mask (B, L) bool."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def trim(ids, mask):
    """Drops the columns (B, L) at the left that are padding in every row."""
    start = int(mask.any(0).long().argmax())
    return ids[:, start:], mask[:, start:]
