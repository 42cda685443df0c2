"""Each formula of the scripts against a slow version of its definition."""

import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import ppo
import reward_model
from plumbing.logits import selected_logprobs

TEMPERATURE = 0.7


@pytest.fixture(params=["rotary", "absolute"])
def policy(request, policy):
    """The tiny GPT-NeoX, and a GPT-2: only the latter notices positions that are off by the padding."""
    if request.param == "rotary":
        return policy
    torch.manual_seed(2)
    size = {"vocab_size": 1024, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).double().eval()


def random_rows(count, longest, rng):
    """Lists of token ids of different lengths; 0 (EOS) and 1 (PAD) are left out, so that only the mask tells."""
    return [[rng.randrange(2, 1024) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.fixture
def batch():
    """Prompts and responses as lists, and the same padded: prompt ids, mask, response ids, mask."""
    rng = random.Random(3)
    prompts, responses = random_rows(6, 9, rng), random_rows(6, 7, rng)
    return prompts, responses, (*ppo.pad(prompts, "left", "cpu"), *ppo.pad(responses, "right", "cpu"))


def contiguous_mask(rows, columns, rng):
    """Each row True from a random first to a random last column, at least one entry."""
    ends = [sorted(rng.sample(range(columns + 1), 2)) for _ in range(rows)]
    return torch.tensor([[first <= t < last for t in range(columns)] for first, last in ends])


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# rewards, advantages, losses
@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma, gae_lambda):
    mask = contiguous_mask(12, 9, random.Random(0))
    rewards, values = randn(12, 9, seed=1) * mask, randn(12, 9, seed=2)
    advantages, returns = ppo.compute_gae(rewards, values, mask, gamma, gae_lambda)
    for row in range(12):
        actions = mask[row].nonzero().flatten().tolist()
        r, v = rewards[row].tolist(), values[row].tolist()
        # the episode ends after the last action: nothing is bootstrapped
        delta = {t: r[t] + gamma * (v[t + 1] if t + 1 in actions else 0.0) - v[t] for t in actions}
        for t in range(9):
            expected = sum((gamma * gae_lambda) ** (s - t) * delta[s] for s in actions if s >= t) if t in actions else 0
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            if t in actions:
                assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)


def test_whitening_is_that_of_the_selected_entries():
    mask, x = contiguous_mask(5, 8, random.Random(1)), 3 + 2 * randn(5, 8, seed=3)
    whitened = ppo.masked_whiten(x, mask)
    chosen = np.concatenate([x[row][mask[row]].numpy() for row in range(5)])
    expected = (chosen - chosen.mean()) / np.sqrt(chosen.var() + 1e-8)
    start = 0
    for row in range(5):
        count = int(mask[row].sum())
        assert_close(whitened[row][mask[row]], torch.from_numpy(expected[start : start + count]))
        start += count
    assert (whitened[~mask] == 0).all()


def test_rewards_are_the_penalty_plus_the_score_at_the_end():
    rng = random.Random(2)
    response_mask = torch.tensor([[t < length for t in range(7)] for length in (7, 1, 4, 5)])
    action_mask = response_mask & torch.tensor([[t >= first for t in range(7)] for first in (0, 0, 3, 2)])
    kl, scores = randn(4, 7, seed=4), randn(4, seed=5)
    kl_coef = rng.random()
    rewards = ppo.make_rewards(kl, scores, action_mask, response_mask, kl_coef)
    for row in range(4):
        last = max(t for t in range(7) if response_mask[row, t])
        for t in range(7):
            expected = -kl_coef * kl[row, t].item() if action_mask[row, t] else 0.0
            expected += scores[row].item() if t == last else 0.0
            assert rewards[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_policy_loss_against_scalars():
    new, old, advantages = (randn(200, seed=seed) for seed in (6, 7, 8))
    loss = ppo.policy_loss(new, old, advantages, 0.2)
    for i in range(200):
        ratio, a = math.exp(new[i].item() - old[i].item()), advantages[i].item()
        clipped = min(max(ratio, 0.8), 1.2)
        assert loss[i].item() == pytest.approx(-min(ratio * a, clipped * a), abs=1e-12)


def test_policy_gradient_at_the_rollout_policy_is_that_of_reinforce():
    advantages, logprobs = randn(50, seed=9), randn(50, seed=10)
    new = logprobs.clone().requires_grad_()
    ppo.policy_loss(new, logprobs, advantages, 0.2).sum().backward()
    assert_close(new.grad, -advantages)


def test_value_loss_against_scalars():
    new, old, returns = (randn(200, seed=seed) for seed in (11, 12, 13))
    loss = ppo.value_loss(new, old, returns, 0.3)
    for i in range(200):
        v, v_old, target = new[i].item(), old[i].item(), returns[i].item()
        clipped = v_old + 0.3 if v > v_old + 0.3 else v_old - 0.3 if v < v_old - 0.3 else v
        assert loss[i].item() == pytest.approx(max((v - target) ** 2, (clipped - target) ** 2) / 2, abs=1e-12)


def test_preference_loss_against_scalars():
    chosen, rejected = 5 * randn(100, seed=14), 5 * randn(100, seed=15)
    loss = reward_model.preference_loss(chosen, rejected)
    for i in range(100):
        preferred = 1 / (1 + math.exp(rejected[i].item() - chosen[i].item()))
        assert loss[i].item() == pytest.approx(-math.log(preferred), abs=1e-9)


# log-probs, values, scores: a padded batch against every row alone
@torch.no_grad()
def test_logprobs_of_a_batch_are_those_of_single_rows(policy, batch):
    prompts, responses, tensors = batch
    action_mask = tensors[3] & (torch.rand(tensors[3].shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    logprobs = ppo.token_logprobs(policy, *tensors, action_mask, TEMPERATURE)
    assert action_mask.any() and not action_mask.equal(tensors[3])
    assert (logprobs[~action_mask] == 0).all()
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = (policy(torch.tensor([prompt + response])).logits[0] / TEMPERATURE).log_softmax(-1)
        for t, token in enumerate(response):
            if action_mask[row, t]:
                assert logprobs[row, t].item() == pytest.approx(alone[len(prompt) + t - 1, token].item(), abs=1e-5)


@torch.no_grad()
def test_values_of_a_batch_are_those_of_single_rows(critic, batch):
    prompts, responses, tensors = batch
    values = ppo.token_values(critic, *tensors)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = critic.score(critic.base_model(torch.tensor([prompt + response])).last_hidden_state[0]).flatten()
        expected = alone[len(prompt) - 1 : -1] - critic.config.score_mean  # read before the token is emitted
        assert_close(values[row, : len(response)], expected.float(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_scores_of_a_batch_are_those_of_single_rows(critic, batch):
    prompts, responses, tensors = batch
    scores = ppo.sequence_scores(critic, *tensors)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        alone = critic.score(critic.base_model(torch.tensor([prompt + response])).last_hidden_state[0, -1])
        assert scores[row].item() == pytest.approx(alone.item() - critic.config.score_mean, abs=1e-5)


@torch.no_grad()
def test_scores_are_what_transformers_itself_returns(critic, batch):
    prompts, responses, tensors = batch
    scores = ppo.sequence_scores(critic, *tensors)
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    ids, mask = ppo.pad(rows, "right", "cpu")
    ids = ids.masked_fill(~mask, critic.config.pad_token_id)  # by which the class finds the last token
    logits = critic(input_ids=ids, attention_mask=mask).logits.squeeze(1)
    assert_close(scores, (logits - critic.config.score_mean).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [0, 1, 64, 600])  # without gradients, 256 rows at a time
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_selected_logprobs_against_log_softmax(n, dtype, near):
    hidden, tokens, weights = randn(n, 40, seed=18).float(), torch.arange(n) % 40, randn(n, seed=19).float()

    def head(hidden):
        return 2 * hidden.to(dtype)

    def plain(head, hidden, tokens, temperature):
        return (head(hidden).float() / temperature).log_softmax(-1)[torch.arange(n), tokens]

    found = []
    for function in (selected_logprobs, plain):
        hidden.requires_grad_(True).grad = None
        logprobs = function(head, hidden, tokens, 0.7)
        (weights * logprobs).sum().backward()
        found.append((logprobs.detach(), hidden.grad))
    assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    assert_close(found[0][1], found[1][1], atol=near, rtol=near)
    assert n == 0 or found[0][1].abs().max() > 1e-3
    with torch.no_grad():
        assert selected_logprobs(head, hidden, tokens, 0.7).equal(found[0][0])


def test_gradients_of_micro_batches_add_up_to_the_batch_s(policy, batch):
    *_, tensors = batch
    mask = tensors[3]
    advantages, noise = randn(*mask.shape, seed=16), 0.3 * randn(*mask.shape, seed=17)
    with torch.no_grad():
        logprobs = ppo.token_logprobs(policy, *tensors, mask, TEMPERATURE) + noise

    def gradient(size):
        policy.zero_grad()
        for micro in torch.arange(6).split(size):
            new = ppo.token_logprobs(policy, *(x[micro] for x in tensors), mask[micro], TEMPERATURE)
            loss = ppo.policy_loss(new, logprobs[micro], advantages[micro], 0.2)
            ((loss * mask[micro]).sum() / mask.sum()).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    whole = gradient(6)
    assert whole.norm() > 0
    for size in (1, 4):
        assert_close(gradient(size), whole, atol=1e-6, rtol=1e-4)


# rollout
@torch.no_grad()
def slow_generate(model, context, uniforms, budget, eos):
    """One row, no padding, no cache: the first token whose cumulative probability exceeds the uniform number."""
    tokens = []
    while len(tokens) < budget and eos not in tokens:
        logits = model(torch.tensor([context + tokens])).logits[0, -1].float() / TEMPERATURE
        cdf = logits.softmax(-1).cumsum(-1)
        tokens.append(int((cdf > uniforms[len(tokens)] * cdf[-1]).nonzero()[0]))
    return tokens


@pytest.fixture
def rollout(policy):
    """Contexts, uniforms (B, R), budgets, an `eos` that really occurs, and a function that samples some of the rows."""
    rng = random.Random(4)
    contexts = random_rows(8, 9, rng)
    uniforms = torch.rand(8, 12, generator=torch.Generator().manual_seed(5))
    budgets = torch.tensor([12, 1, 5, 12, 12, 9, 12, 2])

    def sample(rows, eos, budgets=budgets, size=8):
        rows = list(rows)
        tensors = (*ppo.pad([contexts[row] for row in rows], "left", "cpu"), uniforms[rows], budgets[rows])
        chunks = partial(ppo.in_chunks, ppo.generate, policy, size, *tensors, lengths=tensors[1].sum(1))
        return chunks(eos=eos, temperature=TEMPERATURE)

    free = sample(range(8), eos=-1)
    return contexts, uniforms, budgets, free[3, 6].item(), sample


def test_generate_equals_the_slow_loop(policy, rollout):
    contexts, uniforms, budgets, eos, sample = rollout
    generated, early = sample(range(8), eos), 0
    for row in range(8):
        tokens = slow_generate(policy, contexts[row], uniforms[row], budgets[row], eos)
        early += len(tokens) < budgets[row]
        assert generated[row].tolist() == tokens + [0] * (12 - len(tokens))
    assert early  # the end of a row by EOS was part of the test


def test_a_row_does_not_depend_on_its_companions(rollout):
    *_, eos, sample = rollout
    together = sample(range(8), eos)
    assert sample(reversed(range(8)), eos).flip(0).equal(together)
    assert sample([5, 0, 3], eos).equal(together[[5, 0, 3]])
    for size in (1, 3):
        assert sample(range(8), eos, size=size).equal(together)


def test_the_budget_cuts_and_changes_nothing_before_it(rollout):
    *_, budgets, _, sample = rollout
    cut, full = sample(range(8), eos=-1), sample(range(8), eos=-1, budgets=torch.full((8,), 12))
    inside = torch.arange(12) < budgets.unsqueeze(1)
    assert cut[inside].equal(full[inside])
    assert (cut[~inside] == 0).all() and (full[~inside] != 0).any()


@torch.no_grad()
def test_sampling_frequencies_are_the_softmax(policy):
    count, context = 4000, [5, 17, 300]
    uniforms = torch.rand(count, 1, generator=torch.Generator().manual_seed(6))
    ids, mask = ppo.pad([context] * count, "left", "cpu")
    tokens = ppo.generate(policy, ids, mask, uniforms, torch.ones(count), eos=0, temperature=0.3).flatten()
    expected = count * (policy(torch.tensor([context])).logits[0, -1] / 0.3).softmax(-1).numpy()
    seen, common = np.bincount(tokens, minlength=len(expected)), expected >= 5
    assert common.sum() > 5
    # rare tokens share one bin, as the chi-square test wants at least five expected in each
    seen = [*seen[common], seen[~common].sum()]
    expected = np.array([*expected[common], expected[~common].sum()])
    assert stats.chisquare(seen, expected * count / expected.sum()).pvalue > 1e-3


@torch.no_grad()
def test_a_token_without_probability_is_never_sampled(policy):
    ids, mask = ppo.pad([[5, 17, 300]], "left", "cpu")
    probabilities = (policy(ids).logits[0, -1].float() / 0.001).softmax(-1)  # nearly all mass on one token
    assert probabilities[0] == 0  # which a uniform number of exactly 0 must step over
    token = ppo.generate(policy, ids, mask, torch.zeros(1, 1), torch.ones(1), eos=0, temperature=0.001)
    assert probabilities[token.item()] > 0


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([5, 6, 9, 0, 0], [1, 1, 1, 0, 0]),
        ([5, 6, 7, 8, 9], [1, 1, 1, 1, 1]),  # EOS in the last column
        ([5, 6, 7, 8, 5], [1, 1, 1, 1, 1]),  # no EOS
        ([9, 5, 9, 9, 5], [1, 0, 0, 0, 0]),  # the first one counts
    ],
)
def test_mask_to_eos(ids, expected):
    assert ppo.mask_to_eos(torch.tensor([ids]), 9).int().tolist() == [expected]
