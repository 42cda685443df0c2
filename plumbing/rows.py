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
import re
import sys
from functools import partial

from plumbing import fail, find
from plumbing.tokens import Rendered, mark, special_tokens

ROLES = {"system", "user", "assistant", "tool"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of HH's dialogues
TLDR = "TL;DR:"
EMPTY, SAME = "empty prompt or answer", "chosen equals rejected"


def files_of(path, split):
    """A file as it is, for every split; in a folder those whose name, or else whose place, has the split as a word."""
    if os.path.isfile(path):
        return [path]
    readme = os.path.join(path, "README.md")
    if os.path.exists(readme) and "\nconfigs:" in open(readme, encoding="utf-8", errors="replace").read():
        return []  # which files are what stands there, as `datasets` knows
    found = sorted(glob.glob("**/*", root_dir=path, recursive=True))  # without hidden ones
    found = [name for name in found if re.search(r"\.(jsonl|json|parquet)(\.gz)?$", name)]
    named = [name for name in found if split in re.split(r"[-. ]", os.path.basename(name))]
    return [os.path.join(path, name) for name in named or found if split in re.split(r"[-. /]", name)]


def read_file(path):
    """The rows of a .jsonl, .json or .parquet file, also .gz; nothing is guessed about their types."""
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            if ".parquet" in os.path.basename(path):
                from pyarrow.parquet import ParquetFile  # comes with datasets

                for batch in ParquetFile(file).iter_batches():
                    yield from batch.to_pylist()
                return
            for number, line in enumerate(file, start=1):
                text = line.decode("utf-8-sig").strip()  # Windows puts a mark at the beginning
                if number == 1 and text.startswith("["):  # one list of all rows
                    yield from json.loads(text + file.read().decode())
                elif text:
                    yield json.loads(text)
    except (EOFError, OSError, ValueError) as error:
        fail(f"--dataset {path}" + f", line {number}" * (number > 0) + f": {str(error).splitlines()[0]}")


def read(dataset, config, split, limit):
    """The first `limit` rows of a split, all rows if it is 0, and where they come from."""
    ending = os.path.splitext(dataset.removesuffix(".gz"))[1]
    if os.path.isfile(dataset) and ending not in (".jsonl", ".json", ".parquet"):
        fail(f"--dataset {dataset}: this file cannot be read, only .jsonl, .json and .parquet, also .gz")
    files = files_of(dataset, split)
    if files and not config:
        rows = [*itertools.islice(itertools.chain.from_iterable(map(read_file, files)), limit or None)]
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                fail(f"--dataset {dataset}, split {split!r}, row {number}: not an object with columns")
        return rows, f"{len(files)} file{'s'[: len(files) > 1]}"
    import datasets  # here, because it takes a second

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a README without a header is no news
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # they raise what they log
    streaming = limit > 0 or os.path.exists(dataset)  # note: the cache of `datasets` misses edits of local files
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split, streaming=streaming)
        return list(itertools.islice(rows, limit or None)), "datasets"
    except Exception as error:  # it raises many kinds; the first line says what went wrong
        reason = (str(error) or repr(error)).splitlines()[0]
        if isinstance(error, ConnectionError):
            reason += "; offline, give a local folder or file, or fill the cache beforehand (hf download)"
        fail(f"--dataset {dataset}, split {split!r}: {reason}")


def blank(value):
    """Whether a column holds nothing: null, white space or no messages."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def text_of(row, column):
    """The text of a column, '' for null."""
    value = row.get(column) or ""
    if not isinstance(value, str):
        raise ValueError(f"column {column!r}: {type(value).__name__}, not text")
    value.encode()  # half a character, as JSON can spell one, is no text either
    return value


def dialogue_parts(dialogue):
    """HH's text -> prompt up to and including the last assistant marker, answer after it; or why there are none."""
    head, marker, answer = dialogue.rpartition(ASSISTANT)
    if not marker or HUMAN in answer:
        return "does not end with the assistant"
    return head + marker, answer


def render_prompt(turns, tokenizer):
    """Messages without special tokens -> the prompt as the chat template writes it, which knows how to become shorter."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return Rendered(text, partial(shorter_prompt, turns, tokenizer))


def shorter_prompt(turns, tokenizer):
    """Without the oldest turns after the system message, up to the next of the user; None where the last one is reached."""
    system = turns[0]["role"] == "system"
    starts = [place for place, turn in enumerate(turns) if turn["role"] == "user" and place > system]
    return render_prompt(turns[:system] + turns[starts[0] :], tokenizer) if starts else None


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
    turns = mark(turns, special_tokens(tokenizer))
    prompt, whole = render_prompt(turns[:-1], tokenizer), tokenizer.apply_chat_template(turns, tokenize=False)
    if not whole.startswith(prompt.marked):
        raise ValueError("the chat template does not continue its own generation prompt")
    return prompt, Rendered(whole[len(prompt.marked) :])


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
    subreddit, title, text = (text_of(post, name) for name in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {text}\n{TLDR}"
    if blank(text):  # some of its validation rows are news
        if blank(text_of(post, "article")):
            return EMPTY
        prompt = f"{post['article']}\n{TLDR}"
    texts = [" " + text_of(summary, "text").strip() for summary in summaries]
    return {"prompt": prompt, "completion": texts[choice], "chosen": texts[choice], "rejected": texts[1 - choice]}


def standard_row(row, tokenizer):
    """The columns of a row that the scripts know, or a string: why the row is dropped. ValueError: no shape."""
    if row.get("label") is False:
        return "an undesirable answer (label: false)"
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
    if isinstance(prompt, Rendered):
        return row
    if not prompt.rstrip().endswith(TLDR):
        if not answers or not all(answer.startswith(TLDR) for answer in answers.values()):
            return row
        prompt, answers = f"{prompt.rstrip()}\n{TLDR}", {name: answers[name].removeprefix(TLDR) for name in answers}
    spaced = {name: text if text.startswith(" ") else f" {text.lstrip()}" for name, text in answers.items()}
    return row | {"prompt": prompt.rstrip(), **spaced}


def standard_rows(rows, columns, tokenizer, where):
    """Every row with its standard columns, those in `columns` as text; and why others were dropped: reason -> their numbers."""
    kept, dropped, columns = [], {}, dict.fromkeys(("prompt", *columns))
    for number, row in enumerate(rows):
        row = dict.fromkeys(rows[0]) | row
        try:
            found = standard_row(row, tokenizer)
            if isinstance(found, dict):
                found = checked(row | found, columns, "rubric" in rows[0], where)
        except Exception as error:
            found = (str(error) or repr(error)).splitlines()[0]
        if isinstance(found, str):
            dropped.setdefault(found, []).append(number)
        else:
            kept.append(found)
    return kept, dropped


def checked(row, columns, rubric, where):
    """The row with text in `columns`, and in `rubric` where there is that column; or why it is dropped."""
    for column in columns:
        if column not in row:
            fail(f"{where}: no column {column!r} in {list(row)}")
        text_of(row, column)
    facts = row.get("rubric")
    if rubric and not (facts and isinstance(facts, list) and all(isinstance(x, str) and x.strip() for x in facts)):
        raise ValueError("column 'rubric': not a list of key phrases")
    if any(blank(row[column]) for column in columns):
        return EMPTY
    answers = {"completion", "chosen", "rejected", *columns} - {"prompt"}
    row = one_tldr_form(row, [name for name in answers if isinstance(row.get(name), str)])
    return SAME if {"chosen", "rejected"} <= columns.keys() and row["chosen"] == row["rejected"] else row


def load_rows(dataset, config, splits, columns, tokenizer_path, limit=0):
    """Split -> list of dicts with text in `columns`, of at most `limit` rows read, all if it is 0.

    tokenizer_path: folder or hub name of the tokenizer whose chat template renders messages. Ends the program where nothing
    can be read or nothing is left, with one line that names the dataset, split, row and column.
    """
    splits = dict.fromkeys(splits)  # each is read once
    return {split: load_split(dataset, config, split, columns, tokenizer_path, limit) for split in splits}


def load_split(dataset, config, split, columns, tokenizer_path, limit):
    where = f"--dataset {dataset}, split {split!r}"
    (rows, source), tokenizer = read(find(dataset), config, split, limit), None
    names = ("prompt", "completion", "label", "chosen", "rejected")
    if any(isinstance(row.get(name), list) for row in rows for name in names):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(find(tokenizer_path))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            fail(f"{where} holds messages, and the chat template of {tokenizer_path} cannot be loaded: {reason}")
        if not tokenizer.chat_template:
            fail(f"{where} holds messages, they need a chat template, and {tokenizer_path} has none")
    kept, dropped = standard_rows(rows, columns, tokenizer, where)
    lost = "".join(f", dropped {len(found)}: {reason} (row {found[0]})" for reason, found in dropped.items())
    if not kept:
        fail(f"{where}: no rows{lost}")
    if os.environ.get("RANK", "0") == "0":
        print(f"{dataset}, {split}, {source}: {len(kept)} rows of {', '.join(rows[0])}{lost}", file=sys.stderr)
    return kept


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
