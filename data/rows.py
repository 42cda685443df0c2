"""Reads a dataset of any known shape and prints what the scripts train on: one JSON line a row.

    python data/rows.py Anthropic/hh-rlhf --splits test --columns prompt chosen rejected | head -3
    python data/rows.py my_pairs.jsonl.gz --splits train --columns prompt completion

The scripts run this in a process of its own, so that none of them has to know that public data comes in many shapes. DATASET
is a hub name, a folder, or a .json, .jsonl or .parquet file (also .gz), which then serves as every split. Shapes, told by
the columns of the first row:

    prompt + completion                trl-lib/tldr; `label` does for `completion` (CarperAI/openai_summarize_tldr)
    prompt + chosen + rejected         trl-lib/tldr-preference, CarperAI/openai_summarize_comparisons
    chosen + rejected                  whole dialogues that begin with the same prompt (Anthropic/hh-rlhf)
    the same as lists of messages      conversational, rendered by the tokenizer's chat template (trl-lib/hh-rlhf-...)
    info + summaries + choice          openai/summarize_from_feedback, configuration comparisons
    article + highlights               abisee/cnn_dailymail, configuration 3.0.0

Out come prompt, completion and, for pairs, chosen and rejected, all text, beside the columns that were there; for pairs
the completion is the chosen answer. Dialogues whose answers follow different prompts and empty answers in dialogues are
dropped and counted. Everything else that is wrong is one line on stderr and exit code 2. With --limit, no more of a split
is read, or downloaded, than that many rows.
"""

import argparse
import glob
import gzip
import itertools
import json
import logging
import os
import sys
from collections import Counter

ROLES = {"system", "user", "assistant", "tool"}
MARKER = "\n\nAssistant:"  # of HH's dialogues


def fail(message):
    """Bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def broken_line(path):
    """Where the first line that is not JSON stands in a local file or folder, as text; '' if there is none."""
    files = [path] if os.path.isfile(path) else sorted(glob.glob(f"{path}/**/*.jsonl*", recursive=True))
    for file in (name for name in files if ".jsonl" in name):
        number = 0
        try:
            with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):  # noqa: B007, the number is the answer
                    json.loads(line)
        except ValueError:
            return f" ({file}, line {number})"
        except (EOFError, OSError):
            return f" ({file} is damaged after line {number})"
    return ""


def read(dataset, config, split, limit):
    """The first `limit` rows of a split as the library gives them, all rows if it is 0."""
    import datasets  # here, because it takes a second

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a README without a header is no news

    # note: local data is streamed, because the cache of `datasets` misses edits of local files
    local, kind = os.path.exists(dataset), "parquet" if ".parquet" in dataset else "json"
    source = (kind, None, None, {split: dataset}) if os.path.isfile(dataset) else (dataset, config or None)
    try:
        rows = datasets.load_dataset(*source, split=split, streaming=local or limit > 0)
        return list(itertools.islice(rows, limit or None))
    except StopIteration:  # an empty file
        return []
    except Exception as error:  # datasets raises many kinds; the first line says what went wrong
        reason = (str(error) or repr(error)).splitlines()[0]
        if isinstance(error, ConnectionError):
            reason += "; offline, give a local folder or file, or fill the cache beforehand (hf download)"
        fail(f"--dataset {dataset}, split {split!r}: {reason}{broken_line(dataset)}")


def dialogue_parts(dialogue):
    """HH's text -> prompt up to and including the last assistant marker, answer after it."""
    head, marker, answer = dialogue.rpartition(MARKER)
    return head + marker, answer


def message_parts(turns, tokenizer):
    """Messages that end with the assistant's -> prompt and answer as the chat template writes them."""
    roles = [turn["role"] for turn in turns]
    if set(roles) - ROLES:
        raise ValueError(f"unknown role {sorted(set(roles) - ROLES)[0]!r}, known are {', '.join(sorted(ROLES))}")
    if not roles or roles[-1] != "assistant":
        raise ValueError("the messages must end with a turn of the assistant")
    if not tokenizer.chat_template:
        raise ValueError(f"messages need a chat template, and {tokenizer.name_or_path} has none")
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not continue its own generation prompt")
    adds_bos = tokenizer.bos_token and tokenizer.bos_token_id in tokenizer("")["input_ids"]
    return prompt.removeprefix(tokenizer.bos_token) if adds_bos else prompt, whole[len(prompt) :]


def standard_row(row, tokenizer):
    """The columns of a row that the scripts know, as text, or a string: why the row is dropped. ValueError: no shape."""
    if "summaries" in row:
        post, choice = row["info"], row["choice"]
        prompt = f"SUBREDDIT: r/{post['subreddit']}\nTITLE: {post['title']}\nPOST: {post['post']}\nTL;DR:"
        if not post["post"]:  # some of its validation rows are news
            prompt = f"{post['article']}\nTL;DR:"
        texts = [" " + summary["text"].strip() for summary in row["summaries"]]
        return {"prompt": prompt, "completion": texts[choice], "chosen": texts[choice], "rejected": texts[1 - choice]}
    if "article" in row and "highlights" in row:
        return {"prompt": f"{row['article']}\nTL;DR:", "completion": f" {row['highlights']}"}
    names = [name for name in ("completion", "label", "chosen", "rejected") if name in row]
    if not names or ("prompt" not in row and "chosen" not in row):
        raise ValueError("not a known shape; needs 'prompt' and 'completion', or 'prompt', 'chosen' and 'rejected'")
    if any(isinstance(row[name], list) for name in names):
        parts = {name: message_parts((row.get("prompt") or []) + row[name], tokenizer) for name in names}
    elif "prompt" not in row:
        parts = {name: dialogue_parts(row[name]) for name in names}
    else:
        texts = {name: row[name] for name in ("prompt", *names)}
        return texts | {"completion": row[names[0]]}
    prompts, answers = {prompt for prompt, _ in parts.values()}, {name: answer for name, (_, answer) in parts.items()}
    if len(prompts) > 1:
        return "answers to different prompts"
    if not all(text.strip() for text in (*prompts, *answers.values())):
        return "empty prompt or answer"
    return {"prompt": prompts.pop(), **answers, "completion": answers[names[0]]}


def standard_rows(rows, columns, tokenizer, where):
    """Every row with its standard columns, `columns` checked; and the reasons of the dropped ones, counted."""
    kept, dropped = [], Counter()
    for number, row in enumerate(rows):
        try:
            found = standard_row(row, tokenizer)
        except Exception as error:  # a chat template may raise anything
            reason = (str(error) or repr(error)).splitlines()[0]
            fail(f"{where}, row {number}, columns {', '.join(row)}: {reason}")
        if isinstance(found, str):
            dropped[found] += 1
            continue
        kept.append(row | found)
        for column in columns:
            if column not in kept[-1]:
                fail(f"{where}: no column {column!r} in {list(row)}")
            if not isinstance(kept[-1][column], str) or not kept[-1][column].strip():
                fail(f"{where}, row {number}, column {column!r}: empty or not text")
    return kept, dropped


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--config", default="", help="configuration of a hub dataset")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--columns", nargs="+", default=["prompt", "completion"], help="columns that must hold text")
    parser.add_argument("--tokenizer", default="", help="folder or hub name; its chat template renders messages")
    parser.add_argument("--limit", type=int, default=0, help="rows of each split to read; 0: all")
    args = parser.parse_args()
    for split in args.splits:
        where = f"--dataset {args.dataset}, split {split!r}"
        rows, tokenizer = read(args.dataset, args.config, split, args.limit), None
        if rows and any(isinstance(rows[0].get(name), list) for name in ("prompt", "completion", "chosen")):
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
            except (OSError, ValueError) as error:
                fail(f"{where} holds messages, and the chat template of {args.tokenizer} cannot be loaded: {error}")
        kept, dropped = standard_rows(rows, args.columns, tokenizer, where)
        if not kept:
            fail(f"{where}: no rows")
        lost = "".join(f", dropped {count}: {reason}" for reason, count in dropped.items())
        print(f"{args.dataset}, {split}: {len(kept)} rows of {', '.join(rows[0])}{lost}", file=sys.stderr)
        for row in kept:
            print(json.dumps({"split": split, "row": row}, default=str))
