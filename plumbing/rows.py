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

from data.shapes import EMPTY, blank, first_line, one_tldr_form, standard_row, text_of
from plumbing import fail, find, inputs, steady_streams


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
