"""Every script on other decoders and other tokenizers; and padding, which must never change a result."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_here, write_dataset
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

import dpo
import ppo
from plumbing.tokens import encode, pad

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 64, "max_position_embeddings": 256, "num_key_value_heads": 2}
CONFIGS = {
    "gpt_neox": (GPTNeoXConfig, SIZES | {"intermediate_size": 64, "max_position_embeddings": 256}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),  # tied embeddings
    "llama": (LlamaConfig, LLAMA),
    "qwen3": (Qwen3Config, LLAMA | {"head_dim": 8, "tie_word_embeddings": True}),
}
QUIRKS = ("own_pad", "no_pad", "pad_is_eos", "bos")
PAIRS = [(architecture, quirk) for architecture in CONFIGS for quirk in QUIRKS]
FAST = [("qwen3", "bos")]  # the one least like the embedded task's in every run of the tests, the others when slow
CASES = [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow, id="-".join(pair)) for pair in PAIRS]


def quirky_tokenizer(quirk):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia")
    if quirk == "no_pad":
        tokenizer.pad_token = None
    elif quirk == "pad_is_eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif quirk == "bos":  # added by default, as Llama's tokenizer does
        tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
        bos = [("<|begin|>", tokenizer.bos_token_id)]
        post = TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=bos)
        tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def save_base_model(folder, architecture, quirk):
    """A base model without weights, as data/tiny_pythia: the config of an architecture and a tokenizer."""
    tokenizer, (config_class, sizes) = quirky_tokenizer(quirk), CONFIGS[architecture]
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config_class(**sizes, **ids, initializer_range=0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_quirks_are_there(tmp_path):
    found = {}
    for quirk in QUIRKS:
        quirky_tokenizer(quirk).save_pretrained(tmp_path / quirk)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / quirk)
        found[quirk] = (tokenizer.pad_token_id, tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    eos = tokenizer.eos_token_id
    assert found == {"own_pad": (1, False), "no_pad": (None, False), "pad_is_eos": (eos, False), "bos": (1, True)}


@pytest.mark.parametrize("architecture, quirk", CASES)
def test_two_steps_of_every_script(architecture, quirk, tmp_path):
    base = save_base_model(tmp_path / "base", architecture, quirk)
    reference = write_dataset(tmp_path / "reference", "reference", (32, 8, 8))
    preference = write_dataset(tmp_path / "preference", "preference", (32, 8, 8))
    data, pairs = ("--dataset", reference), ("--dataset", preference)
    models = ("--sft-path", "sft", "--reward-path", "reward")
    two = ("--batch-size", 16, "--num-epochs", 1)
    run_here(*("sft.py", *data, *two, "--base-model", base), *named("sft"), cwd=tmp_path)
    run_here(
        *("reward_model.py", *pairs, *two, "--reference-dataset", reference, "--sft-path", "sft"),
        *named("reward"),
        cwd=tmp_path,
    )
    run_here("dpo.py", *pairs, *two, "--sft-path", "sft", *named("dpo"), cwd=tmp_path)
    for name in ("ppo", "drpo"):
        steps = ("--total-episodes", 32, "--batch-size", 16, "--minibatch-size", 16, "--eval-every", 2)
        run_here(f"{name}.py", *data, *models, *steps, *named(name), cwd=tmp_path)
        first, *_ = metrics = read_metrics(tmp_path / "runs" / name)
        assert len(metrics) == 2 and all(np.isfinite(list(line.values())).all() for line in metrics)
        assert first["policy/first_ratio_error"] < 1e-5  # the rollout sees what the update sees
    policies = ("--policies", "sft", "dpo", "ppo", "drpo")
    run_here("judge.py", *data, *policies, *models, "--run-name", "judge", cwd=tmp_path)
    assert set(json.loads((tmp_path / "runs/judge/result.json").read_text())) == set(policies[1:])


def named(name):
    return "--output-dir", name, "--run-name", name


def test_every_response_ends_with_a_real_eos_target():
    for quirk in QUIRKS:  # a pad token equal to EOS must not hide it from the loss
        tokenizer = quirky_tokenizer(quirk)
        eos = tokenizer.eos_token_id
        rows = encode(tokenizer, [" i feel sad", " my boss"], "responses", 32)
        ids, mask = pad(rows, "right", "cpu")
        assert [row[length - 1].item() for row, length in zip(ids, mask.sum(1))] == [eos, eos]
        assert mask.sum(1).tolist() == [len(row) for row in rows]
        assert tokenizer.bos_token_id is None or tokenizer.bos_token_id not in ids


def random_model(auto_class, architecture, **settings):
    config_class, sizes = CONFIGS[architecture]
    torch.manual_seed(3)
    config = config_class(**sizes, vocab_size=211, initializer_range=0.3, **settings)
    return auto_class.from_config(config).double().eval()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_padding_never_changes_a_result(architecture):
    """A row alone against the same row in a batch with much more padding on both sides, float64, tolerance 1e-9."""
    policy = random_model(AutoModelForCausalLM, architecture)
    critic = random_model(AutoModelForSequenceClassification, architecture, num_labels=1)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(2, 211, size=n).tolist() for n in (1, 17, 6, 30)]
    responses = [rng.integers(2, 211, size=n).tolist() for n in (9, 1, 20, 4)]
    uniforms = torch.from_numpy(rng.random((4, 12)))
    budget = torch.tensor([12, 5, 12, 1])

    def results(rows):
        prompt, response = (ppo.pad([x[i] for i in rows], side, "cpu") for x, side in zip((prompts, responses), SIDES))
        batch = (*prompt, *response)
        tensors = [ppo.token_logprobs(policy, *batch, response[1], 0.7), ppo.token_values(critic, *batch) * response[1]]
        tokens = ppo.generate(policy, *prompt, uniforms[rows], budget[rows], 0, 0.9)
        return [*tensors, ppo.sequence_scores(critic, *batch), tokens]

    with torch.no_grad():
        together = results([0, 1, 2, 3])
        for row in range(4):
            *alone, tokens = results([row])
            for x, y in zip(alone, together):
                y = y[row : row + 1, : x.shape[1]] if x.dim() == 2 else y[row : row + 1]
                assert_close(x, y, rtol=0, atol=1e-9)
            assert tokens.tolist() == together[-1][row : row + 1].tolist()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_reading_the_prompt_once_changes_no_score(architecture):
    """Both responses of a pair from one cache against a prompt of its own for each, float64, tolerance 1e-9."""
    model = random_model(AutoModelForSequenceClassification, architecture, num_labels=1)
    rng = np.random.default_rng(6)
    prompts = [rng.integers(2, 211, size=n).tolist() for n in (1, 17, 6, 30)]
    responses = [rng.integers(2, 211, size=n).tolist() for n in (9, 1, 20, 4, 4, 4, 2, 11)]
    batch = (*dpo.pad(prompts, "left", "cpu"), *(x.view(4, 2, -1) for x in dpo.pad(responses, "right", "cpu")))
    with torch.no_grad():
        shared, plain = (dpo.pair_states(model, *batch, share) for share in (True, False))
    last = batch[3].flatten(0, 1).sum(1)
    assert last.tolist() == [len(row) for row in responses]
    for row, length in enumerate(last):
        assert_close(shared[row, : length + 1], plain[row, : length + 1], rtol=0, atol=1e-9)


SIDES = ("left", "right")
