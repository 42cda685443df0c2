"""Datasets of any known shape, from the hub or from disk, as the rows of text that the scripts train on.

    python -m plumbing.rows --dataset Anthropic/hh-rlhf --splits test --columns prompt chosen rejected | head -3

prints them, one JSON line a row. README.md, "Your data", lists the shapes, told by the columns of a row. Out come prompt,
completion and, for pairs, chosen and rejected, all text, beside the columns that were there. Rows from which that cannot be
made are dropped, counted by reason, and the first of each named.
"""

import glob
import gzip
import hashlib
import itertools
import json
import logging
import os
import pathlib
import re
import signal
import sys

import tyro

from plumbing import fail, find, inputs, steady_streams
from plumbing.tokens import Rendered, mark, special_tokens

ROLES = {"system", "user", "assistant", "tool"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of HH's dialogues
TLDR = "TL;DR:"
EMPTY = "empty prompt or answer"


def first_line(error):
    return (str(error) or repr(error)).strip().splitlines()[0]


def files_of(path, split):
    """A file as it is, for every split; in a folder those whose name, or else whose place, has the split as a word."""
    if os.path.isfile(path):
        return [path]
    readme = pathlib.Path(path, "README.md")
    if readme.exists() and readme.read_text(encoding="utf-8", errors="replace").count("- config_name:") > 1:
        return []  # files of several configurations: `datasets` says that --dataset-config is needed
    found = sorted(glob.glob("**/*", root_dir=path, recursive=True))  # without hidden ones
    found = [name for name in found if re.search(r"\.(jsonl?(\.gz)?|parquet)$", name)]
    named = [name for name in found if split in re.split(r"[-. ]", os.path.basename(name))]
    return [os.path.join(path, name) for name in named or found if split in re.split(r"[-. /]", name)]


def read_file(path):
    """The rows of a file; nothing is guessed about their types."""
    number = 0
    try:
        if path.endswith(".parquet"):
            from pyarrow import parquet  # comes with datasets

            return (yield from parquet.read_table(path).to_pylist())
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig").strip()  # Windows puts a mark at the beginning
                if number == 1 and text.startswith("["):  # one list of all rows
                    yield from json.loads(text + file.read().decode())
                elif text:
                    yield json.loads(text)
    except (EOFError, OSError, ValueError) as error:
        fail(f"--dataset {path}" + f", line {number}" * (number > 0) + f": {first_line(error)}")


def read(dataset, config, split, limit):
    """The first `limit` rows of a split, all rows if it is 0, and where they come from."""
    if os.path.isfile(dataset) and not re.search(r"\.(jsonl?(\.gz)?|parquet)$", dataset):
        fail(f"--dataset {dataset}: this file cannot be read, only .jsonl, .json (also .gz) and .parquet")
    files = [] if config else files_of(dataset, split)
    if files:
        rows = list(itertools.islice(itertools.chain.from_iterable(map(read_file, files)), limit or None))
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                fail(f"--dataset {dataset}, split {split!r}, row {number}: not an object with columns")
        return rows, f"{len(files)} file" + "s" * (len(files) > 1)
    import datasets  # here, because it takes a second

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a README without a header is no news
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # they raise what they log
    streaming = limit > 0 or os.path.exists(dataset)  # note: the cache of `datasets` misses edits of local files
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split, streaming=streaming)
        return list(itertools.islice(rows, limit or None)), "datasets"
    except Exception as error:  # it raises many kinds; the first line says what went wrong
        hint = "; offline, give a local folder or file, or fill the cache beforehand (hf download)"
        fail(f"--dataset {dataset}, split {split!r}: {first_line(error)}" + hint * isinstance(error, ConnectionError))


def blank(value):
    """Whether a column holds nothing: null, white space or no messages."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_of(row, column):
    """The text of a column, '' for null."""
    value = row.get(column) or ""
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: {type(value).__name__}, not text")
    if re.search("[\ud800-\udfff]", value):  # as JSON can spell it
        raise ValueError(f"column {column!r}: half a character")
    return value


def dialogue_parts(dialogue):
    """HH's text -> prompt up to and including the last assistant marker, answer after it."""
    head, marker, answer = dialogue.rpartition(ASSISTANT)
    if not marker or HUMAN in answer:
        raise ValueError("does not end with the assistant")
    return head + marker, answer


def message_parts(turns, tokenizer):
    """Messages that end with the assistant's -> prompt and answer as the chat template writes them."""
    if not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise ValueError("not a list of messages")
    roles = [turn["role"] for turn in turns]
    if set(roles) - ROLES:
        raise ValueError(f"unknown role {sorted(set(roles) - ROLES)[0]!r}, known are {', '.join(sorted(ROLES))}")
    if not roles or roles[-1] != "assistant":
        raise ValueError("the messages must end with a turn of the assistant")
    contents = [turn.get("content") for turn in turns]  # note: once rendered, nothing is blank any more
    if blank(contents[-1]) or all(blank(content) for content in contents[:-1]):
        raise ValueError(EMPTY)
    turns = mark(turns, special_tokens(tokenizer))
    prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not continue its own generation prompt")
    return Rendered(prompt), Rendered(whole[len(prompt) :])


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
        raise ValueError(EMPTY)
    subreddit, title, text = (text_of(post, name) for name in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {text}\n{TLDR}"
    if blank(text):  # some of its validation rows are news
        text = text_of(post, "article")
        prompt = f"{text}\n{TLDR}" * (not blank(text))
    texts = [" " + text_of(summary, "text").strip() for summary in summaries]
    return {"prompt": prompt, "completion": texts[choice], "chosen": texts[choice], "rejected": texts[1 - choice]}


def standard_row(row, tokenizer):
    """The columns of a row that the scripts know. ValueError: why there are none."""
    if row.get("label") is False:
        raise ValueError("an undesirable answer (label: false)")
    if "summaries" in row:
        return comparison(row)
    if "article" in row and "highlights" in row:
        article, highlights = text_of(row, "article"), text_of(row, "highlights")
        return {"prompt": f"{article}\n{TLDR}" * (not blank(article)), "completion": highlights}
    names = [name for name in ("completion", "chosen", "rejected") if name in row] or ["label"] * ("label" in row)
    if not names or ("prompt" not in row and "chosen" not in row):
        raise ValueError("not a known shape; needs 'prompt' and 'completion', or 'prompt', 'chosen' and 'rejected'")
    messages = any(isinstance(row.get(name), list) for name in ("prompt", *names))
    if "prompt" in row and not messages:
        return {name: row[name] for name in ("prompt", *names)} | {"completion": row[names[0]]}
    if any(blank(row[name]) for name in names):
        raise ValueError(EMPTY)
    parts = {}
    for name in names:
        try:
            turns = messages and all_turns(row.get("prompt"), row[name])
            parts[name] = message_parts(turns, tokenizer) if messages else dialogue_parts(text_of(row, name))
        except Exception as error:  # a chat template may raise anything
            place = f"column {name!r}: "
            raise ValueError(place + first_line(error).removeprefix(place)) from None
    prompts, answers = {prompt for prompt, _ in parts.values()}, {name: answer for name, (_, answer) in parts.items()}
    if len(prompts) > 1:
        raise ValueError("answers to different prompts")
    return {"prompt": prompts.pop(), **answers, "completion": answers[names[0]]}


def one_tldr_form(row, names):
    """The row with 'TL;DR:' at the end of the prompt, where its answers began with it, and a space before such answers."""
    prompt, answers = row["prompt"], {name: row[name] for name in names if not blank(row[name])}
    if isinstance(prompt, Rendered):
        return row
    if not prompt.rstrip().endswith(TLDR):
        if not answers or not all(answer.startswith(TLDR) for answer in answers.values()):
            return row
        prompt, answers = f"{prompt.rstrip()}\n{TLDR}", {name: answers[name].removeprefix(TLDR) for name in answers}
    spaced = {name: text if text.startswith(" ") else f" {text.lstrip()}" for name, text in answers.items()}
    return row | {"prompt": prompt.rstrip(), **spaced}


def checked(row, columns, rubric):
    """The row with text in `columns`, and in `rubric` where that is asked for. ValueError: what is wrong."""
    for column in columns:
        if column not in row:
            raise ValueError(f"no column {column!r} in {list(row)}")
        text_of(row, column)
    facts = row.get("rubric")
    if rubric and not (facts and isinstance(facts, list) and all(isinstance(x, str) and x.strip() for x in facts)):
        raise ValueError("column 'rubric': not a list of key phrases")
    if any(blank(row[column]) for column in columns):
        raise ValueError(EMPTY)
    answers = {"completion", "chosen", "rejected", *columns} - {"prompt"}
    row = one_tldr_form(row, [name for name in answers if isinstance(row.get(name), str)])
    if {"chosen", "rejected"} <= {*columns} and row["chosen"] == row["rejected"]:
        raise ValueError("chosen equals rejected")
    return row


def standard_rows(rows, columns, tokenizer):
    """Every row with its standard columns, those in `columns` as text; and why others were dropped: reason -> their numbers."""
    kept, dropped, columns = [], {}, dict.fromkeys(("prompt", *columns))
    for number, row in enumerate(rows):
        row = dict.fromkeys(rows[0]) | row
        try:
            kept.append(checked(row | standard_row(row, tokenizer), columns, "rubric" in rows[0]))
        except Exception as error:
            dropped.setdefault(first_line(error), []).append(number)
    return kept, dropped


def load_rows(dataset: str, config="", splits=("train",), columns=("prompt", "completion"), tokenizer_path="", limit=0):
    """Split -> list of dicts with text in `columns`, of at most `limit` rows read, all if it is 0.

    tokenizer_path: folder or hub name of the tokenizer whose chat template renders messages. Ends the program where nothing
    can be read or nothing is left, with one line that names the dataset, split, row and column.
    """
    found = {}
    for split in dict.fromkeys(splits):  # each is read once
        where = f"--dataset {dataset}, split {split!r}"
        (rows, source), tokenizer = read(find(dataset), config, split, limit), None
        names = ("prompt", "completion", "label", "chosen", "rejected")
        if any(isinstance(row.get(name), list) for row in rows for name in names):
            from transformers import AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(find(tokenizer_path), trust_remote_code=False)
            except (OSError, ValueError) as error:
                fail(f"{where} holds messages; no chat template of {tokenizer_path} can be loaded: {first_line(error)}")
            if not tokenizer.chat_template:
                fail(f"{where} holds messages, they need a chat template, and {tokenizer_path} has none")
        kept, dropped = standard_rows(rows, columns, tokenizer)
        often = sorted(dropped, key=lambda reason: -len(dropped[reason]))[:5]
        lost = "".join(f", dropped {len(dropped[reason])}: {reason} (row {dropped[reason][0]})" for reason in often)
        lost += f" and others for {len(dropped) - 5} more reasons" * (len(dropped) > 5)
        if not kept:
            fail(f"{where}: no rows{lost}")
        if os.environ.get("RANK", "0") == "0":
            print(f"{dataset}, {split}, {source}: {len(kept)} rows of {', '.join(rows[0])}{lost}", file=sys.stderr)
            used = [[row.get(name) for name in ("prompt", *columns, "rubric")] for row in kept]
            inputs[f"{dataset}, {split}"] = hashlib.sha256(repr(used).encode()).hexdigest()
        found[split] = kept
    return found


if __name__ == "__main__":
    steady_streams()  # `| head` has seen enough
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for split, rows in tyro.cli(load_rows, description=__doc__).items():
        for row in rows:
            print(json.dumps({"split": split, "row": row}, default=str))
