"""Dataset resets: where they start, how a response is put together, and that nothing is learned on the prefix."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import drpo

TEMPERATURE = 0.7


def draw(lengths, beta, seed=0):
    return drpo.sample_reset_len(np.asarray(lengths), beta, np.random.default_rng(seed))


# the draw
def test_beta_0_never_resets():
    assert (draw(np.arange(2, 40).repeat(50), 0.0) == 0).all()


def test_beta_1_always_resets_and_leaves_something_to_decide():
    lengths = np.arange(2, 40).repeat(50)
    kept = draw(lengths, 1.0)
    assert (kept >= 1).all() and (kept <= lengths - 1).all()


def test_a_response_without_inner_token_is_not_reset_into():
    assert (draw([0, 1] * 200, 1.0) == 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_the_share_of_resets_is_beta(beta):
    count = 10_000
    share = (draw(np.full(count, 6), beta) > 0).mean()
    assert abs(share - beta) < 4 * np.sqrt(beta * (1 - beta) / count)


@pytest.mark.parametrize("beta", [0.6, 1.0])
@pytest.mark.parametrize("length", [2, 3, 8, 32])
def test_the_kept_length_is_uniform(length, beta):
    kept = draw(np.full(10_000, length), beta, seed=length)
    kept = kept[kept > 0]
    counts = np.bincount(kept, minlength=length)
    assert len(counts) == length  # none beyond length - 1
    if length > 2:
        assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_the_draw_is_fixed_by_its_generator():
    lengths = np.full(100, 20)
    assert (draw(lengths, 0.5, seed=1) == draw(lengths, 0.5, seed=1)).all()
    assert (draw(lengths, 0.5, seed=1) != draw(lengths, 0.5, seed=2)).any()


# the response
def test_splice_keeps_the_prefix_and_appends_what_was_generated():
    generator = torch.Generator().manual_seed(0)
    offline = torch.randint(2, 500, (6, 5), generator=generator)
    generated = torch.randint(500, 1000, (6, 8), generator=generator)
    reset_len = torch.tensor([0, 1, 4, 2, 3, 0])
    response = drpo.splice_response(offline, generated, reset_len)
    for row, k in enumerate(reset_len.tolist()):
        assert response[row].tolist() == offline[row, :k].tolist() + generated[row, : 8 - k].tolist()


# what is learned
@pytest.fixture
def batch():
    """Prompt ids, mask, response ids, mask, and the action mask as drpo.py makes it; garbage where no action is."""
    generator = torch.Generator().manual_seed(1)
    prompt_ids = torch.randint(2, 1000, (5, 4), generator=generator)
    reset_len, length = torch.tensor([0, 1, 3, 5, 2]), torch.tensor([6, 2, 6, 6, 4])
    offline, generated = (torch.randint(2, 1000, (5, 6), generator=generator) for _ in range(2))
    column = torch.arange(6)
    generated[torch.arange(5), length - 1 - reset_len] = 0  # EOS
    response_ids = drpo.splice_response(offline, generated, reset_len)
    response_mask = drpo.mask_to_eos(response_ids, 0)
    action_mask = response_mask & (column >= reset_len.unsqueeze(1))
    assert response_mask.sum(1).equal(length) and action_mask.sum(1).equal(length - reset_len)
    return (prompt_ids, torch.ones_like(prompt_ids, dtype=torch.bool), response_ids, response_mask), action_mask


def noise(mask, seed, scale=1.0):
    return scale * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))


def with_garbage(x, mask):
    return torch.where(mask, x, noise(mask, 99, 1e3))


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def policy_gradient(policy, tensors, mask, advantages):
    policy.zero_grad()
    new_logprobs = drpo.token_logprobs(policy, *tensors, mask, TEMPERATURE)
    loss = drpo.policy_loss(new_logprobs, new_logprobs.detach(), advantages, 0.2)
    ((loss * mask).sum() / mask.sum()).backward()
    return gradient(policy)


def value_gradient(critic, tensors, mask, values, returns):
    critic.zero_grad()
    loss = drpo.value_loss(drpo.token_values(critic, *tensors), values, returns, 0.2)
    ((loss * mask).sum() / mask.sum()).backward()
    return gradient(critic)


def test_the_policy_learns_nothing_on_the_prefix(policy, batch):
    tensors, mask = batch
    advantages = noise(mask, 2)
    found = policy_gradient(policy, tensors, mask, advantages)
    assert found.norm() > 0
    assert policy_gradient(policy, tensors, mask, with_garbage(advantages, mask)).equal(found)
    only_garbage = with_garbage(torch.zeros_like(advantages), mask)
    assert (policy_gradient(policy, tensors, mask, only_garbage) == 0).all()
    # the same numbers do count once the prefix is taken for actions, so the two checks above can fail
    assert (policy_gradient(policy, tensors, tensors[3], only_garbage) != 0).any()


def test_the_critic_learns_nothing_on_the_prefix(critic, batch):
    tensors, mask = batch
    with torch.no_grad():
        values = drpo.token_values(critic, *tensors)
    returns = values + noise(mask, 3)
    found = value_gradient(critic, tensors, mask, values, returns)
    assert found.norm() > 0
    garbage = with_garbage(values, mask), with_garbage(returns, mask)
    assert value_gradient(critic, tensors, mask, *garbage).equal(found)
    only_garbage = with_garbage(values, mask)  # returns that are met exactly at the actions
    assert (value_gradient(critic, tensors, mask, values, only_garbage) == 0).all()
    assert (value_gradient(critic, tensors, tensors[3], values, only_garbage) != 0).any()


def test_rewards_advantages_and_whitening_ignore_the_prefix(batch):
    (_, _, _, response_mask), mask = batch
    kl, values, scores = noise(mask, 4), noise(mask, 5), torch.arange(5.0)

    def advantages_of(kl, values):
        rewards = drpo.make_rewards(kl, scores, mask, response_mask, 0.1)
        return rewards, drpo.compute_gae(rewards, values, mask, 1.0, 0.95)[0]

    rewards, advantages = advantages_of(kl, values)
    same_rewards, same_advantages = advantages_of(with_garbage(kl, mask), with_garbage(values, mask))
    assert same_rewards.equal(rewards) and same_advantages.equal(advantages)
    whitened = drpo.masked_whiten(with_garbage(advantages, mask), mask)
    assert whitened.equal(drpo.masked_whiten(advantages, mask))
    assert_close(whitened[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(whitened[mask].var(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)


@torch.no_grad()
def test_kl_and_entropy_are_those_of_the_actions(policy, batch):
    tensors, mask = batch
    ids = torch.cat([tensors[0], tensors[2]], dim=1)
    other = type(policy)(policy.config).double().eval()
    expected = []
    for model in (policy, other):
        alone = (model(ids).logits / TEMPERATURE).log_softmax(-1)[:, 3:-1]  # no left padding in this batch
        expected.append(alone.gather(2, tensors[2].unsqueeze(2)).squeeze(2).float()[mask])
    logprobs, ref_logprobs = (drpo.token_logprobs(m, *tensors, mask, TEMPERATURE) for m in (policy, other))
    kl = logprobs - ref_logprobs
    assert (kl[~mask] == 0).all()
    assert_close(kl.sum(), (expected[0] - expected[1]).sum(), atol=1e-4, rtol=1e-5)
    assert_close(-logprobs.sum() / mask.sum(), -expected[0].mean(), atol=1e-5, rtol=1e-5)
