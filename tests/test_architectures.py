"""Every script on other decoders and other tokenizers; and padding, which must never change a result."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_here, write_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import dpo
import ppo
from plumbing import models as plumbing_models
from plumbing.models import load_model, save_model
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
CASES = [pytest.param(*pair, marks=pytest.mark.slow, id="-".join(pair)) for pair in PAIRS]


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
    for name, more in {"ppo": (), "drpo": (), "rto": ("--dpo-path", "dpo")}.items():
        steps = ("--total-episodes", 32, "--batch-size", 16, "--minibatch-size", 16, "--eval-every", 2)
        run_here(f"{name}.py", *data, *models, *more, *steps, *named(name), cwd=tmp_path)
        first, *_ = metrics = read_metrics(tmp_path / "runs" / name)
        assert len(metrics) == 2 and all(np.isfinite(list(line.values())).all() for line in metrics)
        assert first["policy/first_ratio_error"] < 1e-5  # the rollout sees what the update sees
    policies = ("--policies", "sft", "dpo", "ppo", "drpo", "rto")
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
        tokens = ppo.generate(policy, *prompt, uniforms[rows], budget[rows], torch.tensor([0]), 0.9)
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


# what a saved folder computes elsewhere: everything is read again by transformers alone
ARGS = SimpleNamespace(seed=1, prompt_length=128, response_length=32, dtype="float32")
TABLE = pytest.mark.parametrize("architecture, quirk", PAIRS, ids=map("-".join, PAIRS))
PROMPTS, RESPONSES = ["SUBREDDIT: r/cats", "my boss and the cat that he saw"], [" i feel sad and tired", " no"]


def random_of(auto_class, config, **settings):
    torch.manual_seed(6)
    model = auto_class.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


@torch.no_grad()
def score_at_the_end(model, ids):
    """The body's last hidden state times the head; and what the token before it would have got."""
    hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return (hidden @ model.score.weight[0])[[-1, -2]].tolist()


@TABLE
def test_a_reward_model_gives_the_same_scores_elsewhere(architecture, quirk, tmp_path):
    base = save_base_model(tmp_path / "base", architecture, quirk)
    config = AutoConfig.from_pretrained(base, num_labels=1)
    model = random_of(AutoModelForSequenceClassification, config, score_mean=0.7)
    tokenizer = AutoTokenizer.from_pretrained(base)
    save_model(str(tmp_path / "out"), model, tokenizer)

    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [prompt + response + tokenizer.eos_token for prompt, response in zip(PROMPTS, RESPONSES)]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert len(rows[0]) != len(rows[1]) and rows[0][-1] == rows[1][-1] == tokenizer.eos_token_id
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        found = other(**batch).logits.squeeze(1).tolist()
    expected, before = zip(*(score_at_the_end(model, row) for row in rows))
    assert found == pytest.approx(expected, abs=1e-4) and found != pytest.approx(before, abs=0.1)
    assert other.config.score_mean == 0.7  # to be subtracted

    again = load_model(AutoModelForSequenceClassification, str(tmp_path / "out"), tokenizer, ARGS, torch.device("cpu"))
    prompts, responses = (encode(tokenizer, *texts, 99) for texts in ((PROMPTS, "prompts"), (RESPONSES, "responses")))
    with torch.no_grad():
        ours = ppo.sequence_scores(again, *pad(prompts, "left", "cpu"), *pad(responses, "right", "cpu"))
    alone = [score_at_the_end(model, prompt + response)[0] - 0.7 for prompt, response in zip(prompts, responses)]
    assert ours.tolist() == pytest.approx(alone, abs=1e-4)


WORDS = {"a": 0, "b": 1, "<unk>": 2, "<s>": 3, "</s>": 4, "<pad>": 5, "<turn>": 6}
WORDS |= {word: 7 + place for place, word in enumerate("cdefgh")}
PADS = {  # the tokenizer's own special tokens, the ids that end a response -> what must pad
    "its own": ({"pad_token": "<pad>", "unk_token": "<unk>"}, [4], "<pad>"),
    "unknown": ({"unk_token": "<unk>", "bos_token": "<s>"}, [4], "<unk>"),
    "pad is eos": ({"pad_token": "</s>", "bos_token": "<s>", "unk_token": "</s>"}, [4], "<s>"),
    "a token of the chat template": ({"pad_token": "<pad>", "additional_special_tokens": ["<turn>"]}, [4, 5], "<turn>"),
    "none": ({"pad_token": "</s>", "bos_token": "</s>", "unk_token": "</s>"}, [4], None),
}


@pytest.mark.parametrize("names, ends, expected", PADS.values(), ids=PADS)
def test_a_reward_model_is_padded_with_no_end(names, ends, expected, tmp_path, monkeypatch, capsys):
    words = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", **names)
    config = LlamaConfig(**LLAMA, vocab_size=len(WORDS), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = random_of(AutoModelForSequenceClassification, config)
    monkeypatch.setattr(plumbing_models, "end_ids", lambda tokenizer, path="": ends)
    save_model(str(tmp_path / "out"), model, tokenizer)
    assert ("score one row at a time" in capsys.readouterr().out) == (expected is None)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == WORDS  # nothing new, so the embedding still fits
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert other.config.pad_token_id == WORDS.get(expected)
    for end in [name for name, id in WORDS.items() if id in ends]:
        rows = [tokenizer(text)["input_ids"] for text in (f"<s> a {end}", f"<s> a b b a {end}")]
        if expected is None:
            found = [other(input_ids=torch.tensor([row])).logits.item() for row in rows]
            with pytest.raises(ValueError, match="batch sizes"):
                other(input_ids=torch.tensor([rows[0], rows[0]]))
        else:
            assert tokenizer.pad_token == expected
            batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
            found = other(**batch).logits.squeeze(1).tolist()
        assert found == pytest.approx([score_at_the_end(model, row)[0] for row in rows], abs=1e-4)

    again = load_model(AutoModelForSequenceClassification, str(tmp_path / "out"), tokenizer, ARGS, torch.device("cpu"))
    again.score(again.base_model(input_ids=torch.tensor([[3, 2, 4, 5, 6]])).last_hidden_state).sum().backward()
    assert again.get_input_embeddings().weight.grad[[3, 2, 4, 5, 6]].any(1).all()  # the critic learns every token


@torch.no_grad()
@TABLE
def test_a_policy_writes_the_same_elsewhere(architecture, quirk, tmp_path):
    base = save_base_model(tmp_path / "base", architecture, quirk)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    model = random_of(AutoModelForCausalLM, AutoConfig.from_pretrained(base))
    prompt = tokenizer("my boss")["input_ids"]
    greedy = [*prompt]
    for _ in range(12):  # by the model's own forward pass
        greedy.append(int(model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    end = greedy[len(prompt) + 4]
    ends = [*dict.fromkeys([tokenizer.eos_token_id, end])]  # a turn ends with another token than a text, as in a chat
    settings = {"eos_token_id": ends[::-1], "temperature": 0.3, "do_sample": False}  # not strictly valid, yet published
    model.save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps(settings))

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_model(AutoModelForCausalLM, str(base), tokenizer, ARGS, torch.device("cpu"))
    save_model(str(tmp_path / "out"), model, tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    batch = torch.tensor([greedy, greedy[::-1]])
    assert_close(other(input_ids=batch).logits, model(input_ids=batch).logits, rtol=0, atol=1e-4)
    written = other.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0].tolist()
    stop = next(n for n, id in enumerate(greedy) if n >= len(prompt) and id in ends)
    assert written == greedy[: stop + 1]
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert sorted(generation.eos_token_id) == sorted(ends) and generation.temperature == 0.3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
