"""The other rules of benchmark/resets/: small diffs of drpo.py as it is committed, which do what their names say."""

import runpy
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats


@pytest.fixture(params=["backward", "cosine", "adaptive"])
def rule(request, tmp_path):
    """-> its name, its sample_reset_len."""
    patch = ROOT / f"benchmark/resets/{request.param}.diff"
    changed = [line for line in patch.read_text().splitlines()[2:] if line.startswith(("+", "-"))]
    assert 0 < len(changed) <= 15
    (tmp_path / "drpo.py").write_bytes((ROOT / "drpo.py").read_bytes())
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    return request.param, runpy.run_path(str(tmp_path / "drpo.py"))["sample_reset_len"]


def test_other_rules_leave_something_to_decide_and_heed_beta(rule):
    _, sample = rule
    lengths = np.arange(1, 40).repeat(50)
    for more in ([0.01], [1.0], [0.9]) if rule[0] != "adaptive" else ([0.0, 1.0], [0.99, 1.0]):
        kept = sample(lengths, 1.0, np.random.default_rng(0), *more)
        assert kept.dtype == np.int64 and (kept >= 0).all() and (kept <= lengths - 1).all()
        assert (sample(lengths, 0.0, np.random.default_rng(0), *more) == 0).all()


def test_other_rules_follow_their_schedule(rule):
    name, sample = rule
    lengths, rng = np.full(20_000, 60), np.random.default_rng(0)
    if name == "backward":
        for progress, kept in ((0.01, {50}), (1 / 6, {50}), (0.2, {40}), (0.8, {10}), (0.9, {50, 40, 30, 20, 10, 0})):
            assert set(sample(lengths, 1.0, rng, progress)) == kept
    elif name == "cosine":
        for progress, share in ((0.25, 0.5 + 0.5 * 0.5**0.5), (0.5, 0.5), (0.75, 0.5 - 0.5 * 0.5**0.5)):
            counts = np.bincount(sample(lengths, 1.0, rng, progress) // 12, minlength=5)
            wanted = stats.binom(5, share).pmf(range(6)) * len(lengths)
            assert stats.chisquare(counts, [*wanted[:4], wanted[4] + wanted[5]]).pvalue > 1e-3  # 59 of 60, not all
    else:
        low = np.where(np.arange(len(lengths)) < 10_000, 0.0, 0.5)
        kept = sample(lengths, 1.0, rng, low, 0.75) / 60
        assert (kept[:10_000].min(), kept[10_000:].min(), kept.max()) == (0, 0.5, 44 / 60)
