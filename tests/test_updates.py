"""Whole updates of every training script, computed a second time in float64 by slow loops that share no code with it.

From the same weights, rows and flags, and from the random numbers that seed, stream and update fix, the loops find each
number of metrics.jsonl but times and evaluations, and the weights at the end: one row at a time, no padding, a forward
pass for every token, sums as the papers write them. Learning rates are so large that whatever can be clipped is.
"""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_metrics, read_rows, run_here
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

CAUSAL, SCALAR = AutoModelForCausalLM, AutoModelForSequenceClassification
WORDS = [*"abcdefghijklmnop", ".", "<end>"]  # id 0, with which tensors are padded, is a word like any other
ENDS = (16, 17)  # the policy may end with "." too, says its generation_config
DATA, SAMPLING, MINIBATCHES, RESETS = 1, 2, 3, 4  # streams of random numbers
SEED, ROWS, UPDATES = 3, 10, 3
SHARED = {"seed": SEED, "prompt_length": 7, "response_length": 8, "micro_batch_size": 3, "learning_rate": 0.01}
# 20 rows: three batches, the second from both epochs, and 2 left over
PAIRS = SHARED | {"num_epochs": 2, "batch_size": 6, "max_grad_norm": 2.5}
RL = SHARED | {"total_episodes": 26, "batch_size": 8, "minibatch_size": 4, "num_ppo_epochs": 2, "eval_rows": 2}
RL |= {"gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.3, "vf_coef": 0.5, "clip_coef": 0.1, "max_grad_norm": 1.5}
RL |= {"temperature": 0.8, "missing_eos_score": -1.5}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with the rows, a policy and a reward model, of random weights; its rows."""
    folder, rng = tmp_path_factory.mktemp("start"), random.Random(0)

    def text(longest):
        return " ".join(rng.choice(WORDS[:16]) for _ in range(rng.randint(1, longest)))

    (folder / "rows").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"prompt": text(9), "chosen": text(7), "rejected": text(7)} for _ in range(ROWS)]
        (folder / f"rows/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = Tokenizer(WordLevel({word: id for id, word in enumerate(WORDS)}))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    sizes = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, initializer_range=0.3, bos_token_id=None, eos_token_id=17, pad_token_id=None)
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(config)
    policy.generation_config = GenerationConfig(eos_token_id=list(ENDS))
    config.num_labels, config.score_mean = 1, 0.4  # the policy's config has it too, as if it came from a reward model
    models = {"sft": policy, "reward": GPT2ForSequenceClassification(config), "dpo": GPT2LMHeadModel(config)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return SimpleNamespace(folder=folder, rows=read_rows(folder / "rows/train.jsonl"))


def run(script, start, folder, flags, *more):
    """The real script, in an empty folder."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    path = "--base-model" if script == "sft.py" else "--sft-path"
    words += [path, start.folder / "sft", "--dataset", start.folder / "rows", "--output-dir", "out"]
    run_here(script, *words, *more, "--run-name", "run", cwd=folder)


# what all of them need, slowly
def prompt_of(row):
    return [WORDS.index(word) for word in row["prompt"].split()][-SHARED["prompt_length"] :]


def answer_of(row, column):
    return [WORDS.index(word) for word in [*row[column].split(), "<end>"]]


def batch_of(rows, size, update):
    """The rows of an update: every epoch shuffles them anew, and a batch may begin in one and end in the next."""
    order = [i for epoch in range(UPDATES) for i in np.random.default_rng([SEED, DATA, epoch]).permutation(len(rows))]
    return [rows[i] for i in order[(update - 1) * size : update * size]]


def load(auto_class, path, **config):
    return auto_class.from_pretrained(path, dtype=torch.float64, attn_implementation="eager", **config).eval()


def logprobs_of(model, context, tokens, temperature=1.0):
    """Log-prob of each token, a list of tensors."""
    logits = model(torch.tensor([context + tokens])).logits[0] / temperature
    return [logits[len(context) + t - 1].log_softmax(0)[token] for t, token in enumerate(tokens)]


def score_of(model, ids):
    """What transformers itself reads at the last token, centred."""
    return model(torch.tensor([ids])).logits[0, 0] - getattr(model.config, "score_mean", 0)


def floats(tensors):
    return [x.item() for x in tensors]


def decayed(update, updates=UPDATES):
    return SHARED["learning_rate"] * (updates + 1 - update) / updates


class AdamW:
    """Adam (arXiv:1412.6980, Algorithm 1), without weight decay; the gradient is scaled down to `limit`."""

    def __init__(self, limit, *models, betas=(0.9, 0.999)):
        self.parameters = [p for model in models for p in model.parameters()]
        self.first, self.second = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.limit, self.betas, self.norms = limit, betas, []

    def step(self, loss, learning_rate):
        """-> the norm, before it is scaled down"""
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
        self.norms.append(norm)
        corrections = [1 - beta ** len(self.norms) for beta in self.betas]
        for p, g, m, v in zip(self.parameters, gradients, self.first, self.second):
            g = g * self.limit / norm if norm > self.limit else g
            m.copy_(self.betas[0] * m + (1 - self.betas[0]) * g)
            v.copy_(self.betas[1] * v + (1 - self.betas[1]) * g**2)
            p.data -= learning_rate * (m / corrections[0]) / ((v / corrections[1]).sqrt() + 1e-5)
        return norm


def check(folder, expected, optimizer, updates=UPDATES, **models):
    """metrics.jsonl, and the weights of the last checkpoint and of what was saved, which is the first model."""
    found = read_metrics(folder / "runs/run")
    assert len(found) == updates == len(expected)
    for ours, theirs in zip(expected, found):
        theirs = {name: x for name, x in theirs.items() if not name.startswith("eval/")}
        assert theirs.keys() == ours.keys()
        for name, x in ours.items():
            assert theirs[name] == pytest.approx(x, rel=5e-5, abs=5e-6), (ours["update"], name)
    [file] = (folder / "runs/run").glob(f"checkpoint_{updates:08d}_*.pt")
    weights = {f"{kind}.{name}": p for kind, model in models.items() for name, p in model.named_parameters()}
    assert_all_close(torch.load(file, weights_only=True)["parameters"], weights)
    model = [*models.values()][0]
    assert_all_close(load(type(model), folder / "out").state_dict(), model.state_dict())
    assert max(optimizer.norms) > 1.1 * optimizer.limit and min(optimizer.norms) < 0.9 * optimizer.limit


def assert_all_close(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():  # note: keys' biases cancel in the softmax, what moves them is rounding alone
        assert_close(found[name].double(), x.data, rtol=0, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")


# PPO, DR-PO, RTO
def sample(policy, row, uniforms, kept, temperature):
    """Prompt, response, and how much of the response is the dataset's; token t is the inverse CDF at uniforms[t]."""
    prompt, response = prompt_of(row), answer_of(row, "rejected")[:kept]
    while len(response) < len(uniforms) and not (response and response[-1] in ENDS):
        with torch.no_grad():
            probs = (policy(torch.tensor([prompt + response])).logits[0, -1] / temperature).softmax(0)
        response.append(int((probs.cumsum(0) > uniforms[len(response)]).nonzero()[0]))
    return SimpleNamespace(prompt=prompt, response=response, kept=kept)


@torch.no_grad()
def judge(episode, policy, ref_policy, critic, reward_model, flags, dpo_policy=None):
    """Adds what the update needs, by the models as they are before it; lists have a number per action."""
    e = episode
    e.context, e.actions, e.ended = e.prompt + e.response[: e.kept], e.response[e.kept :], e.response[-1] in ENDS
    e.score = score_of(reward_model, e.prompt + e.response).item() if e.ended else flags.missing_eos_score
    e.logprobs = floats(logprobs_of(policy, e.context, e.actions, flags.temperature))
    ref_logprobs = floats(logprobs_of(ref_policy, e.context, e.actions, flags.temperature))
    e.values = floats(score_of(critic, e.context + e.actions[:t]) for t in range(len(e.actions)))
    e.kl = [x - y for x, y in zip(e.logprobs, ref_logprobs)]
    e.rewards = [-flags.kl_coef * x for x in e.kl]
    e.rewards[-1] += e.score
    if dpo_policy:  # RTO
        dpo_logprobs = floats(logprobs_of(dpo_policy, e.context, e.actions, flags.temperature))
        wanted, most = [flags.beta1 * (x - y) for x, y in zip(dpo_logprobs, ref_logprobs)], flags.token_reward_clip
        e.token_rewards = [min(max(x, -most), most) for x in wanted]
        e.rewards = [r + x for r, x in zip(e.rewards, e.token_rewards)]
    after, decay = [*e.values[1:], 0.0], flags.gamma * flags.gae_lambda
    deltas = [r + flags.gamma * v1 - v0 for r, v1, v0 in zip(e.rewards, after, e.values)]
    e.advantages = [sum(decay**s * delta for s, delta in enumerate(deltas[t:])) for t in range(len(deltas))]
    e.returns = [a + v for a, v in zip(e.advantages, e.values)]


def minibatch_terms(episodes, policy, critic, flags, seen):
    """Means over all actions of these episodes."""
    terms, c = [], flags.clip_coef
    for e in episodes:
        new_logprobs = logprobs_of(policy, e.context, e.actions, flags.temperature)
        for t, new in enumerate(new_logprobs):
            ratio, a = (new - e.logprobs[t]).exp(), e.whitened[t]
            gains = ratio * a, ratio.clamp(1 - c, 1 + c) * a
            value = score_of(critic, e.context + e.actions[:t])
            near = e.values[t] + (value - e.values[t]).clamp(-c, c)
            losses = (value - e.returns[t]) ** 2 / 2, (near - e.returns[t]) ** 2 / 2
            terms.append(
                {
                    "loss/policy": -min(gains),
                    "loss/value": max(losses),
                    "policy/approx_kl": ratio - 1 - ratio.log(),
                    "policy/clipfrac": (abs(ratio - 1) > c).double(),
                    "policy/ratio_error": abs(ratio - 1),
                }
            )
            seen |= {"ratio clipped"} if gains[1] < gains[0] else set()
            seen |= {"value clipped"} if losses[1] > losses[0] else set()
    return {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}


NEW = {"ppo.py": {}, "drpo.py": {"beta": 0.6, "reset_column": "rejected"}}
NEW |= {"rto.py": {"beta1": 0.4, "token_reward_clip": 0.5}}


@pytest.mark.parametrize("script", NEW)
def test_rl(script, start, tmp_path):
    new, rto = NEW[script], script == "rto.py"
    paths = {"reward_path": start.folder / "reward"} | ({"dpo_path": start.folder / "dpo"} if rto else {})
    run(script, start, tmp_path, RL | new | paths)
    flags, size, beta = SimpleNamespace(**RL | new), RL["batch_size"], new.get("beta", 0)
    policy, ref_policy = (load(CAUSAL, start.folder / "sft") for _ in range(2))
    dpo_policy = load(CAUSAL, start.folder / "dpo") if rto else None
    critic, reward_model = (load(SCALAR, start.folder / "reward") for _ in range(2))
    optimizer, expected, seen = AdamW(flags.max_grad_norm, policy, critic), [], set()
    for update in range(1, UPDATES + 1):
        uniforms = np.random.default_rng([SEED, SAMPLING, update]).random((size, 8), dtype=np.float32)
        chances, places = np.random.default_rng([SEED, RESETS, update]).random((2, size))
        episodes = []
        for row, *draws, chance, place in zip(batch_of(start.rows, size, update), uniforms, chances, places):
            kept = 1 + math.floor(place * (len(answer_of(row, "rejected")) - 1)) if chance < beta else 0
            episodes.append(sample(policy, row, *draws, kept, flags.temperature))
            judge(episodes[-1], policy, ref_policy, critic, reward_model, flags, dpo_policy)
            seen |= {f"ended: {episodes[-1].ended}", f"reset: {kept > 0}"}
            seen |= {f"token reward {x / 0.5:.0f}" for x in (episodes[-1].token_rewards if rto else ())}
        advantages = [a for e in episodes for a in e.advantages]
        for e in episodes:
            e.whitened = [(a - np.mean(advantages)) / math.sqrt(np.var(advantages) + 1e-8) for a in e.advantages]
        stats, rng = [], np.random.default_rng([SEED, MINIBATCHES, update])
        for _ in range(flags.num_ppo_epochs):
            order = rng.permutation(size)
            for first in range(0, size, flags.minibatch_size):
                minibatch = [episodes[i] for i in order[first : first + flags.minibatch_size]]
                terms = minibatch_terms(minibatch, policy, critic, flags, seen)
                norm = optimizer.step(terms["loss/policy"] + flags.vf_coef * terms["loss/value"], decayed(update))
                stats.append({name: x.item() for name, x in terms.items()} | {"grad_norm": norm})
        metrics = {
            "update": update,
            "episodes": update * size,
            "learning_rate": decayed(update),
            "objective/score": np.mean([e.score for e in episodes]),
            "objective/kl": np.mean([sum(e.kl) for e in episodes]),
            "objective/reward": np.mean([sum(e.rewards) for e in episodes]),
            "response/eos": np.mean([e.ended for e in episodes]),
            "response/length": np.mean([len(e.response) for e in episodes]),
            "policy/entropy": -np.mean([x for e in episodes for x in e.logprobs]),
            "policy/first_ratio_error": 0,
        }
        resets = {"reset/fraction": [e.kept > 0 for e in episodes], "reset/length": [e.kept for e in episodes]}
        metrics |= {name: np.mean(x) for name, x in resets.items() if beta}
        for name, x in (
            {"objective/token_reward": lambda x: x, "objective/token_reward_size": abs}.items() if rto else ()
        ):
            metrics[name] = np.mean([sum(map(x, e.token_rewards)) for e in episodes])
        expected.append(metrics | {name: np.mean([line[name] for line in stats]) for name in stats[0]})
    check(tmp_path, expected, optimizer, policy=policy, critic=critic)
    assert not rto or seen >= {"token reward 1", "token reward -1", "token reward 0"}  # both ends, and between
    assert seen >= {
        "ratio clipped",
        "value clipped",
        "ended: True",
        "ended: False",
        "reset: False",
        f"reset: {beta > 0}",
    }


# online DPO and XPO
PER_ROUND, PROMPTS, PAIRS_STREAM = 2, 6, 3  # two rounds take more prompts than there are rows
ONLINE = SHARED | {"prompts_per_round": PROMPTS, "updates_per_round": PER_ROUND}
ONLINE |= {"batch_size": 6, "beta": 0.5, "max_grad_norm": 2.5, "eval_rows": 2}
ONLINE |= {"temperature": 1.2, "second_temperature": 0.7, "missing_eos_score": -1.5}
XPO = {"alpha": 0.4, "alpha_rounds": 4, "max_grad_norm": 12}


def answered(start, round, policy, second_model, reward_model, flags):
    """Prompt -> its answers in the order of the round, each with its score."""
    n = flags.samples_per_prompt
    uniforms = np.random.default_rng([SEED, SAMPLING, round]).random((n, PROMPTS, 8), dtype=np.float32)
    for j, row in enumerate(batch_of(start.rows, PROMPTS, round)):
        answers = []
        for k in range(n):
            first = k < n / 2
            model, temperature = (policy, flags.temperature) if first else (second_model, flags.second_temperature)
            e = sample(model, row, uniforms[k, j], 0, temperature)
            with torch.no_grad():
                score = score_of(reward_model, e.prompt + e.response).item()
            e.ended = e.response[-1] in ENDS
            e.score = score if e.ended else flags.missing_eos_score
            answers.append(e)
        yield answers


@pytest.mark.parametrize(
    "script, n, new, more",
    [
        ("online_dpo.py", 4, {}, ()),
        ("online_dpo.py", 3, {"max_grad_norm": 5}, ("--preference-dataset", "rows")),
        ("xpo.py", 3, XPO | {"max_grad_norm": 12.8}, ()),
        ("xpo.py", 2, XPO, ("--preference-dataset", "rows", "--second-reference")),
    ],
    ids=["online", "hybrid", "xpo", "hybrid xpo, reference"],
)
def test_online_dpo_and_xpo(script, n, new, more, start, tmp_path):
    all_flags, hybrid = ONLINE | new | {"reward_path": start.folder / "reward"}, "--preference-dataset" in more
    all_flags |= {"samples_per_prompt": n, "total_episodes": (1 if hybrid else 2) * PROMPTS * n + 1}
    more = [start.folder / "rows" if flag == "rows" else flag for flag in more]
    run(script, start, tmp_path, all_flags, *more)
    flags, updates = SimpleNamespace(**{"alpha": 0, "alpha_rounds": 1} | all_flags), 2 * PER_ROUND
    policy, ref_policy = (load(CAUSAL, start.folder / "sft") for _ in range(2))
    second_model = ref_policy if "--second-reference" in more else policy
    reward_model = load(SCALAR, start.folder / "reward")
    optimizer, expected, pairs, second, seen = AdamW(flags.max_grad_norm, policy), [], [], [], {}
    if hybrid:
        pairs = [(prompt_of(row), answer_of(row, "chosen"), answer_of(row, "rejected")) for row in start.rows]
    sampled, dropped = {}, 0
    for update in range(1, updates + 1):
        round = (update - 1) // PER_ROUND + (not hybrid)
        if (update - 1) % PER_ROUND == 0 and round > 0:
            answers = list(answered(start, round, policy, second_model, reward_model, flags))
            for group in answers:
                best, worst = max(group, key=lambda e: e.score), min(group, key=lambda e: e.score)
                if best.score > worst.score and best.response != worst.response:
                    pairs.append((best.prompt, best.response, worst.response))
                else:
                    dropped += 1
                second.append(group[-1])
            flat = sum(answers, [])
            sampled = {"objective/score": [e.score for e in flat], "response/eos": [e.ended for e in flat]}
            sampled["response/length"] = [len(e.response) for e in flat]
            seen |= {f"ended: {e.ended}": True for e in flat}
        orders = [np.random.default_rng([SEED, PAIRS_STREAM, round, p]).permutation(len(pairs)) for p in range(12)]
        place = (update - 1) % PER_ROUND * 6
        losses, terms = [], []
        for i in np.concatenate(orders)[place : place + 6]:
            prompt, *sides = pairs[i]
            logprobs = [sum(logprobs_of(policy, prompt, side)) for side in sides]
            rewards = [
                flags.beta * (x - sum(logprobs_of(ref_policy, prompt, side)).item()) for x, side in zip(logprobs, sides)
            ]
            margin = rewards[0] - rewards[1]
            losses.append(-torch.log(1 / (1 + torch.exp(-margin))))
            terms.append([0.5 if margin == 0 else float(margin > 0), *floats([margin, *rewards, *logprobs])])
        names = ("accuracy", "margin", "rewards/chosen", "rewards/rejected", "logprobs/chosen", "logprobs/rejected")
        metrics = {"update": update, "round": round, "episodes": round * PROMPTS * n, "pairs": len(pairs)}
        metrics |= {"dropped": dropped, "learning_rate": decayed(update, updates)}
        metrics |= dict(zip(names, np.mean(terms, axis=0))) | {name: np.mean(x) for name, x in sampled.items()}
        loss = sum(losses) / 6
        if flags.alpha and round:
            drawn = np.random.default_rng([SEED, SAMPLING, round, update]).integers(len(second), size=6)
            said = sum(sum(logprobs_of(policy, second[k].prompt, second[k].response)) for k in drawn) / 6
            loss = loss + flags.alpha * (1 - (round - 1) / flags.alpha_rounds) * said
            metrics["logprobs/second"] = said.item()
        norm = optimizer.step(loss, decayed(update, updates))
        expected.append(metrics | {"loss": loss.item(), "grad_norm": norm})
    # both policies are the reference at first, margins are 0 up to rounding, and so is their sign
    expected[0]["accuracy"] = read_metrics(tmp_path / "runs/run")[0]["accuracy"]
    check(tmp_path, expected, optimizer, updates, policy=policy)
    assert seen.keys() == {"ended: True", "ended: False"}


# SFT, DPO, reward model
def epochs_seen(update):
    return update * PAIRS["batch_size"] / ROWS


@pytest.mark.parametrize("train_on_prompt", [True, False])
def test_sft(train_on_prompt, start, tmp_path):
    run("sft.py", start, tmp_path, PAIRS, f"--{'no-' * (not train_on_prompt)}train-on-prompt")
    policy = load(CAUSAL, start.folder / "sft")
    optimizer, expected = AdamW(PAIRS["max_grad_norm"], policy, betas=(0.9, 0.95)), []
    for update in range(1, UPDATES + 1):
        logprobs = []
        for row in batch_of(start.rows, PAIRS["batch_size"], update):
            ids, given = prompt_of(row) + answer_of(row, "chosen"), 1 if train_on_prompt else len(prompt_of(row))
            logprobs += logprobs_of(policy, ids[:given], ids[given:])
        loss = -sum(logprobs) / len(logprobs)
        metrics = {"update": update, "epoch": epochs_seen(update), "learning_rate": decayed(update)}
        metrics |= {"loss": loss.item(), "grad_norm": optimizer.step(loss, decayed(update))}
        expected.append(metrics)
    check(tmp_path, expected, optimizer, policy=policy)


@pytest.mark.parametrize("script, beta", [("dpo.py", 0.5), ("dpo_ln.py", 1.3)])
def test_dpo(script, beta, start, tmp_path):
    run(script, start, tmp_path, PAIRS | {"beta": beta})
    policy, ref_policy = (load(CAUSAL, start.folder / "sft") for _ in range(2))
    optimizer, expected = AdamW(PAIRS["max_grad_norm"], policy), []
    for update in range(1, UPDATES + 1):
        losses, pairs = [], []
        for row in batch_of(start.rows, PAIRS["batch_size"], update):
            answers = [(prompt_of(row), answer_of(row, column)) for column in ("chosen", "rejected")]
            sizes = [len(tokens) if script == "dpo_ln.py" else 1 for _, tokens in answers]
            logprobs, ref_logprobs = (
                [sum(logprobs_of(model, *answer)) / size for answer, size in zip(answers, sizes)]
                for model in (policy, ref_policy)
            )
            rewards = [beta * (x - y.item()) for x, y in zip(logprobs, ref_logprobs)]
            margin = rewards[0] - rewards[1]
            losses.append(-torch.log(1 / (1 + torch.exp(-margin))))
            right = 0.5 if margin == 0 else float(margin > 0)
            pairs.append([right, *floats([margin, *rewards, *logprobs])])
        names = ("accuracy", "margin", "rewards/chosen", "rewards/rejected", "logprobs/chosen", "logprobs/rejected")
        metrics = {"update": update, "epoch": epochs_seen(update), "learning_rate": decayed(update)}
        metrics |= dict(zip(names, np.mean(pairs, axis=0)))
        loss = sum(losses) / len(losses)
        expected.append(metrics | {"loss": loss.item(), "grad_norm": optimizer.step(loss, decayed(update))})
    # both policies are the reference at first, margins are 0 up to rounding, and so is their sign
    expected[0]["accuracy"] = read_metrics(tmp_path / "runs/run")[0]["accuracy"]
    check(tmp_path, expected, optimizer, policy=policy)


def test_reward_model(start, tmp_path):
    center_coef = 0.1
    run("reward_model.py", start, tmp_path, PAIRS | {"center_coef": center_coef})
    model = load(SCALAR, start.folder / "sft", num_labels=1)
    model.config.score_mean = 0
    torch.manual_seed(SEED)
    model.score.weight.data = torch.normal(0, 1 / math.sqrt(16 + 1), (1, 16)).double()
    optimizer, expected = AdamW(PAIRS["max_grad_norm"], model), []
    for update in range(1, UPDATES + 1):
        losses, right = [], []
        for row in batch_of(start.rows, PAIRS["batch_size"], update):
            chosen, rejected = (
                score_of(model, prompt_of(row) + answer_of(row, name)) for name in ("chosen", "rejected")
            )
            losses.append(-torch.log(1 / (1 + torch.exp(rejected - chosen))) + center_coef * (chosen + rejected) ** 2)
            right.append((chosen > rejected).item())
        loss = sum(losses) / len(losses)
        metrics = {"update": update, "epoch": epochs_seen(update), "learning_rate": decayed(update)}
        metrics |= {"loss": loss.item(), "accuracy": np.mean(right)}
        expected.append(metrics | {"grad_norm": optimizer.step(loss, decayed(update))})
    check(tmp_path, expected, optimizer, reward_model=model)
    saved = json.loads((tmp_path / "out/config.json").read_text())["score_mean"]
    scores = [score_of(model, prompt_of(row) + answer_of(row, "chosen")).item() for row in start.rows]
    assert saved == pytest.approx(np.mean(scores), rel=5e-5, abs=5e-6)  # the chosen answers are the references


# rejection sampling
@pytest.mark.parametrize("num_steps", [1, 3])
def test_rejection_sampling(num_steps, start, tmp_path):
    m, n, size, eta = 4, 5, 6, 0.6
    updates_per_step, ACCEPTANCE, ORDER = UPDATES // num_steps, 3, 4
    flags = SHARED | {"prompts_per_step": m, "samples_per_prompt": n, "num_steps": num_steps}
    flags |= {"updates_per_step": updates_per_step, "batch_size": size, "eval_rows": 2}
    flags |= {"eta": eta, "temperature": 0.8, "missing_eos_score": -1.5}
    flags |= {"max_grad_norm": {1: 5.0, 3: 6.5}[num_steps]}  # some are longer, some shorter
    run("rejection_sampling.py", start, tmp_path, flags | {"reward_path": start.folder / "reward"})
    flags = SimpleNamespace(**flags)
    policy, ref_policy = (load(CAUSAL, start.folder / "sft") for _ in range(2))
    reward_model = load(SCALAR, start.folder / "reward")
    optimizer, expected, seen, inverse = AdamW(flags.max_grad_norm, policy), [], set(), 0.0
    for update in range(1, UPDATES + 1):
        step = 1 + (update - 1) // updates_per_step
        if (update - 1) % updates_per_step == 0:
            before, inverse = inverse, step / num_steps / eta
            uniforms = np.random.default_rng([SEED, SAMPLING, step]).random((m, n, 8), dtype=np.float32)
            chances = np.random.default_rng([SEED, ACCEPTANCE, step]).random((m, n))
            all_scores, accepted, control, sizes, pairs = [], [], [], [], []
            for row, draws, luck in zip(batch_of(start.rows, m, step), uniforms, chances):
                answers = [sample(policy, row, u, 0, flags.temperature) for u in draws]
                for e in answers:
                    with torch.no_grad():
                        e.score = score_of(reward_model, e.prompt + e.response).item()
                        e.ref = sum(floats(logprobs_of(ref_policy, e.prompt, e.response, flags.temperature)))
                    seen.add(f"ended: {e.response[-1] in ENDS}")
                    e.score = e.score if e.response[-1] in ENDS else flags.missing_eos_score
                best = max(e.score for e in answers)
                weights = [math.exp((inverse - before) * (e.score - best)) for e in answers]
                kept = [e for e, weight, u in zip(answers, weights, luck) if u < weight]
                all_scores += [e.score for e in answers]
                accepted += [e.score for e in kept]
                control += [e.score for e in answers[: len(kept)]]
                sizes.append(sum(weights) ** 2 / sum(w**2 for w in weights))
                pairs += [(a, b) for i, a in enumerate(kept) for b in kept[i + 1 :]]
            useful = [(a, b) for a, b in pairs if a.response != b.response and a.score != b.score]
            seen.add(f"dropped: {len(useful) < len(pairs)}")
            found = {
                "accept/rate": len(accepted) / (m * n),
                "accept/effective": np.mean(sizes),
                "accept/score": np.mean(accepted),
                "accept/control": np.mean(control),
                "objective/score": np.mean(all_scores),
                "pairs/dropped": 1 - len(useful) / len(pairs),
                "pairs/used": len(useful),
            }
        rng, order = np.random.default_rng([SEED, ORDER, step]), []
        while len(order) < updates_per_step * size:
            order += rng.permutation(len(useful)).tolist()
        place = (update - 1) % updates_per_step * size
        losses, terms = [], []
        for a, b in (useful[i] for i in order[place : place + size]):
            a, b = (a, b) if a.score > b.score else (b, a)
            ratios = [sum(logprobs_of(policy, e.prompt, e.response, flags.temperature)) - e.ref for e in (a, b)]
            margin = (ratios[0] - ratios[1]) / inverse
            chance = 1 / (1 + math.exp(b.score - a.score))
            losses.append(
                -chance * torch.log(1 / (1 + torch.exp(-margin)))
                - (1 - chance) * torch.log(1 / (1 + torch.exp(margin)))
            )
            terms.append({"accuracy": float(margin > 0), "margin": margin.item(), "gap": a.score - b.score})
        loss = sum(losses) / len(losses)
        metrics = {"update": update, "episodes": step * m * n, "learning_rate": decayed(update), "step": step}
        metrics |= {"eta": 1 / inverse} | found | {name: np.mean([term[name] for term in terms]) for name in terms[0]}
        expected.append(metrics | {"loss": loss.item(), "grad_norm": optimizer.step(loss, decayed(update))})
    # at first the policy is the reference, margins are 0 up to rounding, and so is their sign
    expected[0]["accuracy"] = read_metrics(tmp_path / "runs/run")[0]["accuracy"]
    check(tmp_path, expected, optimizer, policy=policy)
    assert seen >= {"ended: True", "ended: False", "dropped: True"}
