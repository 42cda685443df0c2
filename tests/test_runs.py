"""Short real runs of ppo.py and drpo.py on the small chain: what they write, and that they agree where they must."""

import json
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics, run_here, run_script, write_dataset
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config

import ppo
from plumbing.tokens import encode

UPDATES = 3
SHORT = ("--total-episodes", 16 * UPDATES, "--batch-size", 16, "--minibatch-size", 16, "--eval-every", 2)
SHORT += ("--eval-rows", 16, "--num-ppo-epochs", 2, "--response-length", 24, "--prompt-length", 128)


@pytest.fixture(scope="module")
def runs(models):
    """Every run that the tests compare, made once: one of each script as its users start it, the others in this process."""

    def run(script, name, *flags, output=None, start=run_here):
        output = models.folder / (output or name)
        command = (*models.flags, *SHORT, "--run-name", name, "--output-dir", output, *flags)
        done = start(script, *command, cwd=models.folder)
        run_dir = models.folder / "runs" / name
        return SimpleNamespace(dir=run_dir, output=output, stdout=done.stdout, metrics=read_metrics(run_dir))

    return SimpleNamespace(
        ppo=run("ppo.py", "ppo", "--seed", 1, start=run_script),
        beta_0=run("drpo.py", "beta_0", "--seed", 1, "--beta", 0),
        drpo=run("drpo.py", "drpo", "--seed", 1, "--beta", 1, start=run_script),
        again=run("drpo.py", "again", "--seed", 1, "--beta", 1, output="drpo"),
        other_seed=run("drpo.py", "other_seed", "--seed", 2, "--beta", 1),
        micro=run("drpo.py", "micro", "--seed", 1, "--beta", 1, "--micro-batch-size", 5),
    )


def all_runs(runs):
    return vars(runs).values()


# run_here, on which most tests stand
def test_a_run_in_this_process_gives_the_numbers_of_a_launched_one(runs):
    result, again = ((run.dir / "result.json").read_text() for run in (runs.drpo, runs.again))
    assert runs.again.metrics == runs.drpo.metrics and again == result
    folders = runs.drpo.output / "1", runs.again.output  # the later one took the name
    weights, others = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    assert all(a.equal(b) for a, b in zip(weights.parameters(), others.parameters(), strict=True))
    ours = [
        line for line in runs.again.stdout.splitlines() if not line.startswith(("keeping what", "final model", "runs/"))
    ]
    theirs = [line for line in runs.drpo.stdout.splitlines()[:-1] if not line.startswith("runs/")]
    assert ours == theirs  # its own names apart


def test_help_in_this_process_is_that_of_the_script():
    shown = run_here("drpo.py", "--help", cwd=ROOT).stdout
    assert "ppo.py plus resets to dataset states" in shown and "--reset-column" in shown


def test_a_run_in_this_process_leaves_no_trace(models, runs):
    def surroundings():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()
        places = os.getcwd(), sys.argv, sys.stdout, sys.stderr, sys.modules["__main__"]
        return handlers, autocast, places, dict(os.environ), torch.get_rng_state().tolist()

    before = surroundings()
    flags = (*models.flags, *SHORT, "--dtype", "bfloat16", "--run-name")
    run_here("ppo.py", *flags, "trace", "--output-dir", "trace", "--total-episodes", 16, cwd=models.folder)
    assert surroundings() == before
    with FileLock(models.folder / "runs/trace/.lock", timeout=0):  # free, as if its process had ended
        pass
    done = run_here("ppo.py", *flags, "trace", cwd=models.folder, check=False)  # a name that is taken
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: --run-name trace")
    assert surroundings() == before


# what the runs must agree in
def test_beta_0_is_ppo_number_for_number(runs):
    assert len(runs.ppo.metrics) == UPDATES
    for ours, theirs in zip(runs.beta_0.metrics, runs.ppo.metrics, strict=True):
        assert {key: ours.get(key) for key in theirs} == theirs
    assert runs.drpo.metrics[0]["objective/score"] != runs.ppo.metrics[0]["objective/score"]


def test_the_seed_fixes_everything(runs):
    assert runs.again.metrics == runs.drpo.metrics
    assert runs.other_seed.metrics[0] != runs.drpo.metrics[0]


def test_the_first_ratio_of_each_update_is_one(runs):
    for run in all_runs(runs):
        assert all(line["policy/first_ratio_error"] < 1e-5 for line in run.metrics)
        assert all(line["policy/ratio_error"] > 1e-5 for line in run.metrics)  # later ones are not


def test_micro_batches_change_only_the_rounding(runs):
    first, micro = runs.drpo.metrics[0], runs.micro.metrics[0]
    rounding = [key for key in first if key != "policy/first_ratio_error"]  # which is nothing but rounding
    assert [micro[key] for key in rounding] == pytest.approx([first[key] for key in rounding], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_bfloat16_learns_what_float32_learns(models, tmp_path):
    # autocast's copies of the weights must not outlive an optimizer step: with stale ones hardly anything is learned
    base = ("--dataset", models.reference, "--base-model", ROOT / "data/tiny_pythia", *models.steps)
    base += ("--learning-rate", 4e-3)
    run_here("sft.py", *base, "--dtype", "bfloat16", "--output-dir", "sft", "--run-name", "sft", cwd=tmp_path)
    ours, theirs = (read_metrics(folder / "runs/sft")[-1] for folder in (tmp_path, models.folder))
    assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=0.03) and ours["loss"] != theirs["loss"]

    rl, found = (*models.flags, *SHORT, "--num-ppo-epochs", 4, "--learning-rate", 3e-3), {}
    for name in ("float32", "bfloat16"):
        run_here("ppo.py", *rl, "--dtype", name, "--output-dir", name, "--run-name", name, cwd=tmp_path)
        found[name] = read_metrics(tmp_path / "runs" / name)
        assert all(line["policy/first_ratio_error"] < 1e-5 for line in found[name])
    ours, theirs = found["bfloat16"], found["float32"]
    assert ours[0]["objective/score"] != theirs[0]["objective/score"]  # it is another precision
    assert 0.5 < ours[-1]["objective/kl"] / theirs[-1]["objective/kl"] < 2
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert {tensor.dtype for tensor in weights.parameters()} == {torch.float32}


def test_resets_are_logged(runs):
    assert [line["reset/fraction"] for line in runs.drpo.metrics] == [1.0] * UPDATES
    assert all(line["reset/length"] >= 1 for line in runs.drpo.metrics)
    assert [line["reset/length"] for line in runs.beta_0.metrics] == [0.0] * UPDATES


def test_the_prefix_is_no_action_of_a_real_run(models, tmp_path):
    # a greedy policy is sure of its own tokens and finds the forced ones, never seen in training, impossible: were
    # they counted, or the policy's tokens sampled from another context, the mean negative log-prob would be huge
    dataset = write_dataset(
        tmp_path / "drafts", "reference", (32, 8, 8), lambda rows: [row | {"draft": "~" * 8} for row in rows]
    )
    flags = (*models.flags, *SHORT, "--total-episodes", 16, "--temperature", 1e-3, "--learning-rate", 0)
    flags += ("--dataset", dataset, "--reset-column", "draft", "--beta", 1, "--run-name", "drafts")
    done = run_here("drpo.py", *flags, cwd=tmp_path)
    (line,) = read_metrics(tmp_path / "runs" / "drafts")
    assert line["reset/fraction"] == 1 and 1 <= line["reset/length"] <= 8
    assert line["policy/entropy"] < 1
    assert line["objective/kl"] == pytest.approx(0, abs=1e-4)  # the policy is still pi_SFT
    assert "  from a reset: [ ~" in done.stdout  # plumbing/rows.py gives it the space that follows TL;DR:


def test_the_run_folder(runs):
    for run in all_runs(runs):
        assert [line["update"] for line in run.metrics] == list(range(1, UPDATES + 1))
        evaluated = [line["update"] for line in run.metrics if "eval/score" in line]
        assert evaluated == [2, UPDATES]  # every second update, and the last
        saved = json.loads((run.dir / "args.json").read_text())
        assert saved["batch_size"] == 16 and saved["run_name"] == run.dir.name
        result = json.loads((run.dir / "result.json").read_text())
        assert set(result) == {"SFT", "PPO" if run is runs.ppo else "DR-PO"}
        for row in result.values():
            assert 0 <= row["win_rate"] <= 1 and -1 <= row["rubric"] <= 1 and row["length"] >= 1
        assert result["SFT"]["kl"] == 0.0


def test_what_drpo_prints(runs):
    lines = runs.drpo.stdout.splitlines()
    result = json.loads((runs.drpo.dir / "result.json").read_text())
    for name, row in result.items():
        (cells,) = (line.split()[1:] for line in lines if line.startswith(name + " "))
        assert [float(cell) for cell in cells] == pytest.approx(list(row.values()), abs=6e-4)
    assert sum(line.startswith("  from a reset: [") for line in lines) == 3


def test_a_reset_at_the_end_is_no_longer_than_in_training(models, tmp_path):
    """GPT-2 has no position behind prompt and response; its prefixes count against the response."""
    config = GPT2Config(vocab_size=1024, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    for name, kind in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        config.num_labels, config.pad_token_id = 1, 1
        kind.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "data").mkdir()
    rows = [{"prompt": "my boss broke my bike. " * 9, "completion": " my boss broke my bike in march at the gym"}] * 16
    for split in ("train", "validation", "test"):
        (tmp_path / f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--dataset", tmp_path / "data", "--sft-path", "sft", "--reward-path", "reward", "--prompt-length", 40)
    flags += ("--response-length", 24, "--total-episodes", 16, "--batch-size", 16, "--minibatch-size", 16)
    done = run_here("drpo.py", *flags, "--run-name", "run", "--output-dir", "out", cwd=tmp_path)
    resets = re.findall(r"^  from a reset: \[(.*?)\](.*)$", done.stdout, re.MULTILINE)
    assert len(resets) == 3 and "final model: out" in done.stdout
    for prefix, own in resets:
        assert len(tokenizer(prefix)["input_ids"]) > 0 and own


def test_the_policy_loads_and_has_learned(runs, models):
    tokenizer = AutoTokenizer.from_pretrained(runs.drpo.output)
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(models.sft).get_vocab()
    trained, start = (AutoModelForCausalLM.from_pretrained(path) for path in (runs.drpo.output, models.sft))
    changed = [not a.equal(b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert any(changed)


def test_an_earlier_result_is_kept(runs):
    earlier = runs.drpo.output / "1"
    names = {file.name for file in runs.drpo.output.iterdir()}
    assert {file.name for file in earlier.iterdir()} | {"1"} == names and "config.json" in names
    assert str(earlier) in runs.again.stdout and str(earlier) not in runs.drpo.stdout


@torch.no_grad()
def test_the_reward_model_ranks_as_ppo_reads_it(models):
    tokenizer = AutoTokenizer.from_pretrained(models.reward)
    model = AutoModelForSequenceClassification.from_pretrained(models.reward).eval()
    prompts, responses = [], []
    for line in (models.preference / "test.jsonl").read_text().splitlines()[:8]:
        row = json.loads(line)
        prompts += [row["prompt"]] * 2
        responses += [row["chosen"], row["rejected"]]
    prompt_ids = encode(tokenizer, prompts, "prompts", 500)
    response_ids = encode(tokenizer, responses, "responses", 500)
    ours = ppo.sequence_scores(model, *ppo.pad(prompt_ids, "left", "cpu"), *ppo.pad(response_ids, "right", "cpu"))
    rows = [prompt + response for prompt, response in zip(prompt_ids, response_ids)]
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    theirs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.squeeze(1)
    assert (ours[::2] > ours[1::2]).equal(theirs[::2] > theirs[1::2])
    assert (theirs - ours).tolist() == pytest.approx([model.config.score_mean] * 16, abs=1e-4)
