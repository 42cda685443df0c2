"""The recipes' dry runs on local files of the hub's shapes, dry_run.py's counts and errors.

Each command of a recipe is run in this process; that the longer recipes do it themselves is a slow test.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, run_here
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPTNeoXConfig

STEPS = ("sft.py", "reward_model.py", "dpo.py", "ppo.py", "drpo.py", "judge.py")
RECIPES = {"tldr_pythia_2.8b.sh": STEPS, "hh_pythia_1b.sh": STEPS, "cnndm_transfer.sh": ("judge.py",)}
COUNTS = re.compile(r"^(\S+) +([\d,]+) +([\d,]+)$", re.MULTILINE)


def dry_run(*flags, cwd):
    """-> as run_here. Beside data/, which the scripts' defaults name, the folder is empty, and stays so."""
    if not (cwd / "data").exists():
        (cwd / "data").symlink_to(ROOT / "data")
    before = files(cwd)
    done = run_here("benchmark/dry_run.py", *flags, cwd=cwd, check=False)
    assert files(cwd) == before
    return done


def files(folder):
    """Every file's path, size and time of change."""
    found = (path for path in folder.rglob("*") if not path.is_symlink())
    return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def counts(stdout):
    """Model -> parameters, trained parameters, as printed."""
    return {name: tuple(int(x.replace(",", "")) for x in numbers) for name, *numbers in COUNTS.findall(stdout)}


def write_split(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What the recipes would get from the hub, small: the environment variables that point them to it."""
    folder = tmp_path_factory.mktemp("hub")
    posts = read_rows(ROOT / "data/tldr_mini/reference/train.jsonl")[:10]
    pairs = read_rows(ROOT / "data/tldr_mini/preference/train.jsonl")[:10]
    for row in pairs:
        dialogue = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
        row["hh"] = {name: dialogue + row[name] for name in ("chosen", "rejected")}
    for split in ("train", "validation", "test"):
        write_split(folder / "posts", split, [{name: row[name] for name in ("prompt", "completion")} for row in posts])
    for split in ("train", "validation"):
        kept = ("prompt", "chosen", "rejected")
        write_split(folder / "pairs", split, [{name: row[name] for name in kept} for row in pairs])
    for split in ("train", "test"):
        write_split(folder / "hh", split, [row["hh"] for row in pairs])
    news = [{"article": row["prompt"], "highlights": row["completion"], "id": "0"} for row in posts]
    write_split(folder / "news", "test", news)
    base = folder / "base"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    GPTNeoXConfig(**sizes, vocab_size=50_304, max_position_embeddings=2048).save_pretrained(base)
    AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia").save_pretrained(base)
    variables = {"BASE": "base", "SFT_DATA": "posts", "PAIR_DATA": "pairs", "DATA": "hh", "NEWS_DATA": "news"}
    places = {name: str(folder / place) for name, place in variables.items()}
    return places | {"NEWS_CONFIG": "", "MODELS": str(folder / "models"), "TMPDIR": str(tmp_path_factory.mktemp("tmp"))}


def commands(recipe, hub, folder, *flags):
    """What a recipe would give to python: the words of each command. `python` is a script here that writes them down."""
    fake, record = folder / "bin/python", folder / "record"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >> "$RECORD"\necho >> "$RECORD"\n')
    fake.chmod(0o755)
    record.write_text("")
    environment = os.environ | hub | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "RECORD": str(record)}
    subprocess.run([ROOT / "benchmark" / recipe, *flags], env=environment, check=True)
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_of_a_recipe_would_start(recipe, hub, tmp_path):
    """The same commands as without --dry-run, of which each finds what the one before it would have made."""
    steps = commands(recipe, hub, tmp_path)
    assert [words[0] for words in steps] == list(RECIPES[recipe])
    dry_steps = commands(recipe, hub, tmp_path, "--dry-run")
    assert len(dry_steps) == len(steps) and not os.listdir(hub["TMPDIR"])  # where the chain was
    (tmp_path / "run").mkdir()
    for words, (dry, *rest) in zip(steps, dry_steps):
        own = rest[: -len(words)]  # of dry_run.py
        assert dry == "benchmark/dry_run.py" and rest[len(own) :] == words
        if own[0] == "--chain":  # the recipe has removed its folder
            own[1] = tmp_path / "chain.json"
        done = dry_run(*own, *words, cwd=tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert f"dry run of {words[0]}: it would start" in done.stdout
        assert len(re.findall(r"^together +\d", done.stdout, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow if len(steps) > 1 else ()) for name, steps in RECIPES.items()]
)
def test_dry_run_of_a_recipe(recipe, hub):
    before = {path for path in ROOT.glob("*/*") if path.parent.name in ("runs", "models")}
    environment = os.environ | hub | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = [ROOT / "benchmark" / recipe, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall("dry run of (.*): it would start", done.stdout) == list(RECIPES[recipe])
    assert len(re.findall(r"^together +\d", done.stdout, re.MULTILINE)) == len(RECIPES[recipe])
    assert not os.path.exists(hub["MODELS"]) and not list(Path(hub["TMPDIR"]).rglob("*.json"))
    assert {path for path in ROOT.glob("*/*") if path.parent.name in ("runs", "models")} == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (("drpo.py", "--beta", 2), "--beta 2.0 is a probability"),
        (("dpo.py", "--dataset", ROOT / "data/tldr_mini/reference"), "no column 'chosen'"),
        (("sft.py", "--base-model", "nowhere"), "cannot load nowhere"),
    ],
    ids=("flag", "column", "model"),
)
def test_what_is_wrong_is_one_line(flags, message, tmp_path):
    done = dry_run(*flags, cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if "rows of" not in line]  # plumbing/rows.py says what it read
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr


@pytest.mark.parametrize("script", ["drpo.py", "rto.py"])
def test_counts_are_those_of_real_models(script, tmp_path):
    """The embedded task's defaults, none of which exists here: models are as those that would be trained first."""
    found = counts(dry_run(script, cwd=tmp_path).stdout)
    config = GPTNeoXConfig.from_pretrained(ROOT / "data/tldr_mini/base", num_labels=1)
    policy, critic = (
        sum(x.numel() for x in auto_class.from_config(config).parameters())
        for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification)
    )
    assert found == {
        "policy": (policy, policy),
        "critic": (critic, critic),
        "ref_policy": (policy, 0),
        "reward_model": (critic, 0),
    } | ({"dpo_policy": (policy, 0)} if script == "rto.py" else {})


def test_lora_is_counted(tmp_path):
    done = dry_run("drpo.py", "--lora-rank", 4, "--lora-target", "query_key_value", cwd=tmp_path)
    found, adapters = counts(done.stdout), 3 * 4 * (64 + 3 * 64)  # three layers, A and B
    assert found["policy"][1] == adapters and found["critic"][1] == adapters + 64  # and the head
    assert found["policy"][0] == found["ref_policy"][0] + adapters


def test_a_later_step_may_name_an_earlier_ones_folder(tmp_path):
    """Each serves as what it would be: a reward model has one output, a policy none, which is told apart."""
    chain, flags = tmp_path / "chain.json", ("ppo.py", "--sft-path", "a/sft", "--reward-path")
    planned = {"base": str(ROOT / "data/tiny_pythia"), "labels": {}}
    chain.write_text(json.dumps({"a/sft": planned, "a/reward": planned | {"labels": {"num_labels": 1}}}))
    (tmp_path / "run").mkdir()
    done = dry_run("--chain", chain, *flags, "a/reward/", "--output-dir", "a/ppo", cwd=tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(chain.read_text())["a/ppo"] == planned
    done = dry_run("--chain", chain, *flags, "a/sft", cwd=tmp_path / "run")
    assert done.returncode == 2 and "is no reward model" in done.stderr
