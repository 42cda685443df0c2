"""dpo.py: the loss against plain Python, and short real runs on the small chain."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics, read_rows, run_here, run_script
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo
import ppo
import reward_model
from plumbing.tokens import encode

UPDATES = 4
SHORT = ("--batch-size", 64, "--eval-every", 3)  # of 256 pairs
TERMS = {"loss", "accuracy", "margin", "rewards/chosen", "rewards/rejected", "logprobs/chosen", "logprobs/rejected"}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def random_pairs(count):
    """Four columns of log-probs: chosen, rejected, and both under the reference."""
    rng = random.Random(4)
    return [[rng.uniform(-60, -1) for _ in range(count)] for _ in range(4)]


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_dpo_loss_and_gradient(beta):
    columns = random_pairs(9)
    tensors = [torch.tensor(column, dtype=torch.float64, requires_grad=True) for column in columns]
    losses = dpo.dpo_loss(*tensors, beta)
    losses.sum().backward()
    for n, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(zip(*columns)):
        x = beta * (math.log(math.exp(chosen) / math.exp(ref_chosen)) - (rejected - ref_rejected))
        assert losses[n].item() == pytest.approx(-math.log(sigmoid(x)), rel=1e-9)
        slope = -beta * sigmoid(-x)  # DPO, the gradient below Eq. 7
        expected = [slope, -slope, -slope, slope]
        assert [tensor.grad[n].item() for tensor in tensors] == pytest.approx(expected, rel=1e-9)


def test_dpo_loss_at_the_reference_is_log_2():
    chosen, rejected, *_ = torch.tensor(random_pairs(5), dtype=torch.float64)
    assert_close(dpo.dpo_loss(chosen, rejected, chosen, rejected, 0.3), torch.full((5,), math.log(2)).double())


def test_dpo_loss_of_a_hopeless_pair_is_finite():
    far = torch.tensor([-1e5], requires_grad=True)
    loss = dpo.dpo_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1e5) and far.grad.item() == pytest.approx(-1)


def test_pair_terms():
    logprobs = torch.tensor([[-1.0, -5.0], [-4.0, -2.0], [-3.0, -3.0]])
    ref_logprobs = torch.tensor([[-2.0, -3.0], [-3.0, -3.0], [-4.0, -4.0]])
    terms = dpo.pair_terms(logprobs, ref_logprobs, 0.5)
    assert set(terms) == TERMS
    assert terms["rewards/chosen"].tolist() == [0.5, -0.5, 0.5]
    assert terms["rewards/rejected"].tolist() == [-1.0, 0.5, 0.5]
    assert terms["margin"].tolist() == [1.5, -1.0, 0.0]
    assert terms["accuracy"].tolist() == [1.0, 0.0, 0.5]
    assert terms["logprobs/chosen"].tolist() == [-1, -4, -3] and terms["logprobs/rejected"].tolist() == [-5, -2, -3]
    assert terms["loss"].tolist() == pytest.approx([-math.log(sigmoid(x)) for x in (1.5, -1.0, 0.0)])


@torch.no_grad()
def slow_logprob(model, prompt, response):
    """Sequence log-prob of one response, one unpadded row through the model's own forward."""
    logprobs = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + t - 1, token].item() for t, token in enumerate(response))


def random_pair_batch(count=5):
    """Prompts, chosen and rejected of different lengths: as ids, and as the tensors of dpo.py and reward_model.py."""
    rng = random.Random(5)
    prompts, chosen, rejected = (
        [[rng.randrange(2, 1024) for _ in range(rng.randint(1, longest))] for _ in range(count)]
        for longest in (9, 7, 4)
    )
    pairs = dpo.pad([ids for pair in zip(chosen, rejected) for ids in pair], "right", "cpu")
    return (prompts, chosen, rejected), (*dpo.pad(prompts, "left", "cpu"), *(x.unflatten(0, (-1, 2)) for x in pairs))


@pytest.mark.parametrize("share", [True, False])
def test_pair_logprobs_against_unpadded_rows(policy, share):
    rows, batch = random_pair_batch()
    found = dpo.in_chunks(dpo.pair_logprobs, policy, 2, *batch, lengths=batch[1].sum(1), share=share)
    expected = [[slow_logprob(policy, p, c), slow_logprob(policy, p, r)] for p, c, r in zip(*rows)]
    assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_pair_scores_against_sequence_scores(critic, share):
    (prompts, *sides), batch = random_pair_batch()
    found = reward_model.pair_scores(critic, *batch, share=share)
    prompts = ppo.pad(prompts, "left", "cpu")
    expected = [ppo.sequence_scores(critic, *prompts, *ppo.pad(side, "right", "cpu")) for side in sides]
    assert_close(found, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_a_shared_prompt_gets_the_gradient_of_both_responses(policy):
    _, batch = random_pair_batch()
    weights = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    gradients = []
    for share in (True, False):
        policy.zero_grad()
        (dpo.pair_logprobs(policy, *batch, share=share) * weights).sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    assert max(gradient.abs().max() for gradient in gradients[1]) > 1
    for shared, plain in zip(*gradients):
        assert_close(shared, plain, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def runs(models):
    """Every run that the tests compare, made once: the first as its users start it, the others in this process."""

    def run(name, *flags, start=run_here):
        output = models.folder / f"dpo_{name}"
        command = ("--dataset", models.preference, "--sft-path", models.sft, *SHORT, "--output-dir", output)
        done = start("dpo.py", *command, "--run-name", f"dpo_{name}", *flags, cwd=models.folder)
        run_dir = models.folder / "runs" / f"dpo_{name}"
        result = json.loads((run_dir / "result.json").read_text())
        metrics = read_metrics(run_dir)
        return SimpleNamespace(dir=run_dir, output=output, stdout=done.stdout, metrics=metrics, result=result)

    return SimpleNamespace(
        first=run("first", start=run_script),
        again=run("again"),
        other_seed=run("other_seed", "--seed", 2),
        micro=run("micro", "--micro-batch-size", 7),
        frozen=run("frozen", "--learning-rate", 0, "--num-epochs", 2),
    )


def test_the_run_folder(runs):
    metrics = runs.first.metrics
    assert [line["update"] for line in metrics] == list(range(1, UPDATES + 1))
    assert all(set(line) >= TERMS | {"epoch", "grad_norm", "learning_rate"} for line in metrics)
    assert [line["update"] for line in metrics if "eval/loss" in line] == [3, UPDATES]
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert [line["learning_rate"] for line in metrics] == pytest.approx(
        [dpo.Args.learning_rate * x / 4 for x in (4, 3, 2, 1)]
    )
    assert set(runs.first.result) == {"before", "after"}
    last = {"epoch" if name == "epoch" else f"eval/{name}": x for name, x in runs.first.result["after"].items()}
    assert last.items() <= metrics[-1].items() and runs.first.result["before"]["epoch"] == 0
    saved = json.loads((runs.first.dir / "args.json").read_text())
    assert saved["batch_size"] == 64 and saved["beta"] == 0.05


def test_the_policy_starts_equal_to_the_reference(runs):
    for run in vars(runs).values():
        assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert run.metrics[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert run.metrics[0]["grad_norm"] > 0.01
        assert run.result["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert run.result["before"]["accuracy"] == 0.5 and run.result["before"]["margin"] == 0
    assert abs(runs.first.metrics[1]["loss"] - math.log(2)) > 1e-4


def test_a_policy_that_does_not_move_stays_at_log_2(runs):
    # every pair meets its own reference log-probs in each batch of both epochs, whatever it is padded to there
    assert len(runs.frozen.metrics) == 2 * UPDATES
    for line in runs.frozen.metrics:
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert [line["rewards/chosen"], line["rewards/rejected"]] == pytest.approx([0, 0], abs=1e-5)


def test_precomputed_reference_logprobs_equal_on_the_fly_ones(runs, models):
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (runs.first.output, models.sft))
    sums = dict.fromkeys(TERMS, 0.0)
    rows = read_rows(models.preference / "validation.jsonl")
    for row in rows:
        prompt = encode(tokenizer, [row["prompt"]], "prompts", 128)[0]
        pair = encode(tokenizer, [row["chosen"], row["rejected"]], "responses", 40)
        logprobs, ref_logprobs = ([slow_logprob(model, prompt, ids) for ids in pair] for model in (policy, reference))
        rewards = [0.05 * (ours - ref) for ours, ref in zip(logprobs, ref_logprobs)]
        sums["loss"] -= math.log(sigmoid(rewards[0] - rewards[1]))
        sums["accuracy"] += rewards[0] > rewards[1]
        sums["margin"] += rewards[0] - rewards[1]
        for name, values in (("rewards", rewards), ("logprobs", logprobs)):
            sums[f"{name}/chosen"] += values[0]
            sums[f"{name}/rejected"] += values[1]
    expected = {"epoch": 1.0} | {name: value / len(rows) for name, value in sums.items()}
    assert runs.first.result["after"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert abs(expected["margin"]) > 1e-3  # the policy has moved


def test_the_seed_fixes_everything(runs):
    assert runs.again.metrics == runs.first.metrics and runs.again.result == runs.first.result
    assert runs.other_seed.metrics[0] != runs.first.metrics[0]


def test_micro_batches_change_only_the_rounding(runs):
    for line, micro in zip(runs.first.metrics, runs.micro.metrics, strict=True):
        same = [name for name in line if not (name == "accuracy" and line["update"] == 1)]  # ties decided by rounding
        assert [micro[name] for name in same] == pytest.approx([line[name] for name in same], rel=1e-3, abs=1e-4)


def test_training_raises_the_margin_on_training_pairs(runs, models):
    assert runs.first.metrics[-1]["margin"] > runs.first.metrics[0]["margin"] + 1e-3
    assert runs.first.metrics[-1]["loss"] < math.log(2)


def test_what_it_prints_and_saves(runs, models):
    lines = runs.first.stdout.splitlines()
    (titles,) = (line for line in lines if set(line.split()[-len(TERMS) :]) == TERMS)
    for when in ("before", "after"):
        (cells,) = (line.split()[-len(TERMS) :] for line in lines if line.split()[:1] == [when])
        expected = [runs.first.result[when][name] for name in titles.split()[-len(TERMS) :]]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=6e-4)
    assert lines[-1].startswith(f"final model: {runs.first.output} ")
    saved = AutoTokenizer.from_pretrained(runs.first.output)
    assert saved.get_vocab() == AutoTokenizer.from_pretrained(models.sft).get_vocab()
