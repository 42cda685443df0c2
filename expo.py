"""ExPO (model extrapolation, weak-to-strong): no training, a step further from the SFT policy through the aligned one.

    theta = theta_1 + alpha (theta_1 - theta_0),     theta_0 the SFT policy, theta_1 the aligned one, alpha > 0

Alignment moves the weights little, so to first order what it gained grows with the step. It pays most where training
stopped early, and only judging tells how far to go: this script writes a folder for every alpha, judge.py compares them.

    python expo.py                                                    # embedded task; trains models/dpo if missing
    python expo.py --sft-path my_sft --aligned-path my_dpo --alphas 0.3 0.5

ExPO = arXiv:2404.16792. "Official code" is chujiezheng/LLM-Extrapolation at 04e04f5. What differs from it:
 1. the step is taken in float32, not in bfloat16, whose 8 bits round small changes of a weight away.
 2. two policies of which one cannot have been trained from the other are refused.
"""

import math
import os
import shlex
from dataclasses import dataclass
from types import SimpleNamespace

from transformers import AutoModelForCausalLM, AutoTokenizer

# reading, checking, saving, resuming, processes, memory: nothing in plumbing/ decides a number of the algorithm, and
# plumbing/plain.py says in a few lines what each of these names stands for
from plumbing import fail
from plumbing.flags import read_args
from plumbing.models import build_missing, load, load_model, save_model
from plumbing.processes import start_processes


@dataclass
class Args:
    """the two policies and how far to go; everything else is in plumbing/flags.py"""

    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (theta_0); the default is trained if missing"""
    aligned_path: str = "models/dpo"
    """folder or hub name of a policy trained from it (theta_1); the default belongs to models/sft, is trained if missing"""
    alphas: tuple[float, ...] = (-0.5, 0.1, 0.3, 0.5)
    """steps to take (alpha), a policy each: 0 is theta_1, -1 theta_0; the paper has 0.1 to 0.5, and up to 25 early in training"""
    sweep_dir: str = "models/expo"
    """folder for the policies: alpha_0.5 and the like; what is already in one is kept under a numbered name"""


def layout(policy):
    """What a policy and one trained from it have in common: class, heads, names and shapes of all weights."""
    parts = {"class": type(policy).__name__, "heads": getattr(policy.config, "num_attention_heads", None)}
    return parts | {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}


def extrapolate(aligned, sft, alpha):
    """theta_1 + alpha (theta_1 - theta_0) of one tensor in both policies, any shape; for alpha 0 theta_1 bit for bit."""
    return aligned + alpha * (aligned - sft) if alpha else aligned


if __name__ == "__main__":
    args = read_args(Args, trains=False)
    alphas = dict.fromkeys(args.alphas)
    if not alphas or not all(map(math.isfinite, alphas)):
        fail(f"--alphas needs at least one number, all of them finite, not {args.alphas}")
    if args.aligned_path == Args.aligned_path and args.sft_path != Args.sft_path:
        fail("--sft-path needs --aligned-path beside it: a policy that was trained from there")
    if os.path.realpath(args.sweep_dir) in map(os.path.realpath, (args.sft_path, args.aligned_path)):
        fail(f"--sweep-dir {args.sweep_dir} is one of the two policies")
    start_processes(args)

    # 1 both policies; nothing is written before they are known to fit
    build_missing(args.sft_path, args.aligned_path)
    tokenizer = load(AutoTokenizer, args.aligned_path)
    no_text = SimpleNamespace(prompt_length=0, response_length=0)  # nothing is read here, weights alone matter
    paths = (args.aligned_path, args.sft_path)
    policy, sft_policy = (load_model(AutoModelForCausalLM, path, tokenizer, no_text, "cpu") for path in paths)
    ours, others = layout(policy), layout(sft_policy)
    for name in ours | others:
        if ours.get(name) != others.get(name):
            fail(f"{name} is {ours.get(name)} in {args.aligned_path}, {others.get(name)} in {args.sft_path}")
    aligned, sft = ({name: p.data for name, p in model.named_parameters()} for model in (policy, sft_policy))
    moved = math.hypot(*((aligned[name] - sft[name]).norm().item() for name in sft))
    norm = math.hypot(*(x.norm().item() for x in sft.values()))
    if moved == 0:
        fail(f"--aligned-path {args.aligned_path} has the weights of --sft-path {args.sft_path}: no direction to go in")
    print(f"training moved {args.sft_path} by {moved / norm:.4f} of its norm to {args.aligned_path}")

    # 2 a policy for every alpha
    folders = [f"{args.sweep_dir}/alpha_{alpha}" for alpha in alphas]
    for alpha, folder in zip(alphas, folders):
        for name, parameter in policy.named_parameters():
            parameter.data = extrapolate(aligned[name], sft[name], alpha)
            if not parameter.isfinite().all():
                fail(f"--alphas {alpha} goes too far: {name} is not finite; {folder} is not written")
        save_model(folder, policy, tokenizer)

    # 3 choose among them on validation prompts, since alpha is fitted to what it is chosen by
    policies = ["--policies", args.sft_path, args.aligned_path, *folders, "--sft-path", args.sft_path]
    print(f"to compare them: python judge.py {shlex.join(policies)} --split validation")
