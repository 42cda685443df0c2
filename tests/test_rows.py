"""data/rows.py: every shape of public data, and bad data as one clear line, before anything is trained."""

import gzip
import importlib.util
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows, run_script
from transformers import AutoTokenizer

import ppo

spec = importlib.util.spec_from_file_location("rows", ROOT / "data/rows.py")
rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rows)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer with a chat template, on disk."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def turn(role, content):
    return {"role": role, "content": content}


def pair(first, second):
    return {"chosen": first, "rejected": second}


def comparison(choice):
    info = {"id": "t", "subreddit": "tifu", "title": "a title", "post": "a post\nof two lines"}
    return {"info": info, "summaries": [{"text": " first"}, {"text": "second "}], "choice": choice, "extra": {}}


news = comparison(0)
news["info"] = {"id": "n", "article": "an article", "subreddit": None, "title": "a title", "post": None}
POST = "SUBREDDIT: r/tifu\nTITLE: a title\nPOST: a post\nof two lines\nTL;DR:"
DIALOGUE = f"{HUMAN}hi{ASSISTANT} hello{HUMAN}why?{ASSISTANT}"
ASKED, CHAT = [turn("user", "hi")], "<user>hi<assistant>"
# shape -> row, what the scripts get
SHAPES = {
    "prompt, completion": ({"prompt": "p", "completion": " c"}, {"prompt": "p", "completion": " c"}),
    "prompt, label": ({"prompt": "p", "label": " c"}, {"prompt": "p", "completion": " c"}),
    "prompt, chosen, rejected": (
        {"prompt": "p", **pair(" a", " b")},
        {"prompt": "p", "completion": " a", **pair(" a", " b")},
    ),
    "whole dialogues": (
        pair(f"{DIALOGUE} because.", f"{DIALOGUE} no."),
        {"prompt": DIALOGUE, "completion": " because.", **pair(" because.", " no.")},
    ),
    "messages, prompt and completion": (
        {"prompt": ASKED, "completion": [turn("assistant", "hello")]},
        {"prompt": CHAT, "completion": "hello<|endoftext|>"},
    ),
    "messages, pairs": (
        {"prompt": ASKED, **pair([turn("assistant", "hello")], [turn("assistant", "no")])},
        {"prompt": CHAT, "completion": "hello<|endoftext|>", **pair("hello<|endoftext|>", "no<|endoftext|>")},
    ),
    "messages, prompt inside": (
        pair([*ASKED, turn("assistant", "hello")], [*ASKED, turn("assistant", "no")]),
        {"prompt": CHAT, "completion": "hello<|endoftext|>", **pair("hello<|endoftext|>", "no<|endoftext|>")},
    ),
    "openai, first": (comparison(0), {"prompt": POST, "completion": " first", **pair(" first", " second")}),
    "openai, second": (comparison(1), {"prompt": POST, "completion": " second", **pair(" second", " first")}),
    "openai, news": (news, {"prompt": "an article\nTL;DR:", "completion": " first", **pair(" first", " second")}),
    "article, highlights": (
        {"article": "news", "highlights": "short"},
        {"prompt": "news\nTL;DR:", "completion": " short"},
    ),
}


def read(dataset, *flags):
    """data/rows.py as the scripts run it -> rows, stderr."""
    command = [sys.executable, ROOT / "data/rows.py", dataset, *flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done, [json.loads(line)["row"] for line in done.stdout.splitlines()]


def write(path, lines):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    return path


@pytest.mark.parametrize("given, expected", SHAPES.values(), ids=SHAPES)
def test_shapes(given, expected, chat, tmp_path):
    file = write(tmp_path / "data.jsonl.gz", [given, given])
    columns = ("--columns", *expected)
    done, found = read(file, "--tokenizer", chat, *columns)
    assert done.returncode == 0, done.stderr
    assert [{name: row[name] for name in expected} for row in found] == [expected, expected]
    (line,) = done.stderr.splitlines()
    assert f"2 rows of {', '.join(given)}" in line


def test_files_and_folders_read_the_same(tmp_path):
    import pandas

    given = read_rows(ROOT / "data/tldr_mini/preference/test.jsonl")[:5]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", given)
    pandas.DataFrame(given).to_parquet(tmp_path / "data.parquet")
    paths = (
        write(tmp_path / "a.jsonl", given),
        write(tmp_path / "b.jsonl.gz", given),
        tmp_path / "data.parquet",
        folder,
    )
    for path in paths:
        done, found = read(path, "--columns", "prompt", "chosen", "rejected")
        assert done.returncode == 0, done.stderr
        assert found == [row | {"completion": row["chosen"]} for row in given], path


def test_a_bos_of_the_template_is_not_doubled(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    turns = [turn("user", "hi"), turn("assistant", "hello")]
    assert rows.message_parts(turns, tokenizer) == ("<|begin|>" + CHAT, "hello<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = None
    from tokenizers.processors import TemplateProcessing

    begin = [("<|begin|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|begin|> $A", special_tokens=begin)
    assert rows.message_parts(turns, tokenizer)[0] == CHAT  # the tokenizer adds it


def test_forks_and_empty_answers_are_dropped_and_counted(tmp_path):
    good, other = f"{DIALOGUE} yes.", f"{HUMAN}something else{ASSISTANT} no."
    data = [pair(good, f"{DIALOGUE} no."), pair(good, other), pair(good, DIALOGUE), pair(good, good), pair(other, good)]
    done, found = read(write(tmp_path / "hh.jsonl", data), "--columns", "prompt", "chosen", "rejected")
    assert [row["rejected"] for row in found] == [" no.", " yes."]
    assert "2 rows" in done.stderr and "2: answers to different prompts" in done.stderr and "1: empty" in done.stderr


GOOD = {"prompt": "p", "completion": "c"}
# what is in the file (or how its bytes are spoilt) -> text that the error must hold
BAD = {
    "unknown columns": ([{"text": "x", "tag": "y"}], "not a known shape"),
    "no prompt": ([{"completion": "x"}], "'prompt'"),
    "no answer": ([{"prompt": "x"}], "'completion'"),
    "a number": ([GOOD, GOOD | {"completion": 3}], "row 1, column 'completion'"),
    "null": ([GOOD, GOOD, GOOD | {"prompt": None}], "row 2, column 'prompt'"),
    "blank": ([GOOD | {"completion": " \n"}], "row 0, column 'completion'"),
    "mixed schemas": ([GOOD, {"x": "y"}], "row 1"),
    "an object": ([GOOD | {"prompt": {"a": 1}}], "row 0, column 'prompt'"),
    "empty file": ([], "no rows"),
    "invalid json": ([GOOD, GOOD, '{"prompt": "p", "compl\n', GOOD], "line 3"),
    "text": (["just text\n"], "line 1"),
    "list of strings": ([{"prompt": "x", "completion": ["a"]}], "row 0"),
    "no assistant": ([{"prompt": ASKED, "completion": [turn("user", "x")]}], "must end with a turn of the assistant"),
    "no messages": ([{"prompt": [], "completion": []}], "must end with a turn of the assistant"),
    "unknown role": (
        [{"prompt": [turn("robot", "x")], "completion": [turn("assistant", "y")]}],
        "unknown role 'robot'",
    ),
    "all dropped": ([pair(DIALOGUE, DIALOGUE)], "no rows"),
    "choice out of range": ([comparison(2)], "row 0"),
    "comparison without a post": ([{"info": {}, "summaries": [], "choice": 0}], "row 0"),
}


def assert_error(done, culprit):
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert culprit in line


@pytest.mark.parametrize("lines, culprit", BAD.values(), ids=BAD)
def test_bad_data(lines, culprit, chat, tmp_path):
    file = write(tmp_path / "bad.jsonl", lines)
    done, found = read(file, "--tokenizer", chat)
    assert_error(done, culprit)
    assert not found and str(file) in done.stderr


def test_damaged_files(chat, tmp_path):
    whole = gzip.compress(b"".join(json.dumps(GOOD | {"n": n}).encode() + b"\n" for n in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-400])
    assert_error(read(tmp_path / "cut.jsonl.gz")[0], "is damaged after line")
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip")
    assert_error(read(tmp_path / "no.jsonl.gz")[0], "no.jsonl.gz")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and then nothing")
    assert_error(read(tmp_path / "no.parquet")[0], "no.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", [GOOD, "{\n"])
    assert_error(read(folder)[0], "train.jsonl, line 2")


def test_missing_things(tmp_path):
    file = write(tmp_path / "data.jsonl", [{"prompt": ASKED, "completion": [turn("assistant", "x")]}])
    assert_error(read(file, "--tokenizer", ROOT / "data/tiny_pythia")[0], "chat template")
    assert_error(read(file, "--tokenizer", tmp_path / "nowhere")[0], "nowhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_error(read(folder)[0], "folder")
    write(folder / "train.jsonl", [GOOD])
    assert_error(read(folder, "--splits", "train", "dev")[0], "'dev'")
    assert_error(read("nobody/nothing")[0], "offline")  # conftest forbids the hub


def test_a_script_stops_at_bad_data_before_anything_else(tmp_path):
    file = write(tmp_path / "bad.jsonl", [GOOD, GOOD | {"completion": None}])
    flags = ("--dataset", file, "--base-model", ROOT / "data/tiny_pythia")
    done = run_script("sft.py", *flags, cwd=tmp_path, check=False)
    assert_error(done, "row 1, column 'completion'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]


def test_a_long_post_loses_its_end_at_a_newline(capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    head = "SUBREDDIT: r/tifu\nTITLE: a title\nPOST: "
    paragraphs = [
        "my boss broke my bike. i feel sad.",
        "it rained all day. we had rice.",
        "should i sue them? it was in march.",
    ]
    text = f"{head}{chr(10).join(paragraphs)}\nTL;DR:"
    allowed = [f"{head}{chr(10).join(paragraphs[:count])}\nTL;DR:" for count in (3, 2, 1)]
    allowed.append(f"{head}my boss broke my bike.\nTL;DR:")  # within a paragraph, at the end of a sentence
    lengths = [len(tokenizer(part).input_ids) for part in allowed]
    for limit in range(lengths[-1], lengths[0] + 1):
        (ids,) = ppo.encode(tokenizer, [text], "prompts", limit)
        best = next(part for part, length in zip(allowed, lengths) if length <= limit)
        assert tokenizer.decode(ids) == best
        assert ("1 of 1 prompts" in capsys.readouterr().out) == (limit < lengths[0])
    (ids,) = ppo.encode(tokenizer, [text], "prompts", lengths[-1] - 1)  # nothing left to leave out: from the left
    assert len(ids) == lengths[-1] - 1 and tokenizer.decode(ids).endswith("\nTL;DR:")


def test_hh(tmp_path):
    """The real slice, where it is at hand: everything that is kept is a proper pair, and all rows are accounted for."""
    folder = ROOT.parent / "shared/data/hh-harmless"
    if not folder.exists():
        pytest.skip("the HH slice is not in the repository, and ../shared is not here")
    done, found = read(folder, "--splits", "train", "test", "--columns", "prompt", "chosen", "rejected")
    counts = [int(number) for number in re.findall(r"(\d+)(?: rows of|: )", done.stderr.replace(",", " "))]
    assert sum(counts) == 1500 and len(found) > 1400
    for row in found:
        original = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        assert row["prompt"].endswith(ASSISTANT) and all(ASSISTANT not in row[name] for name in original)
