"""Text -> token ids, and token ids -> padded tensors. What a user wrote is text, also where it spells a control token."""

import re
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from plumbing import fail, find

MARK = "\ufdd0"  # no character, so in no text


class Rendered(str):
    """What a chat template wrote: its special tokens are control tokens, except those with a MARK inside, which users spelled.

    shorter: function -> the same prompt without its oldest turns, or None where nothing is left to leave out.
    """

    def __new__(cls, marked, shorter=lambda: None):
        text = super().__new__(cls, marked.replace(MARK, ""))
        text.marked, text.shorter = marked, shorter
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
        more = None if getattr(config, "_from_model_config", False) else config.eos_token_id
    except (OSError, ValueError):  # there is none
        more = None
    return [*dict.fromkeys([tokenizer.eos_token_id, *([more] if isinstance(more, int) else more or [])])]


def front_ids(tokenizer):
    """What the tokenizer puts before every text by itself, such as a BOS."""
    whole, own = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return whole[: next(n for n in range(len(whole)) if whole[n : n + len(own)] == own)]


def text_ids(tokenizer, texts):
    """Ids of each text alone."""
    rendered = [isinstance(text, Rendered) for text in texts]
    ids = tokenizer([*texts], add_special_tokens=False, split_special_tokens=not rendered[0])["input_ids"]
    for number, text in enumerate(texts):
        if rendered[number] != rendered[0] or (rendered[number] and MARK in text.marked):
            pieces = re.split(f"({special_tokens(tokenizer)})", text.marked) if rendered[number] else [text]
            ids[number] = []
            for place, piece in enumerate(pieces):  # text and control tokens in turn
                plain = {"add_special_tokens": False, "split_special_tokens": place % 2 == 0}
                ids[number] += tokenizer(piece.replace(MARK, ""), **plain)["input_ids"]
    return ids


def encode_rows(rows, tokenizer, args, **columns):
    """Adds token ids to every row: `prompt_ids`, and for each name=column those of the response in that column.

    Rows that teach nothing, now that texts are cut, leave the list: no prompt or answer, an answer without an end, equal ones.
    """
    ids = {"prompt_ids": encode(tokenizer, [row["prompt"] for row in rows], "prompts", args.prompt_length)}
    for column in dict.fromkeys(columns.values()):  # each once, also where two names ask for it
        found = encode(tokenizer, [row[column] for row in rows], "responses", args.response_length)
        ids |= {name: found for name, wanted in columns.items() if wanted == column}
    ends, front, dropped, kept = end_ids(tokenizer), front_ids(tokenizer), Counter(), []
    for number, row in enumerate(rows):
        row |= {name: found[number] for name, found in ids.items()}
        prompt, answers = row["prompt_ids"], [row[name] for name in columns]
        reasons = {
            "the last turn alone is longer than --prompt-length": len(prompt) > args.prompt_length,
            "no token in prompt or answer": len(prompt) <= len(front) or any(len(answer) < 2 for answer in answers),
            "an answer without an end in --response-length": any(answer[-1] not in ends for answer in answers),
            "chosen equals rejected": {"chosen", "rejected"} <= {*columns.values()} and answers[0] == answers[1],
        }
        if any(reasons.values()):
            dropped[max(reasons, key=reasons.get)] += 1
        else:
            kept.append(row)
    lost = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
    if lost:
        print(f"note: dropped of {len(rows)} rows {lost}")
    if not kept:
        fail(f"no rows are left, dropped {lost}")
    rows[:] = kept


def encode(tokenizer, texts, kind, max_length):
    """Token ids of each of the "prompts" or "responses", at most max_length, but for rendered prompts of one long turn."""
    ends = end_ids(tokenizer)
    spelled = f"({'|'.join(map(re.escape, tokenizer.convert_ids_to_tokens(ends)))})"  # as datasets do
    if kind == "prompts":
        return encode_prompts(tokenizer, texts, spelled, max_length)
    parts = [
        [text, "", ""] if isinstance(text, Rendered) else [*re.split(spelled, text, maxsplit=1), "", ""][:3]
        for text in texts
    ]
    found = text_ids(tokenizer, [text for text, *_ in parts])
    for number, (_, end, _) in enumerate(parts):
        end = tokenizer.convert_tokens_to_ids(end) if end else tokenizer.eos_token_id
        places = [place for place, id in enumerate(found[number]) if id in ends]  # of a template
        found[number] = found[number][: places[0] + 1] if places else [*found[number], end]
    note(
        sum(bool(rest.strip()) for *_, rest in parts),
        f"of {len(texts)} responses spell an end before their end and stop there",
    )
    return [row[:max_length] for row in found]


def encode_prompts(tokenizer, texts, spelled, limit):
    """A prompt has one BOS at most and no EOS behind it. One that is too long loses turns, or what cut_prompt takes."""
    front, bos = front_ids(tokenizer), tokenizer.bos_token or "(?!)"
    own = [
        text if isinstance(text, Rendered) else re.sub(rf"^{re.escape(bos)}|{spelled}\s*$", "", text) for text in texts
    ]
    found, cut = text_ids(tokenizer, own), 0
    for number, (text, ids) in enumerate(zip(own, found)):
        begins = bool(front) and ids[: len(front)] == front  # a template's own
        start = [] if begins else front or [tokenizer.bos_token_id] * texts[number].startswith(bos)
        cut += len(start + ids) > limit
        while len(start + ids) > limit and isinstance(text, Rendered) and (shorter := text.shorter()):
            text, ids = shorter, text_ids(tokenizer, [shorter])[0]
        found[number] = start + (
            ids if isinstance(text, Rendered) else cut_prompt(tokenizer, text, ids, limit - len(start))
        )
    note(
        sum(text != whole for text, whole in zip(own, texts)),
        f"of {len(texts)} prompts spell a BOS or EOS of their own",
    )
    note(cut, f"of {len(texts)} prompts have more than {limit} tokens and were cut")
    return found


def note(count, what):
    if count:
        print(f"note: {count} {what}")


def cut_prompt(tokenizer, text, ids, limit):
    """At most `limit` ids of a text: a TL;DR post loses last paragraphs, then sentences; what is still too long, its start."""
    parts = (
        re.fullmatch(r"(SUBREDDIT: .*?\n+POST: )(.*\S|)(\s*TL;DR:\s*)", text, re.DOTALL) if len(ids) > limit else None
    )
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
