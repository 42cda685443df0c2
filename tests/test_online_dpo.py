"""online_dpo.py and xpo.py: their functions against plain Python, their limits, and short real runs on the small chain."""

import math
import random
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import read_metrics, read_rows, run_here
from safetensors.torch import load_file
from test_dpo import TERMS, random_pair_batch, slow_logprob
from torch.testing import assert_close

import online_dpo
import xpo

ROUNDS = ("--prompts-per-round", 16, "--samples-per-prompt", 3, "--updates-per-round", 2, "--batch-size", 16)
ROUNDS += ("--eval-every", 2, "--eval-rows", 8)


def run(script, name, models, folder, *flags, check=True):
    command = (*models.flags, *ROUNDS, *flags, "--run-name", name, "--output-dir", name)
    return run_here(script, *command, cwd=folder, check=check)


# pairs
def test_best_and_worst():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        m, n = rng.randint(1, 4), rng.randint(2, 5)
        groups = [[(rng.choice([-1.0, 0.5, 2.0]), [rng.randint(0, 1)]) for _ in range(n)] for _ in range(m)]
        expected = []
        for j, group in enumerate(groups):
            best = next(k for k in range(n) if all(group[k][0] >= score for score, _ in group))
            worst = next(k for k in range(n) if all(group[k][0] <= score for score, _ in group))
            reason = "alike" if group[best][0] == group[worst][0] else "kept"
            reason = "the same" if reason == "kept" and group[best][1] == group[worst][1] else reason
            expected += [(best * m + j, worst * m + j)] if reason == "kept" else []
            seen.add(reason)
        scores = torch.tensor([[group[k][0] for group in groups] for k in range(n)])
        answers = [group[k][1] for k in range(n) for group in groups]
        assert online_dpo.best_and_worst(scores, answers) == expected
    assert seen == {"alike", "the same", "kept"}


def test_sequence_logprobs_against_unpadded_rows(policy):
    rows, batch = random_pair_batch()
    found = online_dpo.in_chunks(online_dpo.sequence_logprobs, policy, 2, *batch, lengths=batch[1].sum(1))
    expected = [[slow_logprob(policy, p, c), slow_logprob(policy, p, r)] for p, c, r in zip(*rows)]
    assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-5)


RULE = "def score(prompt, response, row):\n    return float('landlord' in prompt) * len(response)\n"


def test_pairs_that_the_reward_does_not_order_are_dropped_and_counted(models, tmp_path):
    (tmp_path / "rule.py").write_text(RULE)
    flags = ("--total-episodes", 96, "--reward-path", "rule.py", "--missing-eos-score", 0)  # two rounds
    run("online_dpo.py", "run", models, tmp_path, *flags)
    [path] = (tmp_path / "runs/run").glob("checkpoint_00000004_*.pt")
    pairs = torch.load(path, weights_only=True)["state"]["pairs"]
    rows = read_rows(models.reference / "train.jsonl")
    picked = np.random.default_rng([1, 1, 0]).permutation(len(rows))[:32]
    told_apart = sum("landlord" in rows[i]["prompt"] for i in picked)
    last = read_metrics(tmp_path / "runs/run")[-1]
    assert (last["pairs"], last["dropped"], last["episodes"]) == (len(pairs), 32 - len(pairs), 96)
    assert 0 < len(pairs) <= told_apart < 32
    assert all(pair["chosen_ids"] != pair["rejected_ids"] for pair in pairs)


def test_a_reward_that_orders_nothing_changes_nothing_and_says_so(models, tmp_path):
    (tmp_path / "rule.py").write_text("def score(prompt, response, row):\n    return 1\n")
    flags = ("--total-episodes", 96, "--reward-path", "rule.py", "--missing-eos-score", 1)
    done = run("online_dpo.py", "run", models, tmp_path, *flags)
    for number in (1, 2):
        assert f"note: round {number}: the reward does not tell the answers to any of 16 prompts apart" in done.stdout
    for line in read_metrics(tmp_path / "runs/run"):
        assert (line["pairs"], line["margin"]) == (0, 0) and line["dropped"] == 16 * line["round"]
    weights, sft = (load_file(path / "model.safetensors") for path in (tmp_path / "run", models.sft))
    assert all(tensor.equal(sft[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("script", ["online_dpo.py", "rejection_sampling.py"])
def test_a_score_that_is_not_finite_ends_the_run(script, models, tmp_path):
    row = np.random.default_rng([1, 1, 0]).permutation(256)[1]  # of the first prompts
    prompt = read_rows(models.reference / "train.jsonl")[row]["prompt"]
    rule = f"def score(prompt, *_):\n    return float('inf') if prompt == {prompt!r} else 1\n"
    (tmp_path / "rule.py").write_text(rule)
    done = run_here(script, *models.flags, "--eval-rows", 4, "--reward-path", "rule.py", cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"update 1: not finite: scores; rows {row} of" in done.stderr


def test_exploration_goes_on_where_the_reward_orders_nothing(models, tmp_path):
    (tmp_path / "rule.py").write_text("def score(prompt, response, row):\n    return 1\n")
    flags = ("--total-episodes", 96, "--reward-path", "rule.py", "--missing-eos-score", 1, "--alpha", 0.1)
    run("xpo.py", "run", models, tmp_path, *flags)
    first, *_, last = read_metrics(tmp_path / "runs/run")
    assert (last["pairs"], last["margin"]) == (0, 0)  # what takes their place has no gradient: the term's is all
    assert first["loss"] == pytest.approx(0.1 * first["logprobs/second"], abs=1e-5)
    assert last["logprobs/second"] < first["logprobs/second"] and last["grad_norm"] > 0


# limits
@pytest.mark.slow
def test_offline_on_one_batch_is_dpo(models, tmp_path):
    sizes = ("--batch-size", 256, "--learning-rate", 1e-3, "--beta", 0.3, "--output-dir")
    flags = ("--dataset", models.preference, "--sft-path", models.sft, *sizes, "dpo", "--run-name", "dpo")
    run_here("dpo.py", *flags, cwd=tmp_path)
    more = ("--preference-dataset", models.preference, "--total-episodes", 0, "--updates-per-round", 1)
    run("online_dpo.py", "online", models, tmp_path, *more, *sizes, "online")
    [expected], [found] = (read_metrics(tmp_path / "runs" / name) for name in ("dpo", "online"))
    assert (found["round"], found["episodes"], found["pairs"], found["dropped"]) == (0, 0, 256, 0)
    for name in {*TERMS, "grad_norm", "learning_rate"} - {"accuracy"}:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    weights, others = (load_file(tmp_path / name / "model.safetensors") for name in ("dpo", "online"))
    assert weights.keys() == others.keys()
    apart = torch.cat([(others[name] - tensor).abs().flatten() for name, tensor in weights.items()])
    assert apart.mean() < 2e-5  # Adam's first step moves by up to 1e-3, also where the gradient is rounding alone


def test_xpo_with_alpha_0_is_online_dpo(models, tmp_path):
    found = []
    for script, flags in (("online_dpo.py", ()), ("xpo.py", ("--alpha", 0)), ("xpo.py", ("--alpha", 0.1))):
        name = f"run{len(found)}"
        run(script, name, models, tmp_path, "--total-episodes", 96, *flags)
        found.append((read_metrics(tmp_path / "runs" / name), load_file(tmp_path / name / "model.safetensors")))
    (metrics, weights), (same_metrics, same_weights), (other_metrics, _) = found
    assert same_metrics == metrics and len(metrics) == 4
    assert all(same_weights[name].equal(tensor) for name, tensor in weights.items())
    # both see the same first samples; then alpha counts
    assert other_metrics[0]["objective/score"] == metrics[0]["objective/score"]
    assert other_metrics[0]["loss"] == pytest.approx(metrics[0]["loss"] + 0.1 * other_metrics[0]["logprobs/second"])
    assert other_metrics[-1]["objective/score"] != metrics[-1]["objective/score"]


def test_alpha_falls_as_in_the_paper(models, tmp_path):
    flags = ("--total-episodes", 200, "--updates-per-round", 1, "--learning-rate", 0, "--alpha", 0.1)  # four rounds
    assert "the last 8 of 200" in run("xpo.py", "run", models, tmp_path, *flags).stdout
    first, second, *others = read_metrics(tmp_path / "runs/run")  # the policy stays the reference: DPO's loss is log 2
    for line, alpha in ((first, 0.1), (second, 0.05)):
        assert line["loss"] == pytest.approx(math.log(2) + alpha * line["logprobs/second"], abs=1e-5)
    for line in others:
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-5) and "logprobs/second" not in line
    assert len(others) == 2
    assert (xpo.Args.alpha, xpo.Args.alpha_rounds) == (1e-5, 2)


@pytest.mark.slow
def test_a_resumed_run_may_grow_by_rounds(models, tmp_path):
    run("xpo.py", "run", models, tmp_path, "--total-episodes", 48)
    run_here("xpo.py", "--resume", "run", "--total-episodes", 96, cwd=tmp_path)
    metrics = read_metrics(tmp_path / "runs/run")
    assert [line["round"] for line in metrics] == [1, 1, 2, 2] and metrics[-1]["episodes"] == 96
    [path] = (tmp_path / "runs/run").glob("checkpoint_00000004_*.pt")
    assert len(torch.load(path, weights_only=True)["state"]["d_opt"]) == 32  # of every prompt, in a pair or not


# exploration
def rounds_until_found(alpha, seed, most=25, prompts=4, reference=0.002):
    """Two arms, of which pi_ref draws the good one with a tiny probability: rounds until it is drawn, at least `most` if never."""
    rng, ref_logits = np.random.default_rng(seed), torch.tensor([math.log(reference), math.log(1 - reference)])
    logits = ref_logits.clone().requires_grad_()
    optimizer, pairs, second = torch.optim.Adam([logits], lr=0.2), [], []
    for number in range(1, most):
        probability = logits.detach().softmax(0)[0].item()
        arms = (rng.random((2, prompts)) >= probability).astype(int)  # 0 is the good one
        answers = [[arm] for arm in arms.ravel().tolist()]
        pairs += xpo.best_and_worst(1.0 - torch.from_numpy(arms).double(), answers)
        if 0 in arms:
            assert pairs or not arms.any(0).any()
            return number
        second += arms[1].tolist()
        for _ in range(10 * (alpha != 0)):  # without a pair DPO has no gradient, and what is left is the term
            loss = xpo.xpo_loss(torch.zeros(1), logits.log_softmax(0)[second], alpha).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return most


def test_the_term_explores_and_with_the_other_sign_it_does_not():
    found = {alpha: mean(rounds_until_found(alpha, seed) for seed in range(10)) for alpha in (0.05, 0, -0.05)}
    assert found[0.05] < 0.5 * found[0] and found[0] < found[-0.05] == 25


def test_after_the_discovery_alpha_0_makes_the_good_arm_likely():
    """What XPO is for: the pair that exploration found is all that DPO needs."""
    ref_logprobs = torch.tensor([0.002, 0.998]).log()
    logits = ref_logprobs.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for _ in range(200):
        logprobs = logits.log_softmax(0)
        optimizer.zero_grad()
        xpo.xpo_loss(xpo.dpo_loss(*logprobs, *ref_logprobs, beta=0.2), logprobs[1], 0.0).backward()
        optimizer.step()
    assert logits.softmax(0)[0] > 0.9


def test_the_gradient_of_the_term():
    dpo, second = torch.tensor([0.7, 0.2]), torch.tensor([-3.0, -30.0], requires_grad=True)
    losses = xpo.xpo_loss(dpo, second, 0.1)
    assert_close(losses, torch.tensor([0.7 - 0.3, 0.2 - 3.0]))
    losses.sum().backward()
    assert second.grad.tolist() == pytest.approx([0.1, 0.1])  # descent lowers the log-prob of what was said
