"""plumbing/models.py: models that do not fit, what is missing, and what a loaded model is like."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from conftest import ROOT, signals_as_they_were, slow_for
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_errors import BASE, fails, save_random
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo
from data import COMMANDS
from plumbing import find, models
from plumbing.tokens import pad

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("sft"), AutoModelForCausalLM)


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("reward"), AutoModelForSequenceClassification, num_labels=1)


def load(path, tokenizer, auto_class=AutoModelForCausalLM, may_be_empty=False, seed=1, prompt_length=128, **config):
    """load_model of a folder, with the tokenizer of another."""
    args = SimpleNamespace(seed=seed, prompt_length=prompt_length, response_length=32, dtype="float32", shard=False)
    tokenizer = models.load(AutoTokenizer, str(tokenizer))
    return models.load_model(auto_class, str(path), tokenizer, args, CPU, may_be_empty, **config)


def copy(folder, to):
    return shutil.copytree(folder, to)


# what fits
def test_a_model_comes_in_float32_and_without_dropout(sft, tmp_path):
    folder = copy(sft, tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(sft, dtype=torch.bfloat16, attention_dropout=0.5).save_pretrained(folder)
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(folder / "model.safetensors").values())
    model = load(folder, folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.attention_dropout == 0.5 and not any(module.training for module in model.modules())


def test_a_value_head_may_be_new(sft, reward):
    scalar = AutoModelForSequenceClassification
    assert load(sft, sft, scalar, num_labels=1).score.weight.shape == (1, 64)
    saved = load_file(reward / "model.safetensors")["score.weight"]
    assert load(reward, sft, scalar).score.weight.equal(saved)


def test_a_base_model_without_weights_is_said_so(sft, capsys):
    first, again, other = (load(BASE, BASE, may_be_empty=True, seed=seed).state_dict() for seed in (1, 1, 2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "no weights" in line]
    assert len(lines) == 3 and all(line.startswith(f"{BASE} ") for line in lines)
    assert all(first[name].equal(again[name]) for name in first)  # the seed decides
    assert not all(first[name].equal(other[name]) for name in first)
    saved, found = load(sft, sft).state_dict(), load(sft, sft, may_be_empty=True).state_dict()
    assert all(found[name].equal(tensor) for name, tensor in saved.items())
    assert "no weights" not in capsys.readouterr().out


# what does not
def test_a_model_that_is_not_there(sft, capsys):
    fails(capsys, "cannot load /no/such/model", models.load, AutoModelForCausalLM, "/no/such/model")
    fails(capsys, "cannot load nobody/nothing", models.load, AutoTokenizer, "nobody/nothing")
    fails(capsys, "cannot load /no/such/model", load, "/no/such/model", sft)


def test_weights_that_cannot_be_read(sft, tmp_path, capsys):
    cut, pickled, gone = (copy(sft, tmp_path / name) for name in ("cut", "pickled", "gone"))
    (cut / "model.safetensors").write_bytes((sft / "model.safetensors").read_bytes()[:-1000])
    fails(capsys, f"cannot load {cut}", load, cut, sft)
    torch.save(load_file(sft / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    fails(capsys, "safetensors", load, pickled, sft)  # a pickle may hold a program
    (gone / "model.safetensors").unlink()
    fails(capsys, "safetensors", load, gone, sft)


def test_a_folder_with_pickled_weights_is_not_empty(sft, tmp_path, capsys):
    folder = copy(sft, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    printed = fails(capsys, "safetensors", load, folder, folder, may_be_empty=True)
    assert "holds no weights" not in printed.out  # random ones would silently take their place


def spoilt(sft, to, change):
    """A copy of a folder with other weights: `change` takes and returns name -> tensor."""
    folder = copy(sft, to)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def without(part):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


def renamed(weights):
    return {name.replace("gpt_neox.", "body."): x for name, x in weights.items()}


def with_nan(weights):
    weights["gpt_neox.final_layer_norm.weight"][3] = torch.nan
    return weights


CHANGES = {
    "a layer": (without("layers.1."), "lacks gpt_neox.layers.1.attention.dense.bias"),
    "the output head": (without("embed_out"), "lacks lm_head.weight"),
    "the body": (renamed, "lacks gpt_neox.embed_in.weight"),
    "one too many": (lambda weights: weights | {"extra.weight": torch.ones(2)}, "has the unknown extra.weight"),
    "another shape": (
        lambda weights: weights | {"gpt_neox.final_layer_norm.bias": torch.ones(3)},
        "gpt_neox.final_layer_norm.bias",
    ),
    "not a number": (with_nan, "holds NaN or infinity in gpt_neox.final_layer_norm.weight"),
}


@pytest.mark.parametrize("change, culprit", CHANGES.values(), ids=CHANGES)
def test_no_random_number_stands_in_for_a_weight(change, culprit, sft, tmp_path, capsys):
    folder = spoilt(sft, tmp_path / "spoilt", change)
    fails(capsys, culprit, load, folder, folder)


def test_a_body_without_a_layer_is_no_start_for_a_reward_model(sft, tmp_path, capsys):
    folder = spoilt(sft, tmp_path / "spoilt", without("layers.1."))
    fails(capsys, "lacks gpt_neox.layers.1.", load, folder, folder, AutoModelForSequenceClassification, num_labels=1)


def test_a_reward_model_is_no_policy_and_the_other_way_round(sft, reward, tmp_path, capsys):
    fails(capsys, "lacks lm_head.weight", load, reward, reward)
    fails(capsys, "is no reward model", load, sft, sft, AutoModelForSequenceClassification)
    config = json.loads((sft / "config.json").read_text()) | {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (one_label := copy(sft, tmp_path / "one_label") / "config.json").write_text(json.dumps(config))
    fails(capsys, "lacks score.weight", load, one_label.parent, sft, AutoModelForSequenceClassification)


# what is read: as the scripts do it, and as the model does
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
READ = {
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": transformers.CohereConfig(**SIZES, logit_scale=0.07),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=3),
    "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99),
}
NOT_READ = {
    "bert": transformers.BertConfig(**SIZES, is_decoder=True),
    "rwkv": transformers.RwkvConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99),
    "mamba": transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99),
    "falcon_h1": transformers.FalconH1Config(**SIZES),
}


def random_of(config):
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    return model


@pytest.mark.parametrize("config", READ.values(), ids=READ)
def test_logits_are_those_of_the_model(config):
    model, rng = random_of(config), torch.Generator().manual_seed(5)
    models.check_reading(model, "folder")
    prompts = [torch.randint(3, 99, (n,), generator=rng).tolist() for n in (2, 5)]
    responses = [torch.randint(3, 99, (n,), generator=rng).tolist() for n in (4, 3)]
    (ids, mask), (response_ids, response_mask) = pad(prompts, "left", "cpu"), pad(responses, "right", "cpu")
    found, expected = ppo.token_logprobs(model, ids, mask, response_ids, response_mask, response_mask, 0.7), []
    for prompt, response in zip(prompts, responses):
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected.append(logits.log_softmax(-1)[range(len(response)), response])
    torch.testing.assert_close(found[response_mask], torch.cat(expected), rtol=1e-4, atol=1e-4)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for ours, own in zip(*(torch.autograd.grad(x.sum(), weights) for x in (found, torch.cat(expected)))):
        torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-3)
    # greedy tokens, one after the other, by the model's own forward pass
    with torch.no_grad():
        generated = ppo.generate(
            model, ids, mask, torch.full((2, 4), 0.5), torch.full((2,), 4), torch.tensor([-1]), 1e-4
        )
    for row, tokens in enumerate(prompts):
        for t in range(4):
            tokens = [*tokens, int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())]
            assert generated[row, t] == tokens[-1]


@pytest.mark.parametrize("name", slow_for(("falcon_h1",), NOT_READ))
def test_what_cannot_be_read_is_refused(name, capsys):
    config = NOT_READ[name]
    model = random_of(config)
    message = f"folder: {type(model).__name__} cannot be read as a decoder: "
    fails(capsys, message, models.check_reading, model, "folder")


def test_a_model_that_sees_what_follows_is_refused(sft, reward, monkeypatch, capsys):
    def both_ways(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        return attention(query, key, value, **kwargs)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", both_ways)
    fails(capsys, "cannot be read as a decoder", load, sft, sft)
    fails(capsys, "cannot be read as a decoder", load, reward, reward, AutoModelForSequenceClassification)


# bfloat16
@torch.no_grad()
def test_scores_are_float32_numbers_and_an_adapter_is_not_rounded_away(reward, tmp_path):
    args = SimpleNamespace(seed=1, prompt_length=128, response_length=32, dtype="bfloat16", shard=False)
    args = SimpleNamespace(
        **vars(args), gradient_checkpointing=False, lora_rank=4, lora_alpha=8, lora_target="all-linear"
    )
    tokenizer = models.load(AutoTokenizer, str(reward))
    scalar = AutoModelForSequenceClassification
    model, frozen = (models.load_model(scalar, str(reward), tokenizer, args, CPU) for _ in range(2))
    trained = models.make_trainable(model, frozen, args)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    rng = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 1000, (12,), generator=rng).tolist() for _ in range(64)]
    batch = (*pad([row[:6] for row in rows], "left", "cpu"), *pad([row[6:] for row in rows], "right", "cpu"))
    layer = model.base_model.layers[1].mlp.dense_h_to_4h
    change = (
        layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    expected = layer.base_layer.weight.double() + change
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        adapted = ppo.sequence_scores(model, *batch)
        models.save_model(str(tmp_path / "out"), models.merge(trained), tokenizer)
        merged = ppo.sequence_scores(model, *batch)
        again = ppo.sequence_scores(models.load_model(scalar, str(tmp_path / "out"), tokenizer, args, CPU), *batch)
        without_adapter = ppo.sequence_scores(frozen, *batch)
    merged_weight = load_file(tmp_path / "out/model.safetensors")["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"]
    torch.testing.assert_close(merged_weight.double(), expected, rtol=0, atol=1e-6)  # no bfloat16 product
    exact = ppo.sequence_scores(scalar.from_pretrained(tmp_path / "out", dtype=torch.float32).eval(), *batch)
    assert adapted.dtype == torch.float32 and not adapted.bfloat16().float().equal(adapted)
    effect = (exact - without_adapter).std()
    for scores in (adapted, merged, again):
        assert (scores - exact).abs().mean() < 0.1 * effect
    assert abs(again.mean() - merged.mean()) < 0.01 * effect


def test_another_vocabulary(sft, reward, tmp_path, capsys):
    other = copy(reward, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(reward)
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(other)
    scalar = AutoModelForSequenceClassification
    fails(capsys, f"{other} has another vocabulary than {sft}", load, other, sft, scalar)
    assert load(other, other, scalar)  # by its own it can be read


def test_too_few_embeddings(tmp_path, capsys):
    folder = copy(BASE, tmp_path / "small")
    config = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    message = f"{folder}: the embedding has 500 rows, the tokenizer {len(AutoTokenizer.from_pretrained(BASE))} tokens"
    fails(capsys, message, load, folder, folder, may_be_empty=True)


def test_too_few_positions(sft, capsys):
    message = f"{sft} has 512 positions; --prompt-length and --response-length add up to 513"
    fails(capsys, message, load, sft, sft, prompt_length=481)
    assert load(sft, sft, prompt_length=480)


def test_a_reward_model_has_one_output(sft, tmp_path, capsys):
    scalar = AutoModelForSequenceClassification
    fails(capsys, f"{sft} ", load, sft, sft, scalar)  # none: its value head would be random
    two = save_random(tmp_path / "two", scalar, num_labels=2)
    fails(capsys, f"{two} is no reward model", load, two, sft, scalar)


def test_a_layer_that_is_not_there(sft, capsys):
    args = SimpleNamespace(seed=1, gradient_checkpointing=False, lora_rank=2, lora_alpha=4, lora_target="nowhere,here")
    model, frozen = load(sft, sft), load(sft, sft)
    fails(capsys, "--lora-target nowhere,here: ", models.make_trainable, model, frozen, args)


# what is missing
@pytest.fixture
def started(monkeypatch, tmp_path):
    """In an empty folder: environments and commands of the scripts that build_missing starts, which do nothing."""
    found = SimpleNamespace(commands=[], environments=[], code=0)

    def popen(command, env):
        found.commands.append(command)
        found.environments.append(env)
        return SimpleNamespace(wait=lambda: found.code)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.subprocess, "Popen", popen)
    with signals_as_they_were():
        yield found


SFT, REWARD = "models/sft", "models/reward"


def test_missing_defaults_are_trained_in_order(started, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    models.build_missing(SFT, REWARD)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    scripts = [str(ROOT / name) for name in ("sft.py", "reward_model.py")]
    assert started.commands == [[sys.executable, script] for script in scripts]
    assert f"{REWARD} does not exist yet: running reward_model.py" in capsys.readouterr().out


def test_a_model_of_a_task_is_trained_with_its_flags(started):
    models.build_missing("models/transcription")
    ((_, script, *flags),) = started.commands
    assert script == str(ROOT / "sft.py") and flags == list(COMMANDS["models/transcription"][1:])
    assert flags[flags.index("--output-dir") + 1] == "models/transcription"


def test_what_is_there_is_not_trained_again(started):
    os.makedirs(SFT)
    Path(SFT, "config.json").touch()
    models.build_missing(SFT)
    assert not started.commands
    Path(SFT, "config.json").unlink()  # what a save that was killed leaves
    models.build_missing(SFT)
    assert started.commands


def test_what_the_user_names_is_checked_first(started, sft, capsys):
    fails(capsys, "cannot load no/such/reward", models.build_missing, SFT, "no/such/reward")
    assert not started.commands
    models.build_missing(str(sft))  # named and there
    assert not started.commands


def test_training_that_fails_ends_the_program(started, capsys):
    started.code = 1
    fails(capsys, "sft.py did not finish", models.build_missing, SFT, REWARD)
    assert len(started.commands) == 1


def test_one_process_of_torchrun_trains_alone(started, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    models.build_missing(SFT)
    assert not started.commands
    monkeypatch.setenv("RANK", "0")
    models.build_missing(SFT)
    (environment,) = started.environments
    assert "PATH" in environment and not {"RANK", "WORLD_SIZE"} & environment.keys()


def test_of_two_first_runs_the_second_waits(started):
    os.makedirs("models")
    lock = FileLock(f"{SFT}.lock").acquire()
    second = threading.Thread(target=models.build_missing, args=(SFT,))
    second.start()
    second.join(timeout=0.3)
    assert second.is_alive() and not started.commands
    os.makedirs(SFT)
    Path(SFT, "config.json").touch()
    lock.lock.release()
    second.join()
    assert not started.commands


CHILD = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.3)
    pathlib.Path("ended").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_is_trained_first(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "ROOT", str(tmp_path))
    (tmp_path / "sft.py").write_text(CHILD)

    def send():
        while not os.path.exists("ready"):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    def not_passed_on(*_):
        raise AssertionError

    with signals_as_they_were():
        signal.signal(number, not_passed_on)
        threading.Thread(target=send).start()
        fails(capsys, "sft.py did not finish", models.build_missing, SFT)
    assert os.path.exists("ended")  # it was waited for


# what is read, for --resume
def test_the_files_that_a_model_is_read_from_are_known(sft, tmp_path, monkeypatch):
    folder = copy(sft, tmp_path / "sft")
    first = models.content_id(str(folder))
    (folder / "README.md").write_text("changed")
    (folder / "optimizer.pt").write_text("not read")
    assert models.content_id(str(folder)) == first == models.content_id(str(sft))
    load(folder, folder)
    assert models.inputs[str(folder)] == first
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert models.content_id(str(folder)) != first
        (folder / name).write_bytes(before)
    (folder / "generation_config.json").rename(folder / "generation_configs.json")
    assert models.content_id(str(folder)) != first
    monkeypatch.chdir(tmp_path)
    assert models.content_id("data/tiny_pythia") == models.content_id(str(BASE))


# what is not a model, or one that is read in another way
def test_code_of_a_folder_never_runs(sft, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # as `yes | python sft.py` would answer
    folder = copy(sft, tmp_path / "code")
    (folder / "code.py").write_text("open('it ran', 'w')\nclass Model: pass\nclass Config: pass\n")
    maps = {"AutoModelForCausalLM": "code.Model"}
    for settings in ({"model_type": "vit"}, {"model_type": "unheard_of"}):  # of transformers, but no decoder; unknown
        maps |= {"AutoConfig": "code.Config"} if settings["model_type"] == "unheard_of" else {}
        (folder / "config.json").write_text(json.dumps(settings | {"auto_map": maps}))
        fails(capsys, f"cannot load {folder}", load, folder, sft)
        (folder / "model.safetensors").unlink(missing_ok=True)
        fails(capsys, f"cannot load {folder}", load, folder, sft, may_be_empty=True)
        fails(capsys, f"cannot load {folder}", models.check_model, AutoModelForCausalLM, str(folder), None, 1)
    assert not os.path.exists("it ran")


def test_an_adapter_is_no_model(sft, tmp_path, capsys):
    peft.get_peft_model(load(sft, sft), peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    fails(capsys, f"{tmp_path} holds LoRA adapters alone", load, tmp_path, sft)
    fails(capsys, f"{tmp_path} holds LoRA adapters alone", models.load, AutoTokenizer, str(tmp_path))
    fails(capsys, f"{tmp_path} holds LoRA adapters alone", models.build_missing, str(tmp_path))


def test_an_encoder_is_no_reward_model(tmp_path, capsys):
    config = transformers.BertConfig(**SIZES | {"vocab_size": 2000}, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    fails(capsys, "is no reward model of a decoder", load, tmp_path, tmp_path, AutoModelForSequenceClassification)


def test_a_reward_model_read_before_its_eos_is_noted(tmp_path, capsys):
    scalar, eos = AutoModelForSequenceClassification, AutoTokenizer.from_pretrained(BASE).eos_token_id
    said = {}
    for name, settings in {"other": {"pad_token_id": eos}, "ours": {"pad_token_id": eos, "score_mean": 0.5}}.items():
        folder = save_random(tmp_path / name, scalar, num_labels=1, **settings)
        load(folder, folder, scalar)
        said[name] = capsys.readouterr().out
    assert "other pads with its EOS" in said["other"] and "EOS" not in said["ours"]
    folder = save_random(tmp_path / "third", scalar, num_labels=1, pad_token_id=eos + 1)
    load(folder, folder, scalar)
    assert "EOS" not in capsys.readouterr().out


def test_a_prompt_is_shared_where_a_cache_can_be_repeated(sft, reward, monkeypatch, capsys):
    plain, recomputed = (SimpleNamespace(gradient_checkpointing=value) for value in (False, True))
    scalar = AutoModelForSequenceClassification
    for model in (load(sft, sft), load(reward, reward, scalar)):
        assert models.can_share(model, plain) and not models.can_share(model, recomputed)
    repeated = transformers.DynamicCache.batch_repeat_interleave

    def mixed_up(cache, n):
        repeated(cache, n)
        cache.batch_select_indices(torch.tensor([2, 3, 0, 1]))

    for repeat in (lambda cache, n: None, lambda cache, n: cache.no_such_method(), mixed_up):
        monkeypatch.setattr(transformers.DynamicCache, "batch_repeat_interleave", repeat)
        assert not models.can_share(load(reward, reward, scalar), plain)  # it reads one side after the other
        fails(capsys, "cannot be read as a decoder", load, sft, sft)  # no rollout without it


# what is saved
def test_a_saved_model_ends_where_its_responses_end(sft, tmp_path, monkeypatch):
    tokenizer, ids = models.load(AutoTokenizer, str(sft)), {}
    for name, ends in {"one": [0], "two": [0, 5]}.items():
        monkeypatch.setattr(models, "end_ids", lambda tokenizer, path="", ends=ends: ends)
        models.save_model(str(tmp_path / name), load(sft, sft), tokenizer)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        ids[name] = (saved.config.eos_token_id, saved.generation_config.eos_token_id)
    assert ids == {"one": (0, 0), "two": ([0, 5], [0, 5])}


def test_a_generation_config_that_transformers_refuses_loses_no_model(sft, tmp_path):
    model = load(sft, sft)
    model.generation_config.update(do_sample=False, temperature=0.3)
    models.save_model(str(tmp_path / "out"), model, models.load(AutoTokenizer, str(sft)))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# from another working directory
def test_what_the_repository_brings_along_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("data/tldr_mini/reference") == str(ROOT / "data/tldr_mini/reference")
    assert load("data/tiny_pythia", "data/tiny_pythia", may_be_empty=True)
    others = ("data/nowhere", "models/sft", str(tmp_path), "nobody/nothing", "data")
    assert [find(path) for path in others] == list(others)
    (tmp_path / "data/tldr_mini/reference").mkdir(parents=True)
    assert find("data/tldr_mini/reference") == "data/tldr_mini/reference"  # one's own comes first
