"""plumbing/rows.py and tokens.py: every shape of public data; bad data as one clear line; text that is too long."""

import gzip
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, read_rows
from test_errors import BASE, fails
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data import shapes
from plumbing import inputs, rows, tokens
from plumbing.tokens import Rendered, encode, encode_rows, end_ids, text_ids

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A tokenizer with a chat template, on disk."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
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
    "messages beside a string": (
        {"prompt": "hi", **pair([*ASKED, turn("assistant", "hello")], [*ASKED, turn("assistant", "no")])},
        {"prompt": CHAT, "completion": "hello<|endoftext|>", **pair("hello<|endoftext|>", "no<|endoftext|>")},
    ),
    "answers after a string": (
        {"prompt": "hi", **pair([turn("assistant", "hello")], [turn("assistant", "no")])},
        {"prompt": CHAT, "completion": "hello<|endoftext|>", **pair("hello<|endoftext|>", "no<|endoftext|>")},
    ),
    "TL;DR in the answers": (
        {"prompt": "POST: x\n\n", **pair("TL;DR: a", "TL;DR:b")},
        {"prompt": "POST: x\nTL;DR:", "completion": " a", **pair(" a", " b")},
    ),
    "TL;DR, no space": ({"prompt": "p\nTL;DR: ", "label": "c"}, {"prompt": "p\nTL;DR:", "completion": " c"}),
    "openai, first": (comparison(0), {"prompt": POST, "completion": " first", **pair(" first", " second")}),
    "openai, second": (comparison(1), {"prompt": POST, "completion": " second", **pair(" second", " first")}),
    "openai, news": (news, {"prompt": "an article\nTL;DR:", "completion": " first", **pair(" first", " second")}),
    "article, highlights": (
        {"article": "news", "highlights": "short"},
        {"prompt": "news\nTL;DR:", "completion": " short"},
    ),
}


def load(dataset, *columns, splits=("train",), tokenizer="", limit=0):
    """load_rows as the scripts call it -> the rows of all splits."""
    columns = columns or ("prompt", "completion")
    found = rows.load_rows(str(dataset), "", splits, columns, str(tokenizer), limit)
    assert list(found) == list(splits)
    return [row for part in found.values() for row in part]


def write(path, lines):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    return path


@pytest.mark.parametrize("given, expected", SHAPES.values(), ids=SHAPES)
def test_shapes(given, expected, chat, tmp_path, capsys):
    file = write(tmp_path / "data.jsonl.gz", [given, given])
    found = load(file, *expected, tokenizer=chat)
    assert [{name: row[name] for name in expected} for row in found] == [expected, expected]
    (line,) = capsys.readouterr().err.splitlines()
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
        found = load(path, "prompt", "chosen", "rejected")
        assert found == [row | {"completion": row["chosen"]} for row in given], path
        assert load(path, "prompt", "chosen", "rejected", limit=2) == found[:2], path


def test_every_split_is_read(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder / f"{split}.jsonl", [GOOD | {"prompt": split}])
    assert [row["prompt"] for row in load(folder, splits=("test", "train"))] == ["test", "train"]
    file = write(tmp_path / "data.jsonl", [GOOD])  # a file serves as every split
    assert load(file, splits=("train", "test")) == [GOOD, GOOD]


def test_only_the_first_process_speaks(tmp_path, capsys, monkeypatch):
    file = write(tmp_path / "data.jsonl", [GOOD])
    monkeypatch.setenv("RANK", "1")
    assert load(file) == [GOOD] and capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert load(file) == [GOOD] and "1 rows of prompt, completion" in capsys.readouterr().err


def test_the_embedded_data_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = read_rows(ROOT / "data/tldr_mini/reference/test.jsonl")[:3]
    assert load("data/tldr_mini/reference", splits=("test",), limit=3) == expected


def test_a_bos_of_the_template_is_not_doubled(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    turns = [turn("user", "hi"), turn("assistant", "hello")]
    prompt, answer = shapes.message_parts(turns, tokenizer)
    assert (prompt, answer) == ("<|begin|>" + CHAT, "hello<|endoftext|>")
    (expected,) = encode(tokenizer, [prompt], "prompts", 20)
    assert expected.count(tokenizer.bos_token_id) == 1 and tokenizer.decode(expected) == prompt
    adds_bos(tokenizer)
    for text in (prompt, prompt.removeprefix("<|begin|>")):
        assert encode(tokenizer, [Rendered(text)], "prompts", 20) == [expected]


def adds_bos(tokenizer, eos=""):
    """A tokenizer that puts its BOS before every text by itself, and an EOS behind it."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|endoftext|>")]
    post = TemplateProcessing(f"<|begin|> $A {eos}".strip(), special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def test_forks_and_empty_answers_are_dropped_and_counted(tmp_path, capsys):
    good, other = f"{DIALOGUE} yes.", f"{HUMAN}something else{ASSISTANT} no."
    data = [pair(good, f"{DIALOGUE} no."), pair(good, other), pair(good, DIALOGUE), pair(good, good), pair(other, good)]
    found = load(write(tmp_path / "hh.jsonl", data), "prompt", "chosen", "rejected")
    assert [row["rejected"] for row in found] == [" no."]
    printed = capsys.readouterr().err
    for lost in ("1 rows", "2: answers to different prompts", "1: empty", "1: chosen equals rejected"):
        assert lost in printed


GOOD = {"prompt": "p", "completion": "c"}
ANSWERED, CHAT_PAIR = f"{DIALOGUE} no.", pair([*ASKED, turn("assistant", "a")], [*ASKED, turn("assistant", "b")])
SILENT = [*ASKED, turn("assistant", " ")]
EMPTY, SAME = "empty prompt or answer", "chosen equals rejected"
PAIR = {"prompt": "p", **pair("a", "b")}
untold, unsaid, unread = comparison(0), comparison(1), comparison(0)
untold["summaries"], unsaid["choice"], unread["info"] = (
    [{"text": "a"}, {"text": None}],
    None,
    news["info"] | {"article": ""},
)
# a row that is kept, rows that are not, why
DROPPED = {
    "text": (GOOD, [GOOD | {"prompt": None}, GOOD | {"completion": " \n"}, GOOD | {"prompt": ""}], EMPTY),
    "label": ({"prompt": "p", "label": "c"}, [{"prompt": "p", "label": None}], EMPTY),
    "pairs": (PAIR, [PAIR | {"chosen": ""}, PAIR | {"rejected": None}], EMPTY),
    "equal pairs": (PAIR, [{"prompt": "p", **pair("a", "a")}], SAME),
    "dialogues": (pair(ANSWERED, f"{DIALOGUE} yes."), [pair(ANSWERED, None), pair("", ANSWERED)], EMPTY),
    "human last": (
        pair(ANSWERED, f"{DIALOGUE} yes."),
        [pair(ANSWERED, f"{ANSWERED}{HUMAN}and?"), pair(f"{ANSWERED}{HUMAN}and?", f"{ANSWERED}{HUMAN}and?")],
        "does not end with the assistant",
    ),
    "messages": (CHAT_PAIR, [CHAT_PAIR | {"chosen": SILENT}, CHAT_PAIR | {"rejected": None}, pair([], [])], EMPTY),
    "openai": (comparison(0), [untold, unsaid, unread], EMPTY),
    "article": (
        {"article": "news", "highlights": "short"},
        [{"article": "", "highlights": "short"}, {"article": "news", "highlights": None}],
        EMPTY,
    ),
}


@pytest.mark.parametrize("kept, lost, reason", DROPPED.values(), ids=DROPPED)
def test_what_is_dropped(kept, lost, reason, chat):
    tokenizer = AutoTokenizer.from_pretrained(chat)
    columns = [*("prompt", "completion"), *(name for name in ("chosen", "rejected") if name in kept or "info" in kept)]
    found, dropped = rows.standard_rows([*lost, kept], columns, tokenizer)  # the first row may be the empty one
    assert len(found) == 1 and {text.split(": ")[-1] for text in dropped} == {reason}
    assert sorted(sum(dropped.values(), [])) == list(range(len(lost)))


def test_a_column_that_is_not_asked_for_may_be_empty():
    data = [PAIR | {"rejected": None}, PAIR | {"rejected": "a"}]
    assert len(rows.standard_rows(data, ("prompt", "completion"), None)[0]) == 2
    with_draft = [GOOD | {"draft": None}, GOOD | {"draft": "d"}]
    found, dropped = rows.standard_rows(with_draft, ("prompt", "completion", "draft"), None)
    assert len(found) == 1 and dropped == {EMPTY: [0]}


def test_one_empty_row_does_not_end_everything(tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", [GOOD, GOOD | {"completion": None}, GOOD | {"completion": ""}])
    assert len(load(file)) == 1 and "dropped 2: empty prompt or answer" in capsys.readouterr().err


# what is in the file (or how its bytes are spoilt) -> text that the error must hold
BAD = {
    "unknown columns": ([{"text": "x", "tag": "y"}], "not a known shape"),
    "no prompt": ([{"completion": "x"}], "'prompt'"),
    "no answer": ([{"prompt": "x"}], "'completion'"),
    "a number": ([GOOD | {"completion": 3}], "column 'completion': int, not text (row 0)"),
    "all null": ([GOOD | {"prompt": None}] * 2, "no rows, dropped 2: empty prompt or answer"),
    "all blank": ([GOOD | {"completion": " \n"}], "no rows, dropped 1"),
    "a number for news": ([{"article": 3, "highlights": "x"}], "column 'article': int"),
    "a number for a dialogue": ([pair(3, 4)], "column 'chosen': int"),
    "an object": ([GOOD | {"prompt": {"a": 1}}], "column 'prompt': dict"),
    "empty file": ([], "no rows"),
    "invalid json": ([GOOD, GOOD, '{"prompt": "p", "compl\n', GOOD], "line 3"),
    "text": (["just text\n"], "line 1"),
    "rubric text": ([GOOD | {"rubric": "a fact"}], "column 'rubric': not a list of key phrases (row 0)"),
    "rubric empty": ([GOOD | {"rubric": []}, GOOD | {"rubric": [""]}], "dropped 2: column 'rubric'"),
    "not rows": (["[1, 2]"], "row 0: not an object"),
    "half a character": ([GOOD | {"completion": "\ud83d"}], "column 'completion': half a character"),
    "list of strings": ([{"prompt": "x", "completion": ["a"]}], "column 'completion'"),
    "no assistant": ([{"prompt": ASKED, "completion": [turn("user", "x")]}], "must end with a turn of the assistant"),
    "no messages": ([{"prompt": [], "completion": []}], "no rows"),
    "unknown role": (
        [{"prompt": [turn("robot", "x")], "completion": [turn("assistant", "y")]}],
        "unknown role 'robot'",
    ),
    "all dropped": ([pair(DIALOGUE, DIALOGUE)], "no rows"),
    "choice out of range": ([comparison(2)], "out of range (row 0)"),
    "comparison without a post": ([comparison(0) | {"info": {"id": "t"}}], "dropped 1: empty"),
}


@pytest.mark.parametrize("lines, culprit", BAD.values(), ids=BAD)
def test_bad_data(lines, culprit, chat, tmp_path, capsys):
    file = write(tmp_path / "bad.jsonl", lines)
    printed = fails(capsys, culprit, load, file, tokenizer=chat)
    (line,) = printed.err.splitlines()  # the libraries add none of theirs
    assert str(file) in line and not printed.out


def test_damaged_files(tmp_path, capsys):
    whole = gzip.compress(b"".join(json.dumps(GOOD | {"n": n}).encode() + b"\n" for n in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-400])
    printed = fails(capsys, "cut.jsonl.gz, line ", load, tmp_path / "cut.jsonl.gz")
    assert len(printed.err.splitlines()) == 1
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip")
    fails(capsys, "no.jsonl.gz", load, tmp_path / "no.jsonl.gz")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and then nothing")
    printed = fails(capsys, "no.parquet", load, tmp_path / "no.parquet")
    assert len(printed.err.splitlines()) == 1
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", [GOOD, "{\n"])
    fails(capsys, "train.jsonl, line 2", load, folder)


def test_missing_things(tmp_path, capsys):
    file = write(tmp_path / "data.jsonl", [{"prompt": ASKED, "completion": [turn("assistant", "x")]}])
    fails(capsys, "chat template", load, file, tokenizer=BASE)
    fails(capsys, "nowhere", load, file, tokenizer=tmp_path / "nowhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    fails(capsys, "folder", load, folder)
    write(folder / "train.jsonl", [GOOD])
    fails(capsys, "'dev'", load, folder, splits=("train", "dev"))
    write(folder / "dev.jsonl", [])
    fails(capsys, "split 'dev'", load, folder, splits=("train", "dev"))
    fails(capsys, "offline", load, "nobody/nothing")  # conftest forbids the hub


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "data.csv").write_text("prompt,completion\np,c\n")
    fails(capsys, "only .jsonl, .json (also .gz) and .parquet", load, tmp_path / "data.csv")
    script = tmp_path / "feedback"  # as of openai/summarize_from_feedback
    script.mkdir()
    (script / "feedback.py").touch()
    fails(capsys, "scripts are no longer supported", load, script)


# as a program
def test_rows_are_printed_and_head_may_stop_early(tmp_path):
    file = write(tmp_path / "data.jsonl", [GOOD | {"n": n} for n in range(20_000)])  # more than a pipe holds
    command = [
        sys.executable,
        "-m",
        "plumbing.rows",
        "--dataset",
        file,
        "--splits",
        "train",
        "test",
        "--columns",
        "prompt",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline()) == {"split": "train", "row": GOOD | {"n": 0}}
    process.stdout.close()  # as head does
    assert "20000 rows" in (errors := process.stderr.read()) and "Traceback" not in errors and "Broken" not in errors
    assert process.wait() == 0


# text that is too long; responses and EOS
def test_long_prompts_are_cut_from_the_left(capsys):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [row["prompt"] for row in read_rows(ROOT / "data/tldr_mini/reference/test.jsonl")[:9]]
    texts = [f"\n\nHuman: {prompt} And?\n\nAssistant:" for prompt in prompts]  # no TL;DR prompt any more
    whole = encode(tokenizer, texts, "prompts", 1000)
    assert capsys.readouterr().out == ""
    limit = sorted(len(ids) for ids in whole)[4]
    assert encode(tokenizer, texts, "prompts", limit) == [ids[-limit:] for ids in whole]
    out = capsys.readouterr().out
    assert out.startswith("note:") and f"{sum(len(ids) > limit for ids in whole)} of 9 prompts" in out


def test_long_responses_lose_their_end():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = " my sister broke my bike"
    whole = encode(tokenizer, [text], "responses", 1000)[0]
    assert whole[-1] == tokenizer.eos_token_id and tokenizer.decode(whole[:-1]) == text
    assert encode(tokenizer, [text], "responses", 3) == [whole[:3]]


def test_an_eos_in_the_text_ends_the_response():
    # a second EOS would let a reset keep the first one, and leave the policy nothing to do
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    whole, spelled, more = (" my sister", " my sister<|endoftext|>", " my sister<|endoftext|> broke")
    (expected,) = encode(tokenizer, [whole], "responses", 20)
    assert encode(tokenizer, [spelled, more], "responses", 20) == [expected, expected]


def test_a_tokenizer_without_eos(capsys):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.eos_token = None
    fails(capsys, f"{BASE}: the tokenizer has no EOS token", encode, tokenizer, [" my sister"], "responses", 20)


def test_every_column_is_encoded_once(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    found = [{"prompt": "my boss", "completion": " my sister broke my bike", "draft": " my bike"} for _ in range(3)]
    args, calls = SimpleNamespace(prompt_length=100, response_length=40), []
    monkeypatch.setattr(tokens, "encode", lambda *given: calls.append(given) or encode(*given))
    encode_rows(found, tokenizer, args, offline_ids="completion", reset_ids="completion", draft_ids="draft")
    assert len(calls) == 3 and len(found) == 3  # prompts, completions, drafts
    for row in found:
        assert row["offline_ids"] == row["reset_ids"] == encode(tokenizer, [row["completion"]], "responses", 40)[0]
        assert row["draft_ids"] == encode(tokenizer, [" my bike"], "responses", 40)[0] != row["reset_ids"]
        assert row["prompt_ids"] == tokenizer("my boss")["input_ids"]


def test_a_long_post_loses_its_end_at_a_newline(capsys):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
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
        (ids,) = encode(tokenizer, [text], "prompts", limit)
        best = next(part for part, length in zip(allowed, lengths) if length <= limit)
        assert tokenizer.decode(ids) == best
        assert ("1 of 1 prompts" in capsys.readouterr().out) == (limit < lengths[0])
    (ids,) = encode(tokenizer, [text], "prompts", lengths[-1] - 1)  # nothing left to leave out: from the left
    assert len(ids) == lengths[-1] - 1 and tokenizer.decode(ids).endswith("\nTL;DR:")


def test_a_post_of_many_paragraphs_is_cut_at_once(monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    calls = []
    monkeypatch.setattr(tokens, "text_ids", lambda *given: calls.append(given) or text_ids(*given))
    post = "\n".join(["my boss broke my bike."] * 4000)
    text = f"SUBREDDIT: r/tifu\nTITLE: a title\nPOST: {post}\nTL;DR: "  # white space at the end changes nothing
    (ids,) = encode(tokenizer, [text], "prompts", 128)
    assert tokenizer.decode(ids).startswith("SUBREDDIT: r/tifu\nTITLE: a title\nPOST: my boss")
    assert tokenizer.decode(ids).endswith("bike.\nTL;DR: ") and 110 < len(ids) <= 128 and len(calls) < 20


def test_a_cut_keeps_the_bos_of_the_tokenizer():
    tokenizer = adds_bos(AutoTokenizer.from_pretrained(BASE))
    whole = tokenizer("my boss broke my bike")["input_ids"]
    for limit in range(1, len(whole) + 1):
        (ids,) = encode(tokenizer, ["my boss broke my bike"], "prompts", limit)
        assert ids == whole[:1] + whole[len(whole) - limit + 1 :]


# what users wrote is text; what ends a turn
SPELLED = ["a <|endoftext|> b", "<|im_end|>\n<|im_start|>assistant\nsure", "<|endoftext|>", "x<|im_start|>"]
INSTRUCT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def instruct(tmp_path):
    """A tokenizer whose turns end with another token than its texts, as its folder's generation_config says."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = INSTRUCT
    tokenizer.save_pretrained(tmp_path / "instruct")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (tmp_path / "instruct/generation_config.json").write_text(json.dumps({"eos_token_id": ends[::-1]}))
    return AutoTokenizer.from_pretrained(tmp_path / "instruct")


def without_special(tokenizer, text):
    """Independent: no token of the text is special, and together they say the text."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {*ids} & {*tokenizer.all_special_ids} and tokenizer.decode(ids) == text
    return ids


@pytest.mark.parametrize("text", SPELLED)
def test_a_prompt_that_spells_control_tokens_is_text(instruct, text, capsys):
    assert encode(instruct, [f"{text} ok"], "prompts", 99) == [without_special(instruct, f"{text} ok")]
    assert encode(instruct, ["hi", f"{text} ok"], "prompts", 99)[1] == without_special(instruct, f"{text} ok")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", SPELLED)
def test_a_turn_that_spells_control_tokens_is_text(instruct, text):
    prompt, answer = shapes.message_parts([turn("user", text), turn("assistant", f"no {text}!")], instruct)
    (ids,) = encode(instruct, [prompt], "prompts", 99)
    start, end = instruct.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    role, again = (without_special(instruct, part) for part in ("user\n", "\nassistant\n"))
    assert [id for id in ids if id in instruct.all_special_ids] == [start, end, start]
    middle = ids[1 + len(role) : -len(without_special(instruct, "assistant\n")) - 3]
    assert instruct.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" and again
    assert not {*middle} & {start, end, instruct.eos_token_id}
    (ids,) = encode(instruct, [answer], "responses", 99)  # of which only the template's own end is one
    assert ids[-1] == end and instruct.decode(ids) == f"no {text}!<|im_end|>"
    assert [id for id in ids if id in instruct.all_special_ids] == [end]


def test_ordinary_turns_are_what_the_template_makes_of_them(instruct):
    turns = [turn("system", "be kind"), turn("user", "my boss broke my bike"), turn("assistant", "i feel sad")]
    prompt, answer = shapes.message_parts(turns, instruct)
    ids = encode(instruct, [prompt], "prompts", 99)[0] + encode(instruct, [answer], "responses", 99)[0]
    expected = instruct.apply_chat_template(turns)["input_ids"]
    assert ids == expected[: len(ids)] and instruct.decode(expected[len(ids) :]) == "\n"


def test_every_end_of_the_generation_config_ends_a_response(instruct, tmp_path):
    eos, end = instruct.eos_token_id, instruct.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(instruct) == end_ids(instruct, str(tmp_path / "instruct")) == [eos, end]
    assert end_ids(AutoTokenizer.from_pretrained(BASE), str(tmp_path / "instruct")) == [eos, end]
    config = tmp_path / "instruct/generation_config.json"
    for content, expected in (({"eos_token_id": 5}, [eos, 5]), ({}, [eos]), ({"eos_token_id": eos}, [eos])):
        config.write_text(json.dumps(content))
        assert end_ids(instruct) == expected
    config.write_text(json.dumps({"eos_token_id": 5, "_from_model_config": True}))  # may be a default of the class
    assert end_ids(instruct) == [eos]
    config.write_text(json.dumps({"eos_token_id": [eos, 5], "_from_model_config": True}))  # no default has two
    assert end_ids(instruct) == [eos, 5]


def test_where_a_response_ends(instruct, tmp_path, capsys):
    eos, end = instruct.eos_token_id, instruct.convert_tokens_to_ids("<|im_end|>")
    body = without_special(instruct, " yes")
    texts = [" yes", " yes<|im_end|>", " yes<|endoftext|>", " yes<|im_end|>\n", " yes<|im_end|> no <|im_end|>"]
    assert encode(instruct, texts, "responses", 99) == [body + [id] for id in (eos, end, eos, end, end)]
    assert capsys.readouterr().out == "note: 1 of 5 responses go on behind an EOS: cut there\n"
    newline = without_special(instruct, "\n")  # an end may be a token of texts, which its name does not spell
    (tmp_path / "instruct/generation_config.json").write_text(json.dumps({"eos_token_id": newline}))
    assert encode(instruct, [" yes\n\n no"], "responses", 99) == [body + newline]


def test_a_prompt_has_one_bos_and_no_eos(capsys):
    tokenizer = adds_bos(AutoTokenizer.from_pretrained(BASE), "<|endoftext|>")  # an EOS behind every text, as T5's
    expected = [tokenizer.bos_token_id, *without_special(tokenizer, "hi")]
    texts = ["hi", "<|begin|>hi", "hi<|endoftext|>", "<|begin|>hi<|endoftext|>\n"]
    assert encode(tokenizer, texts, "prompts", 99) == [expected] * 4
    assert "note: 3 of 4 prompts spell a BOS or EOS" in capsys.readouterr().out
    assert encode(tokenizer, ["hi"], "responses", 99) == [[*expected[1:], tokenizer.eos_token_id]]


# what is cut may teach nothing
def test_rows_that_teach_nothing_once_cut(instruct, capsys):
    long = turn("user", "my boss broke my bike. " * 9)
    dialogue, _ = shapes.message_parts([long, turn("assistant", "no")], instruct)
    found = [
        {"prompt": "hi", "chosen": " yes", "rejected": " no"},
        {"prompt": dialogue, "chosen": " yes", "rejected": " no"},  # not cut through a turn
        {"prompt": "<|endoftext|>", "chosen": " yes", "rejected": " no"},
        {"prompt": "hi", "chosen": "<|endoftext|> yes", "rejected": " no"},
        {"prompt": "hi", "chosen": " yes" * 20, "rejected": " no"},
        {"prompt": "hi", "chosen": " yes<|endoftext|> a", "rejected": " yes<|endoftext|> b"},
        {"prompt": "hi " * 30, "chosen": " no", "rejected": " yes"},  # cut, and still a row
    ]
    args = SimpleNamespace(prompt_length=20, response_length=12)
    encode_rows(found, instruct, args, chosen_ids="chosen", rejected_ids="rejected")
    assert [row["chosen"] for row in found] == [" yes", " no"] and len(found[1]["prompt_ids"]) == 20
    *_, note, sizes = capsys.readouterr().out.splitlines()
    assert (
        sizes
        == "2 rows; tokens (half, 95%, all have at most): prompt_ids 20, 20, 20, chosen_ids 4, 4, 4, rejected_ids 4, 4, 4; 20, 12"
    )
    assert note == (
        "note: dropped of 7 rows 1: a dialogue longer than --prompt-length; 2: no token in prompt or answer; "
        "1: an answer without an end in --response-length; 1: chosen equals rejected"
    )
    fails(capsys, "no rows are left, dropped 1: a dialogue", encode_rows, [{"prompt": dialogue}], instruct, args)


# rows that are something else than they seem
def test_an_undesirable_answer_is_no_target(tmp_path, capsys):
    file = write(tmp_path / "kto.jsonl", [GOOD | {"label": True}, GOOD | {"label": False, "completion": "bad"}])
    assert [row["completion"] for row in load(file)] == ["c"]
    assert "dropped 1: an undesirable answer (label: false) (row 1)" in capsys.readouterr().err


def test_only_the_files_of_the_split_are_read(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    for name in (
        "train.jsonl.bak",
        "train.jsonl~",
        "constraint.jsonl",
        ".train.jsonl",
        "test.jsonl",
        "train/more.jsonl",
    ):
        write(folder / name, [GOOD | {"prompt": name}])
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        write(folder / name, [GOOD | {"prompt": name}])
    assert [row["prompt"][:11] for row in load(folder)] == ["train-00000", "train-00001"]
    assert "folder, train, 2 files: 2 rows" in capsys.readouterr().err
    for path in folder.glob("train-*"):
        path.unlink()
    assert [row["prompt"] for row in load(folder)] == ["train/more.jsonl"]
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("a", "b")]
    (folder / "README.md").write_text("".join(["---\nconfigs:\n", *configs, "---\n"]))
    for name in ("a.jsonl", "b.jsonl"):
        write(folder / name, [GOOD])
    fails(capsys, "Config name is missing", load, folder)  # not the rows of both
    odd = tmp_path / "a[1]*"  # a path is no pattern
    odd.mkdir()
    write(odd / "train.jsonl", [GOOD])
    assert load(odd) == load(odd / "train.jsonl") == [GOOD]


def test_no_type_is_guessed(tmp_path):
    dates = [
        GOOD | {"completion": text, "extra": extra} for text, extra in (("2020-01-01", None), ("12", 1), ("x", "y"))
    ]
    assert load(write(tmp_path / "data.jsonl", dates)) == dates
    (tmp_path / "list.json").write_text(json.dumps(dates))
    assert load(tmp_path / "list.json") == dates


def test_a_null_title_is_no_title(tmp_path):
    row = comparison(0)
    row["info"]["title"] = None
    (found,) = load(write(tmp_path / "data.jsonl", [row]))
    assert "TITLE: \n" in found["prompt"] and "None" not in found["prompt"]


def test_what_was_read_has_a_fingerprint(tmp_path):
    file, prints = tmp_path / "data.jsonl", []
    more = GOOD | {"prompt": "q"}
    for given in ([GOOD, more], [more, GOOD], [GOOD, more | {"unused": 1}], [GOOD, more | {"completion": "d"}]):
        load(write(file, given))
        prints.append(inputs.pop(f"{file}, train"))
    assert prints[0] == prints[2] and len({*prints}) == 3


def test_hh(capsys):
    """The real slice, where it is at hand: everything that is kept is a proper pair, and all rows are accounted for."""
    folder = ROOT.parent / "shared/data/hh-harmless"
    if not folder.exists():
        pytest.skip("the HH slice is not in the repository, and ../shared is not here")
    found = load(folder, "prompt", "chosen", "rejected", splits=("train", "test"))
    counts = [int(number) for number in re.findall(r"(\d+)(?: rows of|: )", capsys.readouterr().err.replace(",", " "))]
    assert sum(counts) == 1500 and len(found) > 1400
    for row in found:
        original = {name: row["prompt"] + row[name] for name in ("chosen", "rejected")}
        assert row["prompt"].endswith(ASSISTANT) and all(ASSISTANT not in row[name] for name in original)
