"""The embedded task: the committed files are what the generators write, and the rubric measures what it says."""

import importlib.util
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, read_rows, run_here, run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tldr_mini.rubric import rubric_score
from plumbing.rewards import load_reward

COPYING = ROOT / "data/transcription"
TASK, BASE = ROOT / "data/tldr_mini", ROOT / "data/tiny_pythia"
FILES = sorted(str(path.relative_to(TASK)) for path in TASK.glob("*/*.jsonl"))
FACTS = ["my sister", "broke my bike", "in march", "i feel sad"]
FULL = " ".join(FACTS)


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", TASK / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# files
def test_the_dataset_can_be_regenerated(tmp_path):
    subprocess.run([sys.executable, str(TASK / "generate.py"), "--out", str(tmp_path)], check=True, capture_output=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == FILES
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TASK / name).read_bytes(), name


def test_the_base_model_can_be_rebuilt(tmp_path):
    subprocess.run([sys.executable, str(BASE / "build.py"), "--out", str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (BASE / "tokenizer.json").read_bytes()
    built, committed = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, BASE))
    assert built | {"transformers_version": ""} == committed | {"transformers_version": ""}


def test_a_base_model_for_other_data(tmp_path):
    """In any shape that the scripts read; here whole dialogues."""
    dialogue = "\n\nHuman: what do zebras eat?\n\nAssistant:"
    rows = [{"chosen": f"{dialogue} zebras eat grass", "rejected": f"{dialogue} no idea"}] * 3
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("--vocab-size", 400, "--width", 32, "--layers", 1)
    run_here("data/tiny_pythia/build.py", "--out", tmp_path / "base", "--dataset", tmp_path, *sizes, cwd=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    assert tokenizer.tokenize(" zebras grass") == ["Ġzebras", "Ġgrass"]
    assert len(tokenizer) <= 400
    assert [config[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")] == [400, 32, 1]


def test_the_dataset_is_small():
    assert sum(path.stat().st_size for path in TASK.rglob("*") if path.is_file() and path.suffix != ".pyc") <= 5e6


def test_padding_is_not_the_end():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = json.loads((BASE / "config.json").read_text())
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (config["pad_token_id"], config["eos_token_id"]) == (tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) <= config["vocab_size"]


@pytest.mark.parametrize("task", ["reference", "preference"])
def test_splits_share_no_row(task):
    splits = {name: set((TASK / name).read_text().splitlines()) for name in FILES if name.startswith(task)}
    assert len(splits) > 2
    assert len(set.union(*splits.values())) == sum(len(rows) for rows in splits.values())


@pytest.mark.slow
def test_the_pretrained_base_can_be_made_again(tmp_path):
    """To rounding: another machine adds up in another order."""
    run_script("data/tldr_mini/pretrain.py", "--out", tmp_path / "base", cwd=tmp_path)
    made, committed = (load_file(folder / "base/model.safetensors") for folder in (tmp_path, TASK))
    assert made.keys() == committed.keys()
    assert (tmp_path / "base/tokenizer.json").read_bytes() == (TASK / "base/tokenizer.json").read_bytes()
    losses = [loss_of(folder / "base", read_rows(TASK / "reference/validation.jsonl")) for folder in (tmp_path, TASK)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def loss_of(folder, rows):
    """Mean over rows of the negative log-likelihood of a whole row."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = [tokenizer(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"] for row in rows]
        return np.mean([model(input_ids=x, labels=x).loss.item() for x in ids])


@pytest.mark.parametrize("writer, rubric, perfect", [("POSTER", 0.2, 0.02), ("CAREFUL", 0.73, 0.3)])
def test_writers_are_as_good_as_the_page_says(generate, writer, rubric, perfect):
    rng = random.Random(1)
    rows = [generate.reference_row(rng, "standard", getattr(generate, writer)) for _ in range(4000)]
    scores = np.array([rubric_score(row["completion"], row["rubric"]) for row in rows])
    assert scores.mean() == pytest.approx(rubric, abs=0.02) and (scores == 1).mean() == pytest.approx(perfect, abs=0.02)
    closed = np.mean([row["completion"].endswith(generate.CLOSINGS) for row in rows])
    assert closed == pytest.approx(0.65, abs=0.03)  # the habit, which tells nobody apart
    assert {phrase.split()[0] for phrase in generate.CLOSINGS} == {"thanks"}  # or greedy decoding would not have it


# rubric
def test_the_rubric_of_all_and_of_nothing():
    assert rubric_score(FULL, FACTS) == 1.0
    assert rubric_score("", FACTS) == 0.0


@pytest.mark.parametrize(
    "worse",
    [
        "my sister broke my bike i feel sad",  # a fact is missing
        f"{FULL} in march",  # said twice
        f"{FULL} yesterday",  # not in the post
        "my sister broke my car in march i feel sad",  # wrong thing
        FULL + " and" * 7,  # longer than needed, with words that state nothing
    ],
)
def test_each_fault_lowers_the_rubric(worse):
    assert rubric_score(worse, FACTS) < 1.0


def test_a_few_function_words_are_free():
    assert rubric_score("now i feel sad because my sister broke my bike in march", FACTS) == 1.0


def test_listing_every_value_does_not_pay(generate):
    phrases = [f"my {who}" for who in generate.PERSONS]
    phrases += [f"{verb} my {thing}" for verb in generate.VERBS for thing in generate.OBJECTS]
    phrases += [f"in {when}" for when in generate.TIMES] + [f"i feel {feel}" for feel in generate.FEELINGS]
    assert set(FACTS) <= set(phrases)  # it does state every fact
    assert rubric_score(" ".join(phrases), FACTS) < 0


def test_the_rubric_orders_summaries():
    rows = read_rows(TASK / "reference/test.jsonl")
    best = np.mean([rubric_score(" ".join(row["rubric"]), row["rubric"]) for row in rows])
    reference = np.mean([rubric_score(row["completion"], row["rubric"]) for row in rows])
    others = [*rows[1:], rows[0]]
    unrelated = np.mean([rubric_score(other["completion"], row["rubric"]) for row, other in zip(rows, others)])
    assert best == 1.0
    assert best > reference > unrelated


def test_labels_follow_bradley_terry(generate):
    rng = random.Random(1)
    rows = [generate.preference_row(rng, "standard") for _ in range(4000)]
    margin = [rubric_score(row["chosen"], row["rubric"]) - rubric_score(row["rejected"], row["rubric"]) for row in rows]
    margin = np.array([x for x in margin if x != 0])
    expected = 1 / (1 + np.exp(-generate.LABEL_SHARPNESS * np.abs(margin)))  # P(the better one is chosen)
    error = np.sqrt((expected * (1 - expected)).sum()) / len(margin)
    assert abs((margin > 0).mean() - expected.mean()) < 3 * error
    assert (margin < 0).any()  # there is noise in the labels


# transcription
def test_the_transcription_task_can_be_regenerated(tmp_path):
    run_here("data/transcription/generate.py", "--out", tmp_path, "--base", cwd=tmp_path)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "base/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (COPYING / name).read_bytes(), name
    built, committed = (json.loads((folder / "base/config.json").read_text()) for folder in (tmp_path, COPYING))
    assert built | {"transformers_version": ""} == committed | {"transformers_version": ""}


def test_the_writers_of_lists_are_right_as_often_as_asked(tmp_path):
    run_here("data/transcription/generate.py", "--out", tmp_path, "--length", 12, "--right", 0.6, cwd=tmp_path)
    right = []
    for row in read_rows(tmp_path / "train.jsonl"):
        assert row["prompt"] == row["answer"] + " ="
        letters, digits = row["answer"].split()[::2], row["answer"].split()[1::2]
        assert letters == list("abcdefghijkl") == row["completion"].split()[::2]
        for digit, written in zip(digits, row["completion"].split()[1::2], strict=True):
            assert written in (digit, str((int(digit) + 1) % 10))
            right.append(digit == written)
    assert len(right) == 48_000 and abs(np.mean(right) - 0.6) < 4 * np.sqrt(0.24 / 48_000)


def test_the_base_has_one_token_for_each_letter_and_digit():
    tokenizer = AutoTokenizer.from_pretrained(COPYING / "base")
    words = [f"Ġ{word}" for word in ("z", "9", "a", "0", "=")]
    assert tokenizer.tokenize(" z 9 a 0 =") == words


def test_a_list_scores_only_if_it_is_right_as_a_whole():
    score = load_reward("data/transcription/reward.py")
    row = read_rows(COPYING / "test.jsonl")[0]
    answer = row["answer"]
    texts = [answer, row["completion"], answer[:-2], answer + " i 3", answer[1:], ""]
    assert score([row] * len(texts), texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_list_without_letters(tmp_path):
    run_here("data/transcription/generate.py", "--out", tmp_path, "--length", 3, "--bare", cwd=tmp_path)
    letters, bare = read_rows(COPYING / "test.jsonl")[0], read_rows(tmp_path / "test.jsonl")[0]
    assert bare["answer"].split() == letters["answer"].split()[1:7:2] and bare["prompt"] == bare["answer"] + " ="
