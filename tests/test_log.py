"""What a run says and leaves beside its checkpoints: line 0, samples, TensorBoard, Weights & Biases, the model card."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, read_rows, run_here, run_script
from huggingface_hub import ModelCard
from test_errors import fails
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tldr_mini.rubric import rubric_score
from plumbing import flags
from plumbing.models import make_trainable
from plumbing.runs import Run

TOY = ROOT / "tests/toy.py"
RL = ("--total-episodes", 32, "--batch-size", 16, "--minibatch-size", 16, "--num-ppo-epochs", 1, "--eval-every", 1)


@pytest.fixture(scope="module")
def rl(models):
    """Two updates of drpo.py on three validation rows, each evaluated."""
    folder = models.folder / "log"
    folder.mkdir()
    flags = (*models.flags, *RL, "--eval-rows", 3, "--run-name", "rl", "--output-dir", "out")
    done = run_here("drpo.py", *flags, cwd=folder)
    return SimpleNamespace(dir=folder / "runs/rl", output=folder / "out", stdout=done.stdout, stderr=done.stderr)


# line 0
def test_line_0_is_the_untouched_policy(rl):
    first, *others = read_metrics(rl.dir, start=0)
    assert first["update"] == 0 and first["episodes"] == 0 and first["eval/kl"] == 0
    assert [line["update"] for line in others] == [1, 2]
    names = {name for name in others[0] if name.startswith("eval/")}
    assert first.keys() == {"update", "episodes", *names} and len(names) == 6
    assert all(line["eval/kl"] != 0 for line in others)


def test_line_0_of_sft_is_the_loss_of_the_model_as_it_came(models, tmp_path):
    sizes = ("--num-epochs", 1, "--batch-size", 64, "--eval-rows", 5)
    command = ("--dataset", models.reference, "--base-model", models.sft, *sizes, "--run-name", "sft")
    run_here("sft.py", *command, "--output-dir", "out", cwd=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models.sft), AutoTokenizer.from_pretrained(models.sft)
    total, count = 0.0, 0
    for row in read_rows(models.reference / "validation.jsonl")[:5]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        total -= logits.log_softmax(-1)[torch.arange(len(response)), response].sum().item()
        count += len(response)
    assert read_metrics(tmp_path / "runs/sft", start=0)[0]["eval/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("script, names", [("reward_model.py", {"loss", "accuracy"}), ("dpo.py", {"loss", "margin"})])
def test_every_script_has_a_line_0(script, names, models, tmp_path):
    more = ("--reference-dataset", models.reference) if script == "reward_model.py" else ()
    command = ("--dataset", models.preference, "--sft-path", models.sft, "--num-epochs", 1, "--batch-size", 64, *more)
    run_here(script, *command, "--run-name", "new", "--output-dir", "out", cwd=tmp_path)
    first, *others = read_metrics(tmp_path / "runs/new", start=0)
    assert first["update"] == 0 and {f"eval/{name}" for name in names} < first.keys()
    last = [line for line in others if "eval/loss" in line][-1]
    assert last["update"] == len(others) and last["eval/loss"] < first["eval/loss"]


def test_a_resumed_run_has_every_line_once(tmp_path):
    done = run_here(TOY, "--run-name", "a", "--num-epochs", 4, "--save-every", 3, cwd=tmp_path)
    assert done.returncode == 0
    for path in sorted((tmp_path / "runs/a").glob("checkpoint_*"))[-1:]:
        path.unlink()  # of update 4: the run goes on after update 3
    run_here(TOY, "--resume", "a", cwd=tmp_path)
    assert [line["update"] for line in read_metrics(tmp_path / "runs/a", start=0)] == [0, 1, 2, 3, 4]
    for path in (tmp_path / "runs/a").glob("checkpoint_*"):
        path.unlink()
    run_here(TOY, "--resume", "a", cwd=tmp_path)  # from the start
    assert [line["update"] for line in read_metrics(tmp_path / "runs/a", start=0)] == [0, 1, 2, 3, 4]


# samples
def test_three_texts_of_every_evaluation_with_their_numbers(rl, models):
    samples, metrics = read_rows(rl.dir / "samples.jsonl"), read_metrics(rl.dir, start=0)
    assert [sample["update"] for sample in samples] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    rows = read_rows(models.reference / "validation.jsonl")[:3]
    for update, line in enumerate(metrics):
        part = samples[3 * update : 3 * update + 3]  # all of the rows that were evaluated
        assert [sample["prompt"] for sample in part] == [row["prompt"] for row in rows]
        for name in ("score", "kl", "rubric", "length", "eos", "win_rate"):
            assert np.mean([sample[name] for sample in part]) == pytest.approx(line[f"eval/{name}"], rel=1e-5, abs=1e-6)
        for sample, row in zip(part, rows):
            assert sample["rubric"] == pytest.approx(rubric_score(sample["response"], row["rubric"]), abs=1e-6)


# trackers
def test_tensorboard_gets_numbers_texts_and_flags(rl):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(rl.dir)).Reload()
    found = {x.step: x.value for x in events.Scalars("eval/score")}
    assert found == {x["update"]: pytest.approx(x["eval/score"], rel=1e-6) for x in read_metrics(rl.dir, start=0)}
    (arguments,) = events.Tensors("arguments/text_summary")
    assert "--eval-rows 3" in arguments.tensor_proto.string_val[0].decode()
    texts = [x.tensor_proto.string_val[0].decode() for x in events.Tensors("sample 1/text_summary")]
    assert [json.loads(text) for text in texts] == [
        {name: x for name, x in sample.items() if name != "update"}
        for sample in read_rows(rl.dir / "samples.jsonl")[1::3]
    ]


@pytest.mark.slow
def test_weights_and_biases_without_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_script("tests/toy.py", "--run-name", "tracked", "--num-epochs", 2, "--track", cwd=tmp_path)
    run_id = json.loads((tmp_path / "runs/tracked/args.json").read_text())["id"]
    (file,) = (tmp_path / "runs/tracked/wandb").glob(f"offline-run-*/run-{run_id}.wandb")
    assert b"gained" in file.read_bytes()


def test_weights_and_biases_get_every_line(tmp_path):
    pytest.importorskip("wandb")
    with mock.patch("wandb.init") as init:
        run_here(TOY, "--run-name", "tracked", "--num-epochs", 2, "--track", cwd=tmp_path)
        run_here(TOY, "--resume", "tracked", "--num-epochs", 3, cwd=tmp_path)
    first, again = (call.kwargs for call in init.call_args_list)
    assert first["id"] == again["id"] and first["name"] == "tracked" and first["config"]["width"] == 16
    steps = [call.kwargs["step"] for call in init.return_value.log.call_args_list]
    assert steps == [0, 1, 2, 3] and init.return_value.finish.call_count == 2
    metrics = read_metrics(tmp_path / "runs/tracked", start=0)
    for call, line in zip(init.return_value.log.call_args_list, metrics, strict=True):
        logged = {name: x for name, x in call.args[0].items() if not name.startswith("time/")}
        assert {"update": call.kwargs["step"]} | logged == line


def test_without_wandb_the_error_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flags, "find_spec", lambda name: None)
    done = run_here(TOY, "--track", cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr == "error: --track needs wandb: pip install wandb\n"
    assert not (tmp_path / "runs").exists()


# the folder of the final model
def test_the_model_says_where_it_came_from(rl, models):
    for name in ("args.json", "result.json"):
        assert (rl.output / name).read_text() == (rl.dir / name).read_text()
    card = ModelCard.load(rl.output / "README.md")
    assert card.data.library_name == "transformers" and "drpo" in card.data.tags and card.data.base_model is None
    assert "drpo.py" in card.text and "DR-PO" in card.text and str(models.sft) in card.text
    result = json.loads((rl.dir / "result.json").read_text())
    assert f"{result['DR-PO']['score']:.3f}" in card.text
    assert AutoModelForCausalLM.from_pretrained(rl.output)


def test_a_card_names_what_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sft.py"])
    args = SimpleNamespace(run_name="x", seed=1, base_model="someone/base", dataset="trl-lib/tldr", output_dir="out")
    run = Run(args)
    run.keep({"result.json": "{}"})
    run.write_card("the table")
    card = ModelCard.load("out/README.md")
    assert card.data.base_model == "someone/base" and card.data.datasets == "trl-lib/tldr"
    assert "the table" in card.text and (shutil.which("git") is None or "unknown" not in card.text)
    with mock.patch("subprocess.run", side_effect=FileNotFoundError):  # no git
        run.write_card("the table")
    assert "commit unknown" in ModelCard.load("out/README.md").text


# the start
def test_what_is_said_before_the_first_update(rl):
    lines = [*rl.stderr.replace("\r", "\n").splitlines(), *rl.stdout.splitlines()]
    said = [line for line in lines if "rows of prompt" in line]
    assert len(said) == 3 and "1 file" in said[0]
    assert sum("tokens (half, 95%, all have at most)" in line for line in lines) == 3
    (run,) = (line for line in lines if line.startswith("runs/rl:"))
    assert run.startswith("runs/rl: 2 updates of 16 on 1 x cpu in float32; 396,864 weights to train, 0.01 GiB")


def test_max_rows_bounds_every_split(models, tmp_path):
    flags = ("--dataset", models.reference, "--base-model", models.sft, "--num-epochs", 1, "--batch-size", 4)
    done = run_here("sft.py", *flags, "--max-rows", 8, "--run-name", "few", "--output-dir", "out", cwd=tmp_path)
    assert done.stderr.count(": 8 rows of") == 2
    assert len(read_metrics(tmp_path / "runs/few")) == 2


def test_a_large_model_needs_a_learning_rate(monkeypatch, capsys):
    args = SimpleNamespace(resume="", learning_rate=4e-3, gradient_checkpointing=False, lora_rank=0)
    model = mock.Mock(num_parameters=lambda: 135_000_000)
    monkeypatch.setattr("sys.argv", ["sft.py", "--base-model", "large"])
    fails(capsys, "--learning-rate must be given: 0.004 is for tiny models", make_trainable, model, model, args)
    for words in (["--learning-rate", "1e-5"], ["--learning-rate=1e-5"], ["--learning_rate", "1e-5"]):
        monkeypatch.setattr("sys.argv", ["sft.py", *words])
        assert make_trainable(model, model, args) is model
    monkeypatch.setattr("sys.argv", ["sft.py", "--resume", "mine"])
    args.resume = "mine"
    assert make_trainable(model, model, args) is model
    monkeypatch.setattr("sys.argv", ["sft.py"])
    small = mock.Mock(num_parameters=lambda: 231_168)
    assert make_trainable(small, small, SimpleNamespace(**vars(args) | {"resume": ""})) is small
