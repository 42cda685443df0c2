"""rto.py: its formula, its limits, and that beta1 0 is ppo.py. A whole update in float64 is in test_updates.py."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics, run_here
from safetensors.torch import load_file
from test_formulas import contiguous_mask, randn

import rto

SHORT = ("--total-episodes", 48, "--batch-size", 16, "--minibatch-size", 8, "--num-ppo-epochs", 2, "--eval-every", 2)
SHORT += ("--eval-rows", 8)
WORDS = "def score(prompt, response, row):\n    return len(response.split())\n"


# the formula
@pytest.mark.parametrize("beta1, clip", [(0.05, 0.05), (0.3, 0.2), (1.0, 1e9), (2.0, 0.01)])
def test_token_rewards_are_clipped_log_ratios(beta1, clip):
    mask = contiguous_mask(12, 9, random.Random(0))
    dpo, ref = torch.rand(2, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))  # probabilities
    found = rto.dpo_rewards(dpo.log(), ref.log(), mask, beta1, clip)
    seen = set()
    for row in range(12):
        for t in range(9):
            exact = math.log((dpo[row, t].item() / ref[row, t].item()) ** beta1) if mask[row, t] else 0.0
            expected = clip if exact > clip else -clip if exact < -clip else exact
            assert found[row, t].item() == pytest.approx(expected, abs=1e-12)
            seen |= {(expected > 0, expected == exact)}
    assert seen >= ({(True, True), (False, True)} if clip > 1 else {(True, False), (False, False)})


def test_a_token_that_dpo_prefers_is_paid():
    found = rto.dpo_rewards(torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]]), torch.ones(1, 2).bool(), 0.1, 1)
    assert found.tolist() == [pytest.approx([0.1, -0.1])]


def test_what_is_no_action_earns_nothing():
    mask, dpo, ref = contiguous_mask(6, 5, random.Random(1)), randn(6, 5, seed=1), randn(6, 5, seed=2)
    garbage = torch.where(mask, dpo, 100.0)
    assert rto.dpo_rewards(garbage, ref, mask, 0.5, 9.0).equal(rto.dpo_rewards(dpo, ref, mask, 0.5, 9.0))
    assert not rto.dpo_rewards(garbage, ref, mask, 0.5, 9.0)[~mask].any()


def test_the_clip_is_after_the_weight():
    """Beyond clip / beta1 nats a token's reward grows no more; the official script's 0.05 and 0.05 make that one nat."""
    log_ratio = torch.tensor([[-3.0, -1.0, -0.5, 0.5, 1.0, 3.0]])
    found = rto.dpo_rewards(log_ratio, torch.zeros(1, 6), torch.ones(1, 6).bool(), 0.05, 0.05)
    assert found[0].tolist() == pytest.approx([-0.05, -0.05, -0.025, 0.025, 0.05, 0.05])


def test_a_dpo_policy_that_learned_nothing_or_weight_0_pays_nothing():
    mask, logprobs = torch.ones(3, 4).bool(), randn(3, 4, seed=3)
    assert not rto.dpo_rewards(logprobs, logprobs, mask, 0.5, 0.1).any()
    assert not rto.dpo_rewards(logprobs, randn(3, 4, seed=4), mask, 0.0, 0.1).any()


def test_unclipped_they_sum_to_dpos_reward_of_the_response():
    """beta * log(pi_dpo(y) / pi_ref(y)), which is the reward of the whole up to what the prompt alone decides."""
    mask, dpo, ref = contiguous_mask(6, 5, random.Random(2)), randn(6, 5, seed=5), randn(6, 5, seed=6)
    whole = [0.05 * (dpo[row][mask[row]].sum() - ref[row][mask[row]].sum()).item() for row in range(6)]
    assert rto.dpo_rewards(dpo, ref, mask, 0.05, 1e9).sum(1).tolist() == pytest.approx(whole)


# real runs
@pytest.fixture(scope="module")
def runs(models):
    """name -> its folder, metrics, result and weights; with the reward model, and with a rule in its place."""
    folder = models.folder / "rto"
    folder.mkdir()
    (folder / "rule.py").write_text(WORDS)
    dpo, rule = ("--dpo-path", models.dpo), ("--reward-path", "rule.py")
    commands = {
        "ppo": ("ppo.py",),
        "rto_0": ("rto.py", *dpo, "--beta1", 0),
        "rto": ("rto.py", *dpo, "--beta1", 0.5, "--token-reward-clip", 0.05),
        "ppo_rule": ("ppo.py", *rule),
        "rto_rule_0": ("rto.py", *dpo, *rule, "--beta1", 0),
        "rto_rule": ("rto.py", *dpo, *rule, "--beta1", 0.5, "--token-reward-clip", 0.05),
        "itself": ("rto.py", "--dpo-path", models.sft, "--beta1", 0.5),
    }
    found = {}
    for name, (script, *flags) in commands.items():
        run_here(script, *models.flags, *SHORT, *flags, "--run-name", name, "--output-dir", name, cwd=folder)
        found[name] = SimpleNamespace(
            metrics=read_metrics(folder / "runs" / name, start=0),
            result=json.loads((folder / f"runs/{name}/result.json").read_text()),
            weights=load_file(folder / name / "model.safetensors"),
        )
    return found


@pytest.mark.parametrize("ours, theirs", [("rto_0", "ppo"), ("rto_rule_0", "ppo_rule"), ("itself", "ppo")])
def test_beta1_0_is_ppo_number_for_number(ours, theirs, runs):
    """And so is the supervised policy in the place of the DPO policy: every log-ratio is 0."""
    ours, theirs = runs[ours], runs[theirs]
    assert len(theirs.metrics) == 4
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert {key: mine.get(key) for key in other} == other
        assert {mine[key] for key in mine.keys() - other.keys()} <= {0.0}  # what is new is 0
    assert ours.result == {"SFT": theirs.result["SFT"], "RTO": theirs.result["PPO"]}
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(x.equal(theirs.weights[name]) for name, x in ours.weights.items())


@pytest.mark.parametrize("ours, theirs", [("rto", "ppo"), ("rto_rule", "ppo_rule")])
def test_the_token_reward_is_added_and_logged(ours, theirs, runs):
    first, other = runs[ours].metrics[1], runs[theirs].metrics[1]
    assert first["objective/score"] == other["objective/score"]  # the same samples
    assert first["objective/token_reward"] != 0
    added = first["objective/reward"] - other["objective/reward"]
    assert added == pytest.approx(first["objective/token_reward"], abs=1e-5)
    assert runs[ours].metrics[2]["objective/score"] != runs[theirs].metrics[2]["objective/score"]
    for line in runs[ours].metrics[1:]:
        size = line["objective/token_reward_size"]
        assert abs(line["objective/token_reward"]) <= size <= 0.05 * line["response/length"] * (1 + 1e-6)
        parts = line["objective/score"] - 0.05 * line["objective/kl"] + line["objective/token_reward"]
        assert line["objective/reward"] == pytest.approx(parts, abs=1e-5)
