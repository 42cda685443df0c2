"""dpo_ln.py: mean log-probs against plain Python, the loss, its limits. Its update: test_updates.py; a run: test_plain.py."""

import math
import random

import pytest
import torch
from test_dpo import random_pair_batch, sigmoid, slow_logprob
from torch.testing import assert_close

import dpo
import dpo_ln


def mean_logprobs(policy, batch, share=True, size=2):
    return dpo_ln.in_chunks(dpo_ln.pair_mean_logprobs, policy, size, *batch, lengths=batch[1].sum(1), share=share)


@pytest.mark.parametrize("share", [True, False])
def test_log_probs_are_those_of_unpadded_rows_over_their_lengths(policy, share):
    rows, batch = random_pair_batch()
    expected = [[slow_logprob(policy, p, ids) / len(ids) for ids in pair] for p, *pair in zip(*rows)]
    assert len({len(ids) for _, *pair in zip(*rows) for ids in pair}) > 3
    assert_close(mean_logprobs(policy, batch, share).double(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-5)


def test_the_loss_divides_each_log_ratio_by_its_own_length(policy):
    rows, batch = random_pair_batch()
    found, rng, beta = mean_logprobs(policy, batch), random.Random(6), 2.5
    reference = [[rng.uniform(-60, -1), rng.uniform(-60, -1)] for _ in found]  # log-probs of whole responses
    ref_means = torch.tensor(
        [[x / len(ids) for x, ids in zip(ref, pair)] for ref, (_, *pair) in zip(reference, zip(*rows))]
    )
    terms = dpo_ln.pair_terms(found, ref_means, beta)
    for n, (prompt, chosen, rejected) in enumerate(zip(*rows)):
        won = beta / len(chosen) * (slow_logprob(policy, prompt, chosen) - reference[n][0])
        lost = beta / len(rejected) * (slow_logprob(policy, prompt, rejected) - reference[n][1])
        assert terms["loss"][n].item() == pytest.approx(-math.log(sigmoid(won - lost)), rel=1e-4)
        assert terms["margin"][n].item() == pytest.approx(won - lost, rel=1e-4)


def test_with_equal_lengths_it_is_dpo_with_beta_over_the_length(policy):
    length, beta, rng = 6, 3.0, random.Random(7)
    prompts = [[rng.randrange(2, 1024) for _ in range(4)] for _ in range(3)]
    pairs = dpo.pad([[rng.randrange(2, 1024) for _ in range(length)] for _ in range(6)], "right", "cpu")
    batch = (*dpo.pad(prompts, "left", "cpu"), *(x.unflatten(0, (-1, 2)) for x in pairs))
    ref_logprobs, gradients, losses = -torch.arange(6.0).view(3, 2) - 40, [], []
    for script, scale, read in ((dpo_ln, length, dpo_ln.pair_mean_logprobs), (dpo, 1, dpo.pair_logprobs)):
        policy.zero_grad()
        loss = script.pair_terms(read(policy, *batch, share=True), ref_logprobs / scale, beta / length * scale)["loss"]
        loss.sum().backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[0].norm() > 1e-2
    assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_length_alone_decides_nothing(policy):
    """Every token of the longer response gained as much as every token of the shorter one: DPO prefers the longer."""
    _, batch = random_pair_batch()
    means, lengths = mean_logprobs(policy, batch), batch[3].sum(2)
    ref_means = means - 0.1
    assert_close(dpo_ln.pair_terms(means, ref_means, 1.0)["margin"], torch.zeros(5), rtol=0, atol=1e-5)
    margins = dpo.pair_terms(means * lengths, ref_means * lengths, 1.0)["margin"]
    assert_close(margins, 0.1 * (lengths[:, 0] - lengths[:, 1]).float(), rtol=1e-4, atol=1e-4)
    assert (margins > 0.05).all()
