"""rejection_sampling.py: acceptance, pairs and fit against slow versions, on a finite set of responses, and short real runs."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_metrics, read_rows, run_here, slow_for
from torch.testing import assert_close

import dpo
import rejection_sampling as rs

PI_0 = torch.tensor([0.3, 0.2, 0.2, 0.22, 0.06, 0.02], dtype=torch.float64)  # six responses, and what each is worth
REWARDS = torch.tensor([0.0, 0.3, -0.4, 0.8, 1.1, 1.0], dtype=torch.float64)
CRITICAL = 20.5  # of chi-square with 5 degrees of freedom: passed once in a thousand times


def gibbs(eta):
    """pi_0 exp(r / eta)."""
    weights = [p * math.exp(r / eta) for p, r in zip(PI_0.tolist(), REWARDS.tolist())]
    return torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)


def propose(policy, m, n, rng):
    """Responses (m, n), each a number from 0 to 5."""
    return torch.from_numpy(rng.choice(6, size=(m, n), p=policy.numpy()))


def accept(candidates, coef, rng):
    return torch.from_numpy(rng.random(candidates.shape)) < rs.acceptance(REWARDS[candidates], coef)


def chi_square(samples, policy):
    counts, expected = torch.bincount(samples, minlength=6), policy * len(samples)
    rare = expected < 5  # they count as one
    counts, expected = (
        torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) if rare.any() else x for x in (counts, expected)
    )
    return ((counts - expected) ** 2 / expected).sum().item()


# formulas
def test_acceptance_against_loops():
    rng = random.Random(0)
    scores = [[rng.gauss(0, 2) for _ in range(5)] for _ in range(4)]
    found = rs.acceptance(torch.tensor(scores, dtype=torch.float64), 0.7)
    for row, chances in zip(scores, found.tolist()):
        assert chances == pytest.approx([math.exp(x * 0.7) / math.exp(max(row) * 0.7) for x in row], rel=1e-9)
        assert max(chances) == 1


def test_a_huge_eta_accepts_everything_and_a_tiny_one_the_best():
    scores = torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, -1e4]])
    assert_close(rs.acceptance(scores, 1 / 1e12), torch.ones(2, 3))
    assert rs.acceptance(scores, 1 / 1e-12).tolist() == [[0, 1, 0], [1, 1, 0]]


def test_pairs_against_loops():
    rng = random.Random(1)
    m, n = 7, 6
    texts = [[[rng.randrange(2) for _ in range(3)] for _ in range(n)] for _ in range(m)]
    scores = [[rng.choice([0.0, 0.5, 1.0]) for _ in range(n)] for _ in range(m)]
    accepted = [[rng.random() < 0.7 for _ in range(n)] for _ in range(m)]
    expected, kinds = [], set()
    for k in range(m):
        for i in range(n):
            for j in range(i + 1, n):
                if accepted[k][i] and accepted[k][j]:
                    same, tied = texts[k][i] == texts[k][j], scores[k][i] == scores[k][j]
                    expected.append(([k * n + i, k * n + j], not (same or tied)))
                    kinds.add((same, tied))
    ids = torch.tensor(texts).flatten(0, 1)
    pairs, counts = rs.accepted_pairs(torch.tensor(accepted), torch.tensor(scores), ids)
    assert list(zip(pairs.tolist(), counts.tolist())) == expected and len(kinds) == 4
    pairs, counts = rs.accepted_pairs(
        torch.tensor(accepted), torch.ones(m, n), ids
    )  # no score differs: all texts that do
    assert counts.tolist() == [not ids[i].equal(ids[j]) for i, j in pairs.tolist()] and 0 < counts.sum() < len(counts)


def random_pairs(count=9):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(count, 2, generator=generator, dtype=torch.float64) * size for size in (5, 5, 2))


def test_the_fit_is_dpo_expected_over_bradley_terry_labels():
    logprobs, ref_logprobs, scores = random_pairs()
    terms = rs.fit_terms(logprobs, ref_logprobs, scores, 0.3)
    for k in range(len(scores)):
        (a, b), (ref_a, ref_b), (score_a, score_b) = (x[k].tolist() for x in (logprobs, ref_logprobs, scores))
        chance = math.exp(score_a) / (math.exp(score_a) + math.exp(score_b))
        losses = [
            dpo.dpo_loss(*torch.tensor(x).double(), 0.3).item() for x in ((a, b, ref_a, ref_b), (b, a, ref_b, ref_a))
        ]
        assert terms["loss"][k].item() == pytest.approx(chance * losses[0] + (1 - chance) * losses[1], rel=1e-6)
        margin = 0.3 * ((a - ref_a) - (b - ref_b)) * (1 if score_a > score_b else -1)
        assert terms["margin"][k].item() == pytest.approx(margin, rel=1e-9)
        assert terms["accuracy"][k].item() == (margin > 0)
        assert terms["gap"][k].item() == pytest.approx(abs(score_a - score_b), rel=1e-9)
    assert set(terms["accuracy"].tolist()) == {0, 1}


def test_the_order_within_a_pair_does_not_matter():
    tensors = list(random_pairs())
    for name, x in rs.fit_terms(*tensors, 0.3).items():
        assert_close(x, rs.fit_terms(*(tensor.flip(1) for tensor in tensors), 0.3)[name])


def test_at_the_target_the_margin_is_the_gap_and_the_gradient_0():
    _, ref_logprobs, scores = random_pairs()
    logprobs = (ref_logprobs + scores / 0.3 - 7).requires_grad_()
    terms = rs.fit_terms(logprobs, ref_logprobs, scores, 0.3)
    terms["loss"].sum().backward()
    assert_close(terms["margin"], terms["gap"])
    assert_close(logprobs.grad, torch.zeros_like(logprobs), rtol=0, atol=1e-12)


# a finite set of responses
def test_what_one_step_accepts_follows_the_target():
    rng = np.random.default_rng(0)
    candidates = propose(PI_0, 400, 128, rng)
    samples = candidates[accept(candidates, 1 / 0.4, rng)]
    assert len(samples) > 5000
    assert chi_square(samples, gibbs(0.4)) < CRITICAL
    for other in (PI_0, gibbs(0.35), gibbs(0.45)):
        assert chi_square(samples, other) > CRITICAL


def test_what_three_steps_accept_follows_the_target_and_takes_fewer_candidates():
    rng, eta, policy, cost = np.random.default_rng(1), 0.1, PI_0, 0
    for i in (1, 2, 3):
        candidates = propose(policy, 100, 128, rng)
        accepted = accept(candidates, (i - (i - 1)) / (3 * eta), rng)
        cost += accepted.numel() / accepted.sum().item()  # candidates of this step for one that it accepts
        policy = gibbs(3 * eta / i)  # an exact fit
        assert chi_square(candidates[accepted], policy) < CRITICAL
    assert chi_square(candidates[accepted], gibbs(1.5 * eta)) > CRITICAL
    hard = propose(PI_0, 100, 128, rng)
    at_once = accept(hard, 1 / eta, rng)
    # rates multiply to that of one step, so that many steps need the sum and one step the product of what each needs
    assert cost < 0.75 * at_once.numel() / at_once.sum().item()


def test_fits_on_accepted_pairs_reach_the_target_of_every_step():
    """The whole loop with a table for a policy: propose, accept, pair, fit; DPO's reference is pi_0 and its beta eta_i."""
    rng, eta, policy, before = np.random.default_rng(2), 0.4, PI_0, 0.0
    for i in (1, 2, 3):
        candidates = propose(policy, 100, 24, rng)
        inverse = i / (3 * eta)
        accepted = accept(candidates, inverse - before, rng)
        pairs, counts = rs.accepted_pairs(accepted, REWARDS[candidates], candidates.flatten().unsqueeze(1))
        pairs = candidates.flatten()[pairs[counts]]  # (k, 2) of responses
        logits = PI_0.log().clone().requires_grad_()
        optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def loss(logits=logits, pairs=pairs, beta=1 / inverse, optimizer=optimizer):
            optimizer.zero_grad()
            logprobs = logits.log_softmax(0)[pairs]
            mean = rs.fit_terms(logprobs, PI_0.log()[pairs], REWARDS[pairs], beta)["loss"].mean()
            mean.backward()
            return mean

        optimizer.step(loss)
        policy, before = logits.detach().softmax(0), inverse
        assert_close(policy, gibbs(1 / inverse), rtol=1e-3, atol=1e-5)
    assert policy[4:].sum() > 3 * PI_0[4:].sum()  # it has moved


# real runs
SHORT = ("--prompts-per-step", 6, "--samples-per-prompt", 8, "--updates-per-step", 3, "--batch-size", 16)
SHORT += ("--eval-every", 2, "--eval-rows", 8, "--num-steps", 2, "--eta", 0.2)


@pytest.fixture(scope="module")
def runs(models):
    def run(name, *flags):
        output, run_dir = models.folder / f"rs_{name}", models.folder / f"runs/rs_{name}"
        command = (*models.flags, *SHORT, "--output-dir", output, "--run-name", f"rs_{name}", *flags)
        done = run_here("rejection_sampling.py", *command, cwd=models.folder)
        result = json.loads((run_dir / "result.json").read_text())
        return SimpleNamespace(
            dir=run_dir, output=output, metrics=read_metrics(run_dir), result=result, stdout=done.stdout
        )

    return SimpleNamespace(
        first=run("first"),
        again=run("again", "--micro-batch-size", 5),
        other_seed=run("other_seed", "--seed", 2),
        all=run("all", "--eta", 1e9, "--learning-rate", 0),
        one=run("one", "--num-steps", 1, "--prompts-per-step", 12),
    )


STEP = {"accept/rate", "accept/effective", "accept/score", "accept/control", "objective/score"}
STEP |= {"pairs/dropped", "pairs/used", "episodes", "step", "eta"}


def test_the_log(runs):
    metrics = runs.first.metrics
    assert [line["update"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in metrics] == [1, 1, 1, 2, 2, 2]
    assert [line["episodes"] for line in metrics] == [48] * 3 + [96] * 3
    assert [line["eta"] for line in metrics] == pytest.approx([0.4] * 3 + [0.2] * 3)
    assert [line["learning_rate"] for line in metrics] == pytest.approx([3e-4 * x / 6 for x in (6, 5, 4, 3, 2, 1)])
    assert [line["update"] for line in metrics if "eval/score" in line] == [2, 4, 6]
    for first in (0, 3):
        for line in metrics[first : first + 3]:
            assert all(line[name] == metrics[first][name] for name in STEP)
        assert metrics[first]["accept/score"] >= metrics[first]["accept/control"]
        assert 1 / 8 <= metrics[first]["accept/rate"] < 1 and 1 <= metrics[first]["accept/effective"] < 8
    assert metrics[0]["accept/score"] != metrics[3]["accept/score"]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the policy is the reference
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert set(runs.first.result) == {"SFT", "RS"} and runs.first.result["RS"]["kl"] > 0
    assert runs.first.stdout.splitlines()[-1].startswith(f"final model: {runs.first.output} ")
    samples = read_rows(runs.first.dir / "samples.jsonl")
    assert [sample["update"] for sample in samples] == [2] * 3 + [4] * 3 + [6] * 3


def test_a_huge_eta_accepts_every_candidate(runs):
    for line in runs.all.metrics:
        assert line["accept/rate"] == 1 and line["accept/effective"] == pytest.approx(8)
        assert line["accept/score"] == pytest.approx(line["objective/score"], abs=1e-6)
        assert line["accept/control"] == pytest.approx(line["objective/score"], abs=1e-6)
        kept = round((1 - line["pairs/dropped"]) * 6 * 8 * 7 / 2)  # of all pairs of 8 candidates for 6 prompts
        assert line["pairs/used"] == kept


def test_one_step_goes_the_whole_way_at_once(runs):
    first, line = runs.first.metrics[0], runs.one.metrics[0]
    assert [x["update"] for x in runs.one.metrics if "eval/score" in x] == [2, 3]  # and at the end
    assert len(runs.one.metrics) == 3 and line["eta"] == 0.2 and line["episodes"] == 96
    assert line["accept/rate"] < first["accept/rate"]  # which goes half of it
    assert line["accept/effective"] < first["accept/effective"]


def test_the_seed_fixes_everything_and_micro_batches_only_round(runs):
    for line, again in zip(runs.first.metrics, runs.again.metrics, strict=True):
        same = [name for name in line if not (name == "accuracy" and line["update"] == 1)]  # ties decided by rounding
        assert [again[name] for name in same] == pytest.approx([line[name] for name in same], rel=2e-3, abs=1e-4)
    assert runs.other_seed.metrics[0]["objective/score"] != runs.first.metrics[0]["objective/score"]


def test_a_policy_that_does_not_move_is_the_reference(runs):
    for line in runs.all.metrics:
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-4) and line["margin"] == pytest.approx(0, abs=1e-4)
    assert runs.all.result["RS"] == pytest.approx(runs.all.result["SFT"], abs=1e-4)


@pytest.mark.parametrize("kept", slow_for((3, 4), (2, 3, 4)))
def test_resumed_within_a_step_or_between_two_equals_undisturbed(kept, runs, models, tmp_path):
    flags = (*models.flags, *SHORT, "--save-every", 1, "--keep-checkpoints", 6, "--output-dir", "out")
    run_here("rejection_sampling.py", *flags, "--run-name", "run", cwd=tmp_path)
    for path in (tmp_path / "runs/run").glob("checkpoint_*"):
        if int(path.name.split("_")[1]) > kept:
            path.unlink()
    run_here("rejection_sampling.py", "--resume", "run", cwd=tmp_path)
    assert read_metrics(tmp_path / "runs/run", start=0) == read_metrics(runs.first.dir, start=0)
    assert json.loads((tmp_path / "runs/run/result.json").read_text()) == runs.first.result
    assert (tmp_path / "out/model.safetensors").read_bytes() == (runs.first.output / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_function_as_the_reward_and_nothing_to_tell_apart(models, tmp_path):
    (tmp_path / "rule.py").write_text("def score(prompt, response, row):\n    return len(response) / 100\n")
    (tmp_path / "flat.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    flags = (*models.flags, *SHORT, "--missing-eos-score", 1, "--output-dir", "out")
    run_here("rejection_sampling.py", *flags, "--reward-path", "rule.py", "--run-name", "rule", cwd=tmp_path)
    assert read_metrics(tmp_path / "runs/rule")[0]["accept/score"] > 0
    flat = ("--reward-path", "flat.py", "--run-name", "flat")
    run_here("rejection_sampling.py", *flags, *flat, cwd=tmp_path)
    for line in read_metrics(tmp_path / "runs/flat"):
        assert (
            line["accept/rate"] == 1 and line["pairs/used"] > 0 and line["loss"] == pytest.approx(math.log(2), abs=1e-4)
        )
    assert json.loads((tmp_path / "runs/flat/result.json").read_text())["RS"]["kl"] == pytest.approx(0, abs=1e-3)
    bold = (*models.flags, *SHORT[:-2], "--eta", 1e-9)  # the best alone is accepted
    done = run_here("rejection_sampling.py", *bold, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "error: step 1: no prompt has two different accepted candidates" in done.stderr
