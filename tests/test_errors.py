"""Bad input: one line that names what is wrong, exit code 2, nothing written."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, read_rows, run_script, write_dataset
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ppo


# what a case changes: a function of (models, folder) -> flags that override the good ones, text the error must hold
def without(column):
    return lambda rows: [{key: x for key, x in row.items() if key != column} for row in rows]


def put(column, value, number):
    return lambda rows: [row | {column: value} if n == number else row for n, row in enumerate(rows)]


def blank(column):
    return lambda rows: [row | {column: "  "} for row in rows]


def dataset(task, edit):
    return lambda models, folder: ("--dataset", write_dataset(folder / "dataset", task, edit=edit))


def empty_file(models, folder):
    (folder / "empty.jsonl").touch()
    return "--dataset", folder / "empty.jsonl"


def empty_split(models, folder):
    write_dataset(folder / "dataset", "reference")
    (folder / "dataset" / "train.jsonl").write_text("")
    return "--dataset", folder / "dataset"


def other_vocabulary(models, folder):
    shutil.copytree(models.reward, folder / "other_reward")
    tokenizer = AutoTokenizer.from_pretrained(models.reward)
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(folder / "other_reward")
    return "--reward-path", folder / "other_reward"


def two_outputs(models, folder):
    model = AutoModelForSequenceClassification.from_pretrained(models.sft, num_labels=2)
    model.save_pretrained(folder / "two")
    AutoTokenizer.from_pretrained(models.sft).save_pretrained(folder / "two")
    return "--reward-path", folder / "two"


def spoilt_weights(how):
    def spoil(models, folder):
        shutil.copytree(models.sft, folder / "spoilt")
        file = folder / "spoilt" / "model.safetensors"
        if how == "cut":
            file.write_bytes(file.read_bytes()[:-1000])
        elif how == "pickle":
            torch.save(load_file(file), folder / "spoilt" / "pytorch_model.bin")
        if how != "cut":
            file.unlink()
        return "--sft-path", folder / "spoilt"

    return spoil


def small_embedding(models, folder):
    shutil.copytree(ROOT / "data/tiny_pythia", folder / "small")
    config = json.loads((folder / "small/config.json").read_text())
    (folder / "small/config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    return "--base-model", folder / "small"


def flags(*values):
    return lambda models, folder: values


CASES = {
    "ppo: column missing": ("ppo.py", dataset("reference", without("completion")), "'completion'"),
    "ppo: response a number": ("ppo.py", dataset("reference", put("completion", 3, 3)), "row 3, column 'completion'"),
    "ppo: responses blank": ("ppo.py", dataset("reference", blank("completion")), "no rows, dropped 8: empty"),
    "ppo: file empty": ("ppo.py", empty_file, "empty.jsonl"),
    "ppo: split empty": ("ppo.py", empty_split, "'train'"),
    "ppo: dataset missing": ("ppo.py", flags("--dataset", "no/such"), "no/such"),
    "ppo: split missing": ("ppo.py", flags("--eval-split", "nowhere"), "'nowhere'"),
    "ppo: SFT missing": ("ppo.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    "ppo: reward model missing": ("ppo.py", flags("--reward-path", "/no/such/reward"), "/no/such/reward"),
    "ppo: other vocabulary": ("ppo.py", other_vocabulary, "other_reward has another vocabulary"),
    "ppo: no reward model": ("ppo.py", lambda models, folder: ("--reward-path", models.sft), "is no reward model"),
    "ppo: too few episodes": ("ppo.py", flags("--total-episodes", 63, "--batch-size", 64), "--total-episodes"),
    "ppo: odd minibatch": ("ppo.py", flags("--batch-size", 8, "--minibatch-size", 3), "--minibatch-size"),
    "ppo: temperature 0": ("ppo.py", flags("--temperature", 0), "--temperature 0.0 must be above 0"),
    "ppo: no micro-batch": ("ppo.py", flags("--micro-batch-size", 0), "--micro-batch-size 0 must be above 0"),
    "ppo: clip not a number": ("ppo.py", flags("--clip-coef", "nan"), "--clip-coef nan must be above 0"),
    "drpo: no evaluation": ("drpo.py", flags("--eval-every", 0), "--eval-every 0 must be above 0"),
    "drpo: reward for distance": ("drpo.py", flags("--kl-coef", -1), "--kl-coef -1.0 must be at least 0"),
    "sft: seed negative": ("sft.py", flags("--seed", -1), "--seed -1 must be at least 0"),
    "reward: rank negative": ("reward_model.py", flags("--lora-rank", -2), "--lora-rank -2 must be at least 0"),
    "dpo: no epoch": ("dpo.py", flags("--num-epochs", 0), "--num-epochs 0 must be above 0"),
    "ppo: no such layer": ("ppo.py", flags("--lora-rank", 2, "--lora-target", "nowhere"), "--lora-target nowhere"),
    "ppo: two outputs": ("ppo.py", two_outputs, "is no reward model"),
    "ppo: weights cut": ("ppo.py", spoilt_weights("cut"), "spoilt"),
    "ppo: pickled weights": ("ppo.py", spoilt_weights("pickle"), "safetensors"),
    "dpo: weights missing": ("dpo.py", spoilt_weights("none"), "safetensors"),
    "ppo: context too short": ("ppo.py", flags("--prompt-length", 500), "512 positions"),
    "reward: context too short": ("reward_model.py", flags("--response-length", 500), "512 positions"),
    "sft: small embedding": ("sft.py", small_embedding, "the embedding has 500 rows"),
    "drpo: beta high": ("drpo.py", flags("--beta", 1.5), "--beta 1.5"),
    "drpo: beta negative": ("drpo.py", flags("--beta", -0.1), "--beta -0.1"),
    "drpo: reset column missing": ("drpo.py", flags("--reset-column", "draft"), "'draft'"),
    "drpo: SFT missing": ("drpo.py", flags("--sft-path", "no/such/sft"), "no/such/sft"),
    "sft: column missing": ("sft.py", dataset("reference", without("prompt")), "'prompt'"),
    "sft: responses blank": ("sft.py", dataset("reference", blank("completion")), "no rows, dropped 8: empty"),
    "sft: base model missing": ("sft.py", flags("--base-model", "/no/such/base"), "/no/such/base"),
    "sft: batch too large": ("sft.py", flags("--num-epochs", 1, "--batch-size", 1000), "--batch-size 1000"),
    "reward: column missing": ("reward_model.py", dataset("preference", without("rejected")), "'rejected'"),
    "reward: response an object": (
        "reward_model.py",
        dataset("preference", put("chosen", {"a": 1}, 2)),
        "row 2, column 'chosen'",
    ),
    "reward: SFT missing": ("reward_model.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    "dpo: column missing": ("dpo.py", dataset("preference", without("rejected")), "'rejected'"),
    "dpo: response an object": ("dpo.py", dataset("preference", put("chosen", {"a": 1}, 2)), "row 2, column 'chosen'"),
    "dpo: SFT missing": ("dpo.py", flags("--sft-path", "/no/such/sft"), "/no/such/sft"),
    "dpo: beta zero": ("dpo.py", flags("--beta", 0), "--beta 0"),
    "dpo: batch too large": ("dpo.py", flags("--batch-size", 1000), "--batch-size 1000"),
}


def good_flags(script, models):
    if script == "sft.py":
        return "--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia"
    if script == "reward_model.py":
        return "--dataset", models.preference, "--reference-dataset", models.reference, "--sft-path", models.sft
    if script == "dpo.py":
        return "--dataset", models.preference, "--sft-path", models.sft
    return models.flags


def assert_error(done, culprit):
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert culprit in line


@pytest.mark.parametrize("script, change, culprit", CASES.values(), ids=CASES)
def test_bad_input_is_one_line(script, change, culprit, models, tmp_path):
    command = (*good_flags(script, models), *change(models, tmp_path))
    before = sorted(tmp_path.iterdir())
    assert_error(run_script(script, *command, cwd=tmp_path, check=False), culprit)
    assert sorted(tmp_path.iterdir()) == before  # no runs/, no models/


@pytest.mark.parametrize("script", ["ppo.py", "drpo.py", "sft.py", "reward_model.py", "dpo.py"])
def test_an_existing_run_is_not_touched(script, models, tmp_path):
    file = tmp_path / "runs" / "taken" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("kept\n")
    done = run_script(script, *good_flags(script, models), "--run-name", "taken", cwd=tmp_path, check=False)
    assert_error(done, "taken")
    assert [path.name for path in file.parent.iterdir()] == [file.name] and file.read_text() == "kept\n"


def test_a_base_model_without_weights_is_said_so(models):
    (line,) = (line for line in models.sft_run.stdout.splitlines() if "no weights" in line)
    assert str(ROOT / "data/tiny_pythia") in line


def test_long_prompts_are_cut_from_the_left(capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    prompts = [row["prompt"] for row in read_rows(ROOT / "data/tldr_mini/reference/test.jsonl")[:9]]
    texts = [f"\n\nHuman: {prompt} And?\n\nAssistant:" for prompt in prompts]  # no TL;DR prompt any more
    whole = ppo.encode(tokenizer, texts, "prompts", 1000)
    assert capsys.readouterr().out == ""
    limit = sorted(len(ids) for ids in whole)[4]
    assert ppo.encode(tokenizer, texts, "prompts", limit) == [ids[-limit:] for ids in whole]
    out = capsys.readouterr().out
    assert out.startswith("note:") and f"{sum(len(ids) > limit for ids in whole)} of 9 prompts" in out


def test_long_responses_lose_their_end(capsys):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    text = " my sister broke my bike"
    whole = ppo.encode(tokenizer, [text], "responses", 1000)[0]
    assert whole[-1] == tokenizer.eos_token_id and tokenizer.decode(whole[:-1]) == text
    assert ppo.encode(tokenizer, [text], "responses", 3) == [whole[:3]]
    assert "1 of 1 responses" in capsys.readouterr().out


def test_an_eos_in_the_text_ends_the_response():
    # a second EOS would let a reset keep the first one, and leave the policy nothing to do
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    whole, spelled, more = (" my sister", " my sister<|endoftext|>", " my sister<|endoftext|> broke")
    (expected,) = ppo.encode(tokenizer, [whole], "responses", 20)
    assert ppo.encode(tokenizer, [spelled, more], "responses", 20) == [expected, expected]


def test_a_batch_may_be_larger_than_the_train_split(models, tmp_path):
    size = ("--batch-size", 300, "--micro-batch-size", 50, "--num-epochs", 3)  # two updates from three times 256 rows
    done = run_script("sft.py", *good_flags("sft.py", models), *size, cwd=tmp_path, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)


@pytest.mark.parametrize(
    "change, culprit",
    [
        (lambda folder: ("--sft-path", folder / "no_sft"), "no_sft"),
        (lambda folder: ("--reward-path", folder / "no_reward"), "no_reward"),
        (
            lambda folder: ("--dataset", write_dataset(folder / "data", "reference", edit=without("completion"))),
            "'completion'",
        ),
    ],
    ids=["sft path", "reward path", "dataset"],
)
def test_nothing_is_trained_before_the_rest_is_checked(change, culprit, models, tmp_path):
    # the default checkpoints are missing here, so that a late check would show as a training run
    done = run_script("drpo.py", "--dataset", models.reference, *change(tmp_path), cwd=tmp_path, check=False)
    assert_error(done, culprit)
    assert "running" not in done.stdout
    assert not (tmp_path / "models").exists()
