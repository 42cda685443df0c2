"""Text -> token ids, and token ids -> padded tensors. What a user wrote is text, also where it spells a control token."""

import re
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from plumbing import fail, find

MARK = "\ufdd0"  # no character, so in no text


class Rendered(str):
    """What a chat template wrote: its special tokens are control tokens, except those with a MARK inside (`mark`)."""

    def __new__(cls, marked):
        text = super().__new__(cls, marked.replace(MARK, ""))
        text.marked = marked
        return text


def special_tokens(tokenizer):
    """Pattern of the texts of all control tokens."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def mark(value, pattern):
    """A message, or a part of one, with a MARK in all that spells a control token."""
    if isinstance(value, list):
        return [mark(x, pattern) for x in value]
    if isinstance(value, dict):
        return {name: mark(x, pattern) for name, x in value.items()}
    return re.sub(pattern, lambda m: m[0][0] + MARK + m[0][1:], value) if isinstance(value, str) else value


def end_ids(tokenizer, path=""):
    """Ids that end a response: the tokenizer's EOS and those that the generation_config of its model, or of `path`, names."""
    if tokenizer.eos_token_id is None:
        fail(f"{tokenizer.name_or_path}: the tokenizer has no EOS token, and that is how a response ends")
    try:
        config = GenerationConfig.from_pretrained(find(path or tokenizer.name_or_path))
    except (OSError, ValueError):  # there is none
        config = GenerationConfig()
    more = config.eos_token_id
    if isinstance(more, int):  # one that transformers took from the model's config may be no more than a default there
        more = [] if getattr(config, "_from_model_config", False) else [more]
    return [*dict.fromkeys([tokenizer.eos_token_id, *(more or [])])]


def front_ids(tokenizer):
    """What the tokenizer puts before every text by itself, such as a BOS."""
    whole, own = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(n for n in range(len(whole)) if whole[n : n + len(own)] == own)]


def text_ids(tokenizer, texts):
    """Ids of each text alone, with nothing before or behind it."""
    rendered = isinstance(texts[0], Rendered)  # the others mostly too
    found = tokenizer(texts, add_special_tokens=False, split_special_tokens=not rendered)["input_ids"]
    for number, text in enumerate(texts):
        if isinstance(text, Rendered) != rendered or MARK in getattr(text, "marked", ""):
            pieces = re.split(f"({special_tokens(tokenizer)})", text.marked) if isinstance(text, Rendered) else [text]
            found[number] = []
            for place, piece in enumerate(pieces):  # text and control tokens in turn
                plain = {"add_special_tokens": False, "split_special_tokens": place % 2 == 0}
                found[number] += tokenizer(piece.replace(MARK, ""), **plain)["input_ids"]
    return found


def encode_rows(rows, tokenizer, args, **columns):
    """Adds token ids to every row: `prompt_ids`, and for each name=column those of the response in that column."""
    ids = {"prompt_ids": encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)}
    for column in dict.fromkeys(columns.values()):  # each once, also where two names ask for it
        found = encode(tokenizer, [row[column] for row in rows], "responses", args.response_length)
        ids |= {name: found for name, wanted in columns.items() if wanted == column}
    ends, front, dropped, kept = end_ids(tokenizer), front_ids(tokenizer), Counter(), []
    pairs = {"chosen", "rejected"} <= {*columns.values()}
    for row, prompt, *answers in zip(rows, *ids.values()):
        reasons = {  # to leave the list: what was cut may teach nothing any more
            "a dialogue longer than --prompt-length": len(prompt) > args.prompt_length,
            "no token in prompt or answer": len(prompt) <= len(front) or any(len(answer) < 2 for answer in answers),
            "an answer without an end in --response-length": any(answer[-1] not in ends for answer in answers),
            "chosen equals rejected": pairs and answers[0] == answers[1],
        }
        if any(reasons.values()):
            dropped[max(reasons, key=reasons.get)] += 1
        else:
            kept.append(row | dict(zip(ids, [prompt, *answers])))
    lost = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
    if not kept:
        fail(f"no rows are left, dropped {lost}")
    if lost:
        print(f"note: dropped of {len(rows)} rows {lost}")
    sizes = {name: sorted(len(row[name]) for row in kept) for name in ids}
    spread = ", ".join(f"{name} {x[len(x) // 2]}, {x[len(x) * 19 // 20]}, {x[-1]}" for name, x in sizes.items())
    print(
        f"{len(kept)} rows; tokens (half, 95%, all have at most): {spread}; {args.prompt_length}, {args.response_length}"
    )
    rows[:] = kept


def encode(tokenizer, texts, kind, max_length):
    """Token ids of each of the "prompts" or "responses", at most max_length, but for a prompt that a chat template wrote.

    A prompt has the tokenizer's own tokens in front, once, and no EOS behind it; a response ends where it first spells one.
    """
    ends, front = end_ids(tokenizer), front_ids(tokenizer)
    end = "|".join(map(re.escape, tokenizer.convert_ids_to_tokens(ends)))
    if kind == "prompts":
        spelled = rf"^{re.escape(tokenizer.bos_token or '(?!)')}|({end})\s*$"
        own = [text if isinstance(text, Rendered) else re.sub(spelled, "", text) for text in texts]
        found = text_ids(tokenizer, own)
        found = [ids if ids[: len(front)] == front else front + ids for ids in found]  # a template may have them too
        note(sum(text != whole for text, whole in zip(own, texts)), texts, "prompts spell a BOS or EOS: left out")
        long = [n for n, text in enumerate(own) if len(found[n]) > max_length and not isinstance(text, Rendered)]
        for n in long:
            found[n] = front + cut_prompt(tokenizer, own[n], found[n][len(front) :], max_length - len(front))
        note(len(long), texts, f"prompts have more than {max_length} tokens and were cut")
    else:
        parts = [[*re.split(f"({end})", getattr(text, "marked", text), maxsplit=1), "", ""][:3] for text in texts]
        bodies = [Rendered(body) if isinstance(text, Rendered) else body for text, (body, *_) in zip(texts, parts)]
        found = text_ids(tokenizer, bodies)
        for ids, (_, eos, _) in zip(found, parts):
            ids.append(tokenizer.convert_tokens_to_ids(eos or tokenizer.eos_token))
        note(sum(bool(rest.strip()) for *_, rest in parts), texts, "responses go on behind an EOS: cut there")
        found = [ids[: 1 + next(n for n, id in enumerate(ids) if id in ends)][:max_length] for ids in found]
    return found


def note(count, texts, what):
    if count:
        print(f"note: {count} of {len(texts)} {what}")


def cut_prompt(tokenizer, text, ids, limit):
    """At most `limit` ids of a text: a TL;DR post loses last paragraphs, then sentences; what is still too long, its start."""
    parts = re.fullmatch(r"(SUBREDDIT: .*?\n+POST: )(.*\S|)(\s*TL;DR:\s*)", text, re.DOTALL)
    post = parts[2][: len(tokenizer.decode(ids[:limit]))] if parts else ""  # more cannot fit, and each try takes time
    while len(ids) > limit and (kept := re.match(r".*\S(?=\s*\n)|.*[.!?](?= )", post, re.DOTALL)):
        post, ids = kept[0], text_ids(tokenizer, [f"{parts[1]}{kept[0]}{parts[3]}"])[0]
    return ids[max(0, len(ids) - max(0, limit)) :]


def pad(rows, side, device):
    """Lists of token ids -> ids (B, L) long with 0 where padded, mask (B, L) bool."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def trim(ids, mask):
    """Drops the columns (B, L) at the left that are padding in every row."""
    start = int(mask.any(0).long().argmax())
    return ids[:, start:], mask[:, start:]
