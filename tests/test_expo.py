"""expo.py: every weight against plain numbers, its limits, the policies it refuses, and its own judge command."""

import json
import shlex

import numpy as np
import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from test_errors import save_random, script_fails
from test_plain import written
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import expo


def read(folder):
    return load_file(folder / "model.safetensors")


def save(folder, model, tokenizer_of):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(models):
    """The small SFT policy, and what a short training might have made of it."""
    policy = AutoModelForCausalLM.from_pretrained(models.sft)
    torch.manual_seed(5)
    for parameter in policy.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
        parameter.data[torch.rand_like(parameter) < 0.1] *= 1e-3  # so that theta_0 + (theta_1 - theta_0) rounds
    return models.sft, save(models.folder / "aligned", policy, models.sft)


@pytest.fixture(scope="module")
def sweep(pair, models):
    """A real run -> its folder, what it printed."""
    folder = models.folder / "expo"
    folder.mkdir()
    flags = ("--sft-path", pair[0], "--aligned-path", pair[1], "--sweep-dir", "out")
    done = run_here("expo.py", *flags, "--alphas", 0, 0.5, -1, 8, 0.5, cwd=folder)
    return folder, done.stdout


def test_the_formula():
    aligned, sft = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (0.3, 2.5, 25.0):
        found = expo.extrapolate(aligned, sft, alpha)
        for x, one, zero in zip(found.flatten().tolist(), aligned.flatten().tolist(), sft.flatten().tolist()):
            assert x == pytest.approx((1 + alpha) * one - alpha * zero, rel=1e-12, abs=1e-12)
    odd = torch.tensor([-0.0, 3e38]), torch.tensor([0.0, -3e38])  # a sign that a sum loses, a difference that overflows
    assert expo.extrapolate(*odd, 0.0).numpy().tobytes() == odd[0].numpy().tobytes()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 8.0])
def test_every_weight_is_a_step_further(alpha, pair, sweep):
    sft, aligned, found = map(read, (*pair, sweep[0] / f"out/alpha_{alpha}"))
    assert found.keys() == aligned.keys() == sft.keys() and len(found) > 20
    for name, weights in found.items():
        zero, one = (x[name].double().numpy() for x in (sft, aligned))
        np.testing.assert_allclose(weights.numpy(), one + alpha * (one - zero), rtol=1e-5, atol=1e-6, err_msg=name)
        assert alpha == 0 or not weights.equal(aligned[name])


def test_alpha_0_is_the_aligned_policy_bit_for_bit(pair, sweep):
    found, aligned = (folder / "model.safetensors" for folder in (sweep[0] / "out/alpha_0.0", pair[1]))
    assert found.read_bytes() == aligned.read_bytes()


def test_alpha_minus_1_is_the_sft_policy(pair, sweep):
    sft = read(pair[0])
    for name, weights in read(sweep[0] / "out/alpha_-1.0").items():
        torch.testing.assert_close(weights, sft[name], rtol=0, atol=1e-6)


def test_what_it_says(pair, sweep):
    sft, aligned = ({name: x.double() for name, x in read(path).items()} for path in pair)
    norms = [
        sum(x.square().sum() for x in xs).sqrt().item() for xs in ([aligned[n] - sft[n] for n in sft], sft.values())
    ]
    assert f" by {norms[0] / norms[1]:.4f} of its norm " in sweep[1]
    assert sorted(path.name for path in (sweep[0] / "out").iterdir()) == [
        f"alpha_{x}" for x in ("-1.0", "0.0", "0.5", "8.0")
    ]
    assert not list((sweep[0] / "out").glob("*/1"))  # a number given twice is one policy, not a second save over it


def test_its_judge_command_runs_as_it_is(models, sweep):
    words = shlex.split(sweep[1][sweep[1].index("judge.py") :].splitlines()[0])
    small = ("--dataset", models.reference, "--reward-path", models.reward, "--max-rows", 4, "--run-name", "judge")
    run_here(*words, *small, cwd=sweep[0])
    results = json.loads((sweep[0] / "runs/judge/result.json").read_text())
    assert len(results) == 6 and len([path for path in results if path.startswith("out/alpha_")]) == 4
    aligned, zero = results[str(models.folder / "aligned")], results["out/alpha_0.0"]
    assert aligned == zero and results["out/alpha_8.0"] != zero


# what is refused, before anything is written
def other_class(folder, models):
    size = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return save(folder, GPT2LMHeadModel(GPT2Config(vocab_size=1024, **size)), models.sft)


def other_vocabulary(folder, models):
    save_random(folder, AutoModelForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(models.sft)
    tokenizer.add_tokens(["unheardof"])
    tokenizer.save_pretrained(folder)
    return folder


def other_settings(**settings):
    return lambda folder, models: save_random(folder, AutoModelForCausalLM, **settings)


def a_nan(folder, models):
    policy = AutoModelForCausalLM.from_pretrained(models.sft)
    policy.get_input_embeddings().weight.data[3, 3] = torch.nan
    return save(folder, policy, models.sft)


REFUSED = [
    (other_class, "class is GPT2LMHeadModel in aligned, GPTNeoXForCausalLM in"),
    (other_vocabulary, "has another vocabulary than aligned"),
    (other_settings(num_hidden_layers=1), "layers.1.input_layernorm.weight is None in aligned, (64,) in"),
    (other_settings(intermediate_size=96), "mlp.dense_h_to_4h.weight is (96, 64) in aligned, (256, 64) in"),
    (other_settings(num_attention_heads=2), "heads is 2 in aligned, 4 in"),
    (a_nan, "aligned holds NaN or infinity in gpt_neox.embed_in.weight"),
]


@pytest.mark.parametrize("make, culprit", REFUSED, ids=[culprit for _, culprit in REFUSED])
@pytest.mark.parametrize("swapped", [False, True])
def test_policies_that_do_not_fit_are_refused(make, culprit, swapped, models, tmp_path):
    make(tmp_path / "aligned", models)
    paths = ("aligned", models.sft)[:: -1 if swapped else 1]
    culprit = culprit if not swapped else "aligned"
    script_fails(culprit, "expo.py", "--aligned-path", paths[0], "--sft-path", paths[1], cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["aligned"]


@pytest.mark.parametrize(
    "alphas, culprit", [((), "--alphas"), ((0.5, "nan"), "finite, not"), (("inf",), "finite, not")]
)
def test_alphas_that_make_no_sense(alphas, culprit, models, tmp_path):
    paths = ("--sft-path", models.sft, "--aligned-path", "/no/such")  # not even looked at
    script_fails(culprit, "expo.py", *paths, "--alphas", *alphas, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_alpha_that_overflows_writes_nothing(pair, tmp_path):
    paths = ("--sft-path", pair[0], "--aligned-path", pair[1], "--sweep-dir", "out")
    script_fails("--alphas 1e+39 goes too far", "expo.py", *paths, "--alphas", "1e39", cwd=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_belongs_together_is_named_together(models, tmp_path):
    script_fails("--sft-path needs --aligned-path", "expo.py", "--sft-path", models.sft, cwd=tmp_path)
    paths = ("--sft-path", models.sft, "--aligned-path", "out", "--sweep-dir", "./out/")
    script_fails("is one of the two policies", "expo.py", *paths, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_policy_has_no_direction_from_itself(models, tmp_path):
    script_fails("no direction", "expo.py", "--sft-path", models.sft, "--aligned-path", models.sft, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_plain_form_has_all_it_needs(pair, tmp_path):
    """python -m plumbing.plain expo.py: one file, the same weights."""
    path = written("expo.py", tmp_path / "empty")
    run_here(
        path, *("--sft-path", pair[0], "--aligned-path", pair[1], "--alphas", 2, "--sweep-dir", "out"), cwd=path.parent
    )
    run_here(
        "expo.py", "--sft-path", pair[0], "--aligned-path", pair[1], "--alphas", 2, "--sweep-dir", "out", cwd=tmp_path
    )
    assert read(path.parent / "out/alpha_2.0").keys() == read(tmp_path / "out/alpha_2.0").keys()
    for name, weights in read(path.parent / "out/alpha_2.0").items():
        assert weights.equal(read(tmp_path / "out/alpha_2.0")[name]), name
