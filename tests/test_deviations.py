"""The diffs of benchmark/deviations/: small, and their updates are what slow loops in float64 make of the official rules."""

import math
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import test_updates
import torch
from conftest import ROOT, read_metrics
from test_updates import CAUSAL, ENDS, RL, SCALAR, SEED, floats, load, logprobs_of, score_of

start = test_updates.start  # the rows and random models there
ALONE = ["value_loss", "whitening", "after_eos", "whitened_rewards", "temperature"]
UPDATES, WIDTH, SIZE, DECAY = 2, RL["response_length"], RL["batch_size"], RL["gamma"] * RL["gae_lambda"]


@pytest.mark.parametrize("name", [*ALONE, "all"])
def test_small(name):
    lines = (ROOT / f"benchmark/deviations/{name}.diff").read_text().splitlines()[2:]
    assert 0 < sum(line.startswith(("+", "-")) for line in lines) <= (30 if name == "all" else 15)


def rollout(policy, row, uniforms, kept, temperature, after_eos):
    prompt, response = test_updates.prompt_of(row), test_updates.answer_of(row, "rejected")[:kept]
    while len(response) < WIDTH and (after_eos or not {*response} & {*ENDS}):
        with torch.no_grad():
            probs = (policy(torch.tensor([prompt + response])).logits[0, -1] / temperature).softmax(0)
        response.append(int((probs.cumsum(0) > uniforms[len(response)]).nonzero()[0]))
    read = min([t + 1 for t, token in enumerate(response) if token in ENDS], default=len(response))
    return SimpleNamespace(prompt=prompt, response=response, kept=kept, read=read, actions=range(kept, len(response)))


def values_of(critic, e):
    """Before each token of the response."""
    states = critic.base_model(torch.tensor([e.prompt + e.response])).last_hidden_state[0, len(e.prompt) - 1 : -1]
    return critic.score(states)[:, 0] - critic.config.score_mean


@torch.no_grad()
def judge(e, policy, ref_policy, critic, reward_model, temperature, rest):
    """Lists have a number for each token of the response, forced ones too."""
    e.ended = bool({*e.response[: WIDTH - 1 if rest else WIDTH]} & {*ENDS})
    e.score = score_of(reward_model, e.prompt + e.response[: e.read]).item() if e.ended else RL["missing_eos_score"]
    e.logprobs = floats(logprobs_of(policy, e.prompt, e.response, temperature))
    ref_logprobs = floats(logprobs_of(ref_policy, e.prompt, e.response, temperature))
    e.values = floats(values_of(critic, e))
    pairs = enumerate(zip(e.logprobs, ref_logprobs))
    e.kl = [x - y if t in e.actions or rest else 0.0 for t, (x, y) in pairs]
    e.rewards = [-RL["kl_coef"] * x for x in e.kl]
    e.rewards[e.read - 1] += e.score


def advantages_of(e):
    deltas = [r + RL["gamma"] * v1 - v0 for r, v1, v0 in zip(e.rewards, [*e.values[1:], 0.0], e.values)]
    return [sum(DECAY**s * delta for s, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def whiten(x, numbers):
    return (x - np.mean(numbers)) / math.sqrt(np.var(numbers) + 1e-8)


def means_of(episodes, policy, critic, temperature, forced_values):
    """The policy's terms are means over the actions; the value loss too, or over all tokens."""
    terms, losses, c = [], [], RL["clip_coef"]
    for e in episodes:
        new_logprobs, new_values = logprobs_of(policy, e.prompt, e.response, temperature), values_of(critic, e)
        for t in range(0 if forced_values else e.kept, len(e.response)):
            near = e.values[t] + (new_values[t] - e.values[t]).clamp(-c, c)
            losses.append(max((new_values[t] - e.returns[t]) ** 2, (near - e.returns[t]) ** 2) / 2)
        for t in e.actions:
            ratio, a = (new_logprobs[t] - e.logprobs[t]).exp(), e.whitened[t]
            term = {"loss/policy": -min(ratio * a, ratio.clamp(1 - c, 1 + c) * a)}
            term |= {"policy/approx_kl": ratio - 1 - ratio.log(), "policy/clipfrac": (abs(ratio - 1) > c).double()}
            terms.append(term | {"policy/ratio_error": abs(ratio - 1)})
    means = {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
    return means | {"loss/value": sum(losses) / len(losses)}


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ALONE), "all"])
def test_updates_of(name, start, tmp_path):
    (tmp_path / "drpo.py").write_bytes((ROOT / "drpo.py").read_bytes())
    subprocess.run(["git", "apply", ROOT / f"benchmark/deviations/{name}.diff"], cwd=tmp_path, check=True)
    new = {"beta": 0.6, "reset_column": "rejected", "reward_path": start.folder / "reward"}
    test_updates.run(tmp_path / "drpo.py", start, tmp_path, RL | new | {"total_episodes": UPDATES * SIZE})

    on = {*ALONE, "rest"} if name == "all" else {name}
    temperature = 0.7 if "temperature" in on else RL["temperature"]
    policy, ref_policy = (load(CAUSAL, start.folder / "sft") for _ in range(2))
    critic, reward_model = (load(SCALAR, start.folder / "reward") for _ in range(2))
    optimizer, seen = test_updates.AdamW(RL["max_grad_norm"], policy, critic), set()
    for update, found in enumerate(read_metrics(tmp_path / "runs/run"), start=1):
        uniforms = np.random.default_rng([SEED, test_updates.SAMPLING, update]).random((SIZE, WIDTH), dtype=np.float32)
        chances, places = np.random.default_rng([SEED, test_updates.RESETS, update]).random((2, SIZE))
        episodes = []
        for row, draws, chance, place in zip(
            test_updates.batch_of(start.rows, SIZE, update), uniforms, chances, places
        ):
            length = len(test_updates.answer_of(row, "rejected"))
            kept = 1 + math.floor(place * (length - 1)) if chance < new["beta"] else 0
            e = rollout(policy, row, draws, kept, temperature, "after_eos" in on)
            judge(e, policy, ref_policy, critic, reward_model, temperature, "rest" in on)
            seen |= {f"forced: {kept > 0}", f"ended: {e.ended}", f"behind EOS: {len(e.response) > e.read}"}
            seen |= {"EOS in the last column"} if e.response[e.read - 1] in ENDS and not e.ended else set()
            episodes.append(e)
        if "whitened_rewards" in on:
            where = [[t for t in range(len(e.rewards)) if t in e.actions or "rest" in on] for e in episodes]
            rewards = [e.rewards[t] for e, places in zip(episodes, where) for t in places]
            for e, places in zip(episodes, where):
                for t in places:
                    e.rewards[t] = whiten(e.rewards[t], rewards) + np.mean(rewards)
        for e in episodes:
            e.advantages = advantages_of(e)
            e.returns = [a + v for a, v in zip(e.advantages, e.values)]
        numbers = [e.advantages[t] for e in episodes for t in e.actions]
        if "whitening" in on:
            numbers = [a for e in episodes for a in [*e.advantages, *[0.0] * (WIDTH - len(e.response))]]
        for e in episodes:
            e.whitened = [whiten(a, numbers) for a in e.advantages]
        learning_rate = RL["learning_rate"] * (UPDATES + 1 - update) / UPDATES
        stats, rng = [], np.random.default_rng([SEED, test_updates.MINIBATCHES, update])
        for _ in range(RL["num_ppo_epochs"]):
            for minibatch in rng.permutation(SIZE).reshape(-1, RL["minibatch_size"]):
                part = [episodes[i] for i in minibatch]
                means = means_of(part, policy, critic, temperature, "value_loss" in on)
                before = [p.data.clone() for p in optimizer.parameters]
                loss = means["loss/policy"] + RL["vf_coef"] * means["loss/value"]
                norm = optimizer.step(loss, learning_rate)
                for p, old in zip(optimizer.parameters, before):
                    p.data -= learning_rate * (0.01 if "rest" in on else 0) * old  # weight decay
                stats.append({key: x.item() for key, x in means.items()} | {"grad_norm": norm})
        expected = {
            "objective/score": np.mean([e.score for e in episodes]),
            "objective/kl": np.mean([sum(e.kl) for e in episodes]),
            "objective/reward": np.mean([sum(e.rewards) for e in episodes]),
            "response/eos": np.mean([e.ended for e in episodes]),
            "response/length": np.mean([e.read for e in episodes]),
            "policy/entropy": -np.mean([e.logprobs[t] for e in episodes for t in e.actions]),
        }
        for key, x in (expected | {key: np.mean([line[key] for line in stats]) for key in stats[0]}).items():
            assert found[key] == pytest.approx(x, rel=5e-5, abs=5e-6), (update, key)
    assert update == UPDATES
    test_updates.assert_all_close(load(CAUSAL, tmp_path / "out").state_dict(), policy.state_dict())
    assert seen >= {"forced: True", "forced: False", "ended: True", f"behind EOS: {'after_eos' in on}"}, seen
    assert name != "all" or "EOS in the last column" in seen, seen
