"""LoRA and recomputed activations: what is trained, what is stored once, what is saved."""

import copy
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics, read_rows, run_here, slow_for
from test_architectures import CONFIGS, random_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo
from plumbing.models import load_model, make_trainable, merge, save_model
from plumbing.tokens import encode_rows, pad

OFF = {"seed": 1, "gradient_checkpointing": False, "lora_rank": 0, "lora_alpha": 8.0, "lora_target": "all-linear"}
SEQ = AutoModelForSequenceClassification
LORA = ("--lora-rank", 4, "--lora-alpha", 8, "--learning-rate", 1e-2, "--gradient-checkpointing")


def batch_of(seed=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 211, (3, 20), generator=generator)
    lengths = torch.tensor([[12], [4], [9]])
    return ids[:, :8], torch.arange(8) >= 3 * torch.arange(3)[:, None] - 1, ids[:, 8:], torch.arange(12) < lengths


def pair(auto_class, architecture, **settings):
    """A model and its frozen twin, float64."""
    labels = {"num_labels": 1} if auto_class is SEQ else {}
    model = random_model(auto_class, architecture, **labels)
    return model, copy.deepcopy(model), SimpleNamespace(**OFF | settings)


def outputs(model, auto_class):
    batch = batch_of()
    return ppo.token_values(model, *batch) if auto_class is SEQ else ppo.token_logprobs(model, *batch, batch[3], 0.7)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("auto_class", (AutoModelForCausalLM, SEQ), ids=("policy", "critic"))
def test_adapters(auto_class, architecture, tmp_path):
    model, frozen, args = pair(auto_class, architecture, lora_rank=3)
    before = outputs(frozen, auto_class).detach()
    trained = make_trainable(model, frozen, args)
    assert outputs(model, auto_class).detach().equal(before)  # adapters start without effect

    # the weights are those of the frozen model, not copies
    shared = {x.data_ptr() for x in frozen.parameters()}
    own = {name: x for name, x in model.named_parameters() if x.data_ptr() not in shared}
    learning = {name for name, x in model.named_parameters() if x.requires_grad}
    assert learning == {name for name in own if "lora_" in name or name == "score.modules_to_save.default.weight"}
    assert len(learning) >= 2 * 4 * 2 and (auto_class is SEQ) == any("score" in name for name in learning)
    assert not any("lm_head" in name or "embed_out" in name for name in own)  # the output head is left alone

    # all of them learn, the frozen model does not notice
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    start = {name: own[name].detach().clone() for name in learning}
    for _ in range(2):  # the first step moves the B matrices alone
        (outputs(model, auto_class) * torch.randn(3, 12, generator=torch.Generator().manual_seed(1))).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [name for name in learning if own[name].equal(start[name])]
    assert outputs(frozen, auto_class).detach().equal(before)

    # on disk: merged weights that any loader reads
    after = outputs(model, auto_class).detach()
    assert not torch.allclose(after, before, atol=1e-3)
    save_model(str(tmp_path / "out"), merge(trained), AutoTokenizer.from_pretrained(ROOT / "data/tiny_pythia"))
    merged = auto_class.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert_close(outputs(merged, auto_class), after, rtol=0, atol=1e-9)
    assert_close(outputs(model, auto_class), after, rtol=0, atol=1e-9)  # evaluated after it was saved
    assert outputs(frozen, auto_class).detach().equal(before)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("auto_class", (AutoModelForCausalLM, SEQ), ids=("policy", "critic"))
def test_recomputed_activations_give_the_same_gradients(auto_class, architecture):
    gradients, layers = [], []
    for recompute in (False, True):
        model, frozen, args = pair(auto_class, architecture, gradient_checkpointing=recompute)
        assert make_trainable(model, frozen, args) is model
        calls = []
        norm = model.base_model.get_submodule(NORMS[architecture])
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        (outputs(model, auto_class) ** 2).sum().backward()
        layers.append(len(calls))
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    assert layers == [1, 2]  # the norm inside a layer ran once more
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], rtol=0, atol=1e-12)


NORMS = {"gpt_neox": "layers.1.input_layernorm", "gpt2": "h.1.ln_1"}
NORMS |= dict.fromkeys(("llama", "qwen3"), "layers.1.input_layernorm")


def test_a_rollout_with_recomputation_still_uses_the_cache():
    model, frozen, args = pair(AutoModelForCausalLM, "llama", gradient_checkpointing=True)
    make_trainable(model, frozen, args)
    lengths = []
    model.base_model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    prompts, uniforms = (
        batch_of()[:2],
        torch.rand(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    )
    with torch.no_grad():
        tokens = [ppo.generate(m, *prompts, uniforms, torch.full((3,), 6), 0, 1.0) for m in (model, frozen)]
    assert tokens[0].equal(tokens[1])
    assert lengths[0] == 8 and set(lengths[1:]) == {1}


SCRIPTS = ("sft", "reward_model", "dpo", "dpo_ln", "ppo", "drpo", "rto", "online_dpo", "xpo", "rejection_sampling")
ROUNDS = ("--prompts-per-round", 16, "--samples-per-prompt", 3, "--updates-per-round", 2, "--batch-size", 16)
ROUNDS += ("--total-episodes", 48, "--eval-rows", 16)
REJECTION = (
    "--prompts-per-step",
    3,
    "--samples-per-prompt",
    8,
    "--num-steps",
    2,
    "--updates-per-step",
    2,
    "--eta",
    0.2,
)
REJECTION += ("--batch-size", 16, "--eval-rows", 16)


def flags_of_new_pairs(models):
    return {
        "online_dpo": (*models.flags, *ROUNDS),
        "xpo": (*models.flags, *ROUNDS, "--alpha", 0.1, "--second-reference"),
        "rejection_sampling": (*models.flags, *REJECTION),
    }


@pytest.mark.parametrize("name", slow_for({*SCRIPTS} - {"drpo"}, SCRIPTS))
def test_every_script_trains_adapters(name, models, tmp_path):
    pairs, steps = ("--dataset", models.preference, "--sft-path", models.sft), ("--num-epochs", 1, "--batch-size", 64)
    rl = ("--total-episodes", 48, "--batch-size", 16, "--minibatch-size", 16, "--eval-every", 3, "--eval-rows", 32)
    flags = {
        "sft": ("--dataset", models.reference, "--base-model", models.sft, *steps),
        "reward_model": (*pairs, *steps, "--reference-dataset", models.reference),
        "dpo": (*pairs, *steps),
        "dpo_ln": (*pairs, *steps),
        **flags_of_new_pairs(models),
    }.get(name) or (*models.rl[f"{name}.py"], *rl)
    run_here(f"{name}.py", *flags, *LORA, "--output-dir", "out", "--run-name", "run", cwd=tmp_path)
    metrics = read_metrics(tmp_path / "runs/run")
    if f"{name}.py" in models.rl:
        assert metrics[0]["policy/first_ratio_error"] < 1e-6 and metrics[0]["objective/kl"] == 0
        assert metrics[-1]["objective/kl"] != 0
    kind = SEQ if name == "reward_model" else AutoModelForCausalLM
    model, base = kind.from_pretrained(tmp_path / "out"), kind.from_pretrained(models.sft, num_labels=1)
    assert not any("lora" in key for key in model.state_dict())
    moved = {key for key, x in model.state_dict().items() if not x.equal(base.state_dict()[key])}
    assert any("query_key_value" in key for key in moved) and not any("embed" in key or "norm" in key for key in moved)
    assert (name == "reward_model") == any("score" in key for key in moved)
    assert not [path for path in (tmp_path / "out").rglob("*") if "adapter" in path.name]


def test_without_peft_the_error_says_what_to_install(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # which makes its import fail
    done = run_here("ppo.py", *models.flags, "--lora-rank", 4, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.endswith("error: --lora-rank needs peft: pip install peft\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", slow_for({*SCRIPTS} - {"drpo"}, SCRIPTS))
def test_the_numbers_at_the_end_are_those_of_the_saved_folder(name, models, tmp_path):
    """In bfloat16 with adapters: the same script starts again from the folder, and says the same before its first step."""
    pairs = ("--dataset", models.preference, "--num-epochs", 1, "--batch-size", 64)
    references = ("--dataset", models.reference, "--num-epochs", 1, "--batch-size", 64)
    rl = models.rl.get(f"{name}.py", ())
    rl += ("--total-episodes", 16, "--batch-size", 16, "--minibatch-size", 16, "--eval-rows", 16)
    flags = {
        "sft": references,
        "dpo": pairs,
        "dpo_ln": pairs,
        "reward_model": (*pairs, "--reference-dataset", models.reference),
    }
    flags = (*(flags | flags_of_new_pairs(models)).get(name, rl), "--dtype", "bfloat16")
    start = "--base-model" if name == "sft" else "--sft-path"

    def run(folder, *more):
        run_here(f"{name}.py", *flags, start, folder, *more, "--output-dir", tmp_path / more[-1], cwd=tmp_path)
        return json.loads((tmp_path / f"runs/{more[-1]}/result.json").read_text())

    said = run(models.sft, *LORA, "--run-name", "first")
    if name == "reward_model":  # which starts with a new head: it is read by the function of the RL scripts
        tokenizer, args = AutoTokenizer.from_pretrained(tmp_path / "first"), SimpleNamespace(**LENGTHS)
        model = load_model(SEQ, str(tmp_path / "first"), tokenizer, args, torch.device("cpu"))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            scores = [scores_of(model, tokenizer, models.preference / "test.jsonl", x) for x in ("chosen", "rejected")]
            centre = scores_of(model, tokenizer, models.reference / "train.jsonl", "completion").mean().item()
        correct = (0.5 + 0.5 * (scores[0] - scores[1]).sign()).mean().item()
        assert said["all"]["accuracy"] == pytest.approx(correct) and centre == pytest.approx(0, abs=1e-3)
        return
    run(tmp_path / "first", "--learning-rate", 0, "--gradient-checkpointing", "--run-name", "again")  # no shared prompt
    line_0 = read_metrics(tmp_path / "runs/again", start=0)[0]
    if name == "sft":
        assert line_0["eval/loss"] == pytest.approx(said["SFT"]["loss"], rel=1e-5)
    elif name.startswith("dpo"):
        for side in ("logprobs/chosen", "logprobs/rejected"):
            assert line_0[f"eval/{side}"] == pytest.approx(said["after"][side], rel=1e-5)
    else:  # the KL is to another policy now
        table = json.loads((tmp_path / "runs/again/result.json").read_text())["SFT"]
        (title,) = said.keys() - {"SFT"}
        assert {key: x for key, x in table.items() if key != "kl"} == pytest.approx(
            {key: x for key, x in said[title].items() if key != "kl"}, rel=1e-5
        )


LENGTHS = {"prompt_length": 128, "response_length": 40}


def scores_of(model, tokenizer, file, column):
    rows, args = read_rows(file), SimpleNamespace(**LENGTHS)
    encode_rows(rows, tokenizer, args, ids=column)
    prompts = pad([row["prompt_ids"] for row in rows], "left", "cpu")
    return ppo.sequence_scores(model, *prompts, *pad([row["ids"] for row in rows], "right", "cpu"))
