"""Datasets of any known shape, from the hub or from disk, as the rows of text that the scripts train on.

    python -m plumbing.rows Anthropic/hh-rlhf --splits test --columns prompt chosen rejected | head -3
    python -m plumbing.rows my_pairs.jsonl.gz --splits train --columns prompt completion

prints them, one JSON line a row. A dataset is a hub name, a folder, or a .json, .jsonl or .parquet file (also .gz), which
then serves as every split. Shapes, told by the columns of the first row:

    prompt + completion                trl-lib/tldr; `label` does for `completion` (CarperAI/openai_summarize_tldr)
    prompt + chosen + rejected         trl-lib/tldr-preference; CarperAI/openai_summarize_comparisons, whose answers begin
                                       with 'TL;DR:' (moved to the end of the prompt)
    chosen + rejected                  whole dialogues that begin with the same prompt (Anthropic/hh-rlhf)
    the same as lists of messages      conversational, rendered by the tokenizer's chat template (trl-lib/hh-rlhf-...);
                                       a `prompt` of text may stand beside them (HuggingFaceH4/ultrafeedback_binarized)
    info + summaries + choice          openai/summarize_from_feedback, configuration comparisons
    article + highlights               abisee/cnn_dailymail, configuration 3.0.0

Out come prompt, completion and, for pairs, chosen and rejected, all text, beside the columns that were there; for pairs
the completion is the chosen answer. Answers to a prompt that ends in 'TL;DR:' begin with a space. Dropped and counted are
rows where a needed text is missing, empty or blank, pairs of equal answers where both are asked for, and dialogues whose
answers follow different prompts or which do not end with the assistant. Everything else that is wrong is one line on
stderr and exit code 2.
"""

import argparse
import glob
import gzip
import itertools
import json
import logging
import os
import signal
import sys
from collections import Counter

from plumbing import fail, find

ROLES = {"system", "user", "assistant", "tool"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of HH's dialogues
TLDR = "TL;DR:"
EMPTY = "empty prompt or answer"


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
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # they raise what they log

    ending = os.path.splitext(dataset.removesuffix(".gz"))[1]
    if os.path.isfile(dataset) and ending not in (".jsonl", ".json", ".parquet"):
        fail(f"--dataset {dataset}: this file cannot be read, only .jsonl, .json and .parquet, also .gz")
    # note: local data is streamed, because the cache of `datasets` misses edits of local files
    local, kind = os.path.exists(dataset), "parquet" if ending == ".parquet" else "json"
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


def blank(value):
    """Whether a column holds nothing: null, white space or no messages."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_of(row, column):
    """The text of a column, '' for null."""
    if not isinstance(row[column], str | None):
        raise ValueError(f"column {column!r}: {type(row[column]).__name__}, not text")
    return row[column] or ""


def dialogue_parts(dialogue):
    """HH's text -> prompt up to and including the last assistant marker, answer after it; or why there are none."""
    head, marker, answer = dialogue.rpartition(ASSISTANT)
    if not marker or HUMAN in answer:
        return "does not end with the assistant"
    return head + marker, answer


def message_parts(turns, tokenizer):
    """Messages that end with the assistant's -> prompt and answer as the chat template writes them; or why there are none."""
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise ValueError("not a list of messages")
    roles = [turn["role"] for turn in turns]
    if set(roles) - ROLES:
        raise ValueError(f"unknown role {sorted(set(roles) - ROLES)[0]!r}, known are {', '.join(sorted(ROLES))}")
    if not roles or roles[-1] != "assistant":
        raise ValueError("the messages must end with a turn of the assistant")
    contents = [turn.get("content") for turn in turns]  # note: once rendered, nothing is blank any more
    if blank(contents[-1]) or all(blank(content) for content in contents[:-1]):
        return EMPTY
    if not tokenizer.chat_template:
        raise ValueError(f"messages need a chat template, and {tokenizer.name_or_path} has none")
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not continue its own generation prompt")
    adds_bos = tokenizer.bos_token and tokenizer.bos_token_id in tokenizer("")["input_ids"]
    return prompt.removeprefix(tokenizer.bos_token) if adds_bos else prompt, whole[len(prompt) :]


def all_turns(prompt, turns):
    """The turns of an answer after those of its prompt, which may be text; the answer's may hold the prompt already."""
    if not isinstance(turns, list):
        raise ValueError("not a list of messages")
    if isinstance(prompt, str):
        holds = isinstance(turns[0], dict) and turns[0].get("role") in ("system", "user")
        prompt = [] if holds else [{"role": "user", "content": prompt}]
    return (prompt or []) + turns


def comparison(row):
    """Two summaries of a post and the choice between them."""
    post, summaries, choice = row["info"], row["summaries"], row["choice"]
    if blank(post) or blank(summaries) or blank(choice):
        return EMPTY
    prompt = f"SUBREDDIT: r/{post['subreddit']}\nTITLE: {post['title']}\nPOST: {post['post']}\n{TLDR}"
    if blank(text_of(post, "post")):  # some of its validation rows are news
        if "article" not in post or blank(text_of(post, "article")):
            return EMPTY
        prompt = f"{post['article']}\n{TLDR}"
    texts = [" " + text_of(summary, "text").strip() for summary in summaries]
    return {"prompt": prompt, "completion": texts[choice], "chosen": texts[choice], "rejected": texts[1 - choice]}


def standard_row(row, tokenizer):
    """The columns of a row that the scripts know, or a string: why the row is dropped. ValueError: no shape."""
    if "summaries" in row:
        return comparison(row)
    if "article" in row and "highlights" in row:
        article, highlights = text_of(row, "article"), text_of(row, "highlights")
        return EMPTY if blank(article) else {"prompt": f"{article}\n{TLDR}", "completion": highlights}
    names = [name for name in ("completion", "chosen", "rejected") if name in row] or ["label"] * ("label" in row)
    if not names or ("prompt" not in row and "chosen" not in row):
        raise ValueError("not a known shape; needs 'prompt' and 'completion', or 'prompt', 'chosen' and 'rejected'")
    messages = any(isinstance(row.get(name), list) for name in ("prompt", *names))
    if "prompt" in row and not messages:
        return {name: row[name] for name in ("prompt", *names)} | {"completion": row[names[0]]}
    if any(blank(row[name]) for name in names):
        return EMPTY
    parts = {}
    for name in names:
        try:
            turns = messages and all_turns(row.get("prompt"), row[name])
            parts[name] = message_parts(turns, tokenizer) if messages else dialogue_parts(text_of(row, name))
        except Exception as error:  # a chat template may raise anything
            reason = (str(error) or repr(error)).splitlines()[0]
            raise ValueError(reason if reason.startswith("column ") else f"column {name!r}: {reason}") from None
        if isinstance(parts[name], str):
            return parts[name]
    prompts, answers = {prompt for prompt, _ in parts.values()}, {name: answer for name, (_, answer) in parts.items()}
    if len(prompts) > 1:
        return "answers to different prompts"
    return {"prompt": prompts.pop(), **answers, "completion": answers[names[0]]}


def one_tldr_form(row, names):
    """The row with 'TL;DR:' at the end of the prompt, where its answers began with it, and a space before such answers."""
    prompt, answers = row["prompt"], {name: row[name] for name in names if not blank(row[name])}
    if not prompt.rstrip().endswith(TLDR):
        if not answers or not all(answer.startswith(TLDR) for answer in answers.values()):
            return row
        prompt, answers = f"{prompt.rstrip()}\n{TLDR}", {name: answers[name].removeprefix(TLDR) for name in answers}
    spaced = {name: text if text.startswith(" ") else f" {text.lstrip()}" for name, text in answers.items()}
    return row | {"prompt": prompt.rstrip(), **spaced}


def standard_rows(rows, columns, tokenizer, where):
    """Every row with its standard columns, `columns` checked; and the reasons of the dropped ones, counted."""
    kept, dropped, columns = [], Counter(), dict.fromkeys(("prompt", *columns))
    for number, row in enumerate(rows):
        try:
            found = standard_row(row, tokenizer)
            if isinstance(found, str):
                dropped[found] += 1
                continue
            found = row | found
            facts = row.get("rubric") if "rubric" in rows[0] else ["none"]
            if not (
                facts and isinstance(facts, list) and all(isinstance(fact, str) and fact.strip() for fact in facts)
            ):
                raise ValueError("column 'rubric': must be a list of key phrases")
            for column in columns:
                if column not in found:
                    fail(f"{where}: no column {column!r} in {list(row)}")
                text_of(found, column)
        except Exception as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            place = "" if reason.startswith("column ") else f"columns {', '.join(row)}: "
            fail(f"{where}, row {number}, {place}{reason}")
        if any(blank(found[column]) for column in columns):
            dropped[EMPTY] += 1
            continue
        answers = {"completion", "chosen", "rejected", *columns} - {"prompt"}
        found = one_tldr_form(found, [name for name in answers if isinstance(found.get(name), str)])
        if {"chosen", "rejected"} <= columns.keys() and found["chosen"] == found["rejected"]:
            dropped["chosen equals rejected"] += 1
        else:
            kept.append(found)
    return kept, dropped


def load_rows(dataset, config, splits, columns, tokenizer_path, limit=0):
    """Split -> list of dicts with text in `columns`, of at most `limit` rows read, all if it is 0.

    tokenizer_path: folder or hub name of the tokenizer whose chat template renders messages. Ends the program at anything
    wrong, with one line that names the dataset, split, row and column.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a background job ignores it
    if ours:
        signal.signal(signal.SIGINT, interrupted)
    try:
        splits = dict.fromkeys(splits)  # each is read once
        return {split: load_split(dataset, config, split, columns, tokenizer_path, limit) for split in splits}
    finally:  # also where bad data ends a cell of a notebook and not the process
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def load_split(dataset, config, split, columns, tokenizer_path, limit):
    where = f"--dataset {dataset}, split {split!r}"
    rows, tokenizer = read(find(dataset), config, split, limit), None
    names = ("prompt", "completion", "label", "chosen", "rejected")
    if any(isinstance(row.get(name), list) for row in rows for name in names):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(find(tokenizer_path))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            fail(f"{where} holds messages, and the chat template of {tokenizer_path} cannot be loaded: {reason}")
    kept, dropped = standard_rows(rows, columns, tokenizer, where)
    lost = "".join(f", dropped {count}: {reason}" for reason, count in dropped.items())
    if not kept:
        fail(f"{where}: no rows{lost}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{dataset}, {split}: {len(kept)} rows of {', '.join(rows[0])}{lost}", file=sys.stderr)
    return kept


def interrupted(*_):
    """Ctrl-C. It ends the program at once: raised as an exception, the libraries swallow it here and there."""
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--config", default="", help="configuration of a hub dataset")
    parser.add_argument("--splits", nargs="+", default=["train"])
    parser.add_argument("--columns", nargs="+", default=["prompt", "completion"], help="columns that must hold text")
    parser.add_argument("--tokenizer", default="", help="folder or hub name; its chat template renders messages")
    parser.add_argument("--limit", type=int, default=0, help="rows of each split to read; 0: all")
    args = parser.parse_args()
    found = load_rows(args.dataset, args.config, args.splits, args.columns, args.tokenizer, args.limit)
    for split, rows in found.items():
        for row in rows:
            print(json.dumps({"split": split, "row": row}, default=str))
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head` has seen enough
        os._exit(0)  # note: Python would try to write the rest once more
