"""DR-PO, Dataset Reset Policy Optimization for RLHF (arXiv:2404.08495): ppo.py plus resets to dataset states.

With probability beta a rollout starts from the prompt plus a random prefix of the dataset's response: somebody has
already written a good beginning, the policy learns to finish. `diff ppo.py drpo.py` is the paper.

    python drpo.py --beta 1.0 --kl-coef 0.05              # embedded task; trains models/sft, models/reward if missing
    python drpo.py --beta 0                               # PPO, number for number

DR-PO = arXiv:2404.08495v3, PPO = arXiv:1707.06347, GAE = arXiv:1506.02438, N+ = arXiv:2403.17031 (the details of RLHF
with PPO). "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr. What differs from it:
 1. tokens after EOS are masked everywhere, as nobody reads them: KL, rewards, values, whitening, losses, statistics.
 2. an EOS in the last column counts as finished, because it is; sampling stops at EOS, which costs less.
 3. no whitened rewards (N+: lower win rate), no weight decay, LoRA only by flag; clipped gradients; every draw from --seed.
 4. the dataset prefix, no choice of the policy, is masked in value loss, whitening, KL too (874, 817, 830, 808 there).
 5. the prefix costs one forward pass, officially every forced token is decoded; the reset draws are seeded (635 there).
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

from data.tldr_mini.rubric import rubric_score

# reading, checking, saving, resuming, processes, memory: nothing in plumbing/ decides a number of the algorithm, and
# plumbing/plain.py says in a few lines what each of these names stands for
from plumbing import fail
from plumbing.flags import read_args, whole_batches
from plumbing.logits import output_head, selected_logprobs
from plumbing.models import build_missing, load, load_model, make_trainable, merge, save_model, trainable
from plumbing.processes import gradient_norm, in_chunks, micro_batches, start_processes, sum_over_processes
from plumbing.rewards import load_reward
from plumbing.rows import load_rows
from plumbing.runs import Run
from plumbing.sharding import fill, forward_pass, forward_passes
from plumbing.tokens import encode_rows, end_ids, pad, trim


@dataclass
class Args:
    """the algorithm, its data and its models; everything else is in plumbing/flags.py"""

    seed: int = 1
    """seed of every random draw: data order, sampling, minibatches"""
    dataset: str = "data/tldr_mini/reference"
    """hub name, folder or .jsonl/.parquet file with `prompt` and `completion` (and `rubric`, if quality can be computed)"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    eval_split: str = "test"
    """split for the final table; the picture uses `validation`"""
    eval_every: int = 10
    """updates between two evaluations on the validation split"""
    eval_rows: int = 400
    """most rows of a split to evaluate on"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT): start and KL anchor; the default is trained if missing"""
    reward_path: str = "models/reward"
    """reward model: folder or hub name, by default trained if missing; or FILE.py with score(prompt, response, row)"""
    output_dir: str = "models/drpo"
    """folder for the final model; a folder already there is kept under a numbered name"""
    total_episodes: int = 5120
    """responses to sample in the whole run"""
    batch_size: int = 64
    """responses per update"""
    minibatch_size: int = 64
    """responses per optimizer step"""
    num_ppo_epochs: int = 4
    """passes over each batch"""
    learning_rate: float = 3e-4
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
    kl_coef: float = 0.05
    """weight of the per-token KL penalty (lambda)"""
    gamma: float = 1.0
    """discount (gamma)"""
    gae_lambda: float = 0.95
    """bias-variance trade-off of the advantage estimate (lambda in GAE)"""
    clip_coef: float = 0.2
    """clip range of the ratio and of the value (epsilon)"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    max_grad_norm: float = 1.0
    """the gradient of policy and critic together is scaled down to this norm"""
    temperature: float = 1.0
    """sampling temperature, also applied to every log-prob"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""
    missing_eos_score: float = -1.0
    """score of a response without EOS; references average 0"""
    # new in DR-PO: how often to reset, and into what
    beta: float = 1.0
    """probability that a rollout starts from a dataset state instead of the prompt (beta); 0 is PPO"""
    reset_column: str = "completion"
    """column whose text the rollouts are reset into"""


# rollout
@forward_passes
def generate(model, context_ids, context_mask, uniforms, num_tokens, eos, temperature):
    """Continues every row of a left-padded context (B, C) until an EOS of eos (E,) or its own budget num_tokens (B,).

    -> generated_ids (B, R), 0 after the end. Token t is the inverse CDF at uniforms[row, t], so a row's tokens do not
    depend on the rows beside it. The context is one forward pass; finished rows leave the batch and the cache.
    """
    generated_ids = torch.zeros_like(uniforms, dtype=torch.long)  # (B, R)
    rows, cache = torch.arange(len(uniforms), device=uniforms.device), DynamicCache(config=model.config)
    going, (ids, mask) = torch.ones_like(rows, dtype=torch.bool), trim(context_ids, context_mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for t in range(uniforms.shape[1]):
        hidden = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        cdf = (output_head(model)(hidden).float() / temperature).softmax(-1).cumsum(-1)  # (rows, V)
        tokens = torch.searchsorted(cdf, uniforms[rows, t, None] * cdf[:, -1:], right=True).squeeze(1)
        tokens = tokens.clamp(max=cdf.shape[1] - 1)  # note: NaN gives V; run.check_finite, later, names its row
        generated_ids[rows, t] = tokens * going
        going &= ~torch.isin(tokens, eos) & (num_tokens[rows] > t + 1)  # differs from official code: rows end at EOS
        if not going.any():
            break
        if going.float().mean() < 0.9:  # copying the cache for every single row would take longer
            cache.batch_select_indices(going)
            rows, tokens, positions, mask, going = (x[going] for x in (rows, tokens, positions, mask, going))
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return generated_ids


def mask_to_eos(response_ids, eos):
    """Response mask (B, R): True up to and including the first EOS, which any id of eos (E,) is."""
    is_eos = torch.isin(response_ids, eos).long()
    return is_eos.cumsum(1) - is_eos == 0  # differs from official code (drpo.py:874, 881): nothing after EOS counts


# new in DR-PO: resets
def sample_reset_len(lengths, beta, rng):
    """Dataset tokens to keep (B,): 0 with probability 1 - beta or if L < 2, else uniform on 1..L-1; L counts EOS."""
    reset = (rng.random(len(lengths)) < beta) & (lengths >= 2)
    return np.where(reset, 1 + np.floor(rng.random(len(lengths)) * (lengths - 1)), 0).astype(np.int64)


def splice_response(offline_ids, generated_ids, reset_len):
    """Response (B, R): the dataset's token where t < reset_len, then the generated ones."""
    t = torch.arange(generated_ids.shape[1], device=reset_len.device) - reset_len.unsqueeze(1)  # (B, R)
    offline_ids = F.pad(offline_ids, (0, generated_ids.shape[1] - offline_ids.shape[1]))
    return torch.where(t < 0, offline_ids, generated_ids.gather(1, t.clamp(min=0)))


# log-probs, values, scores
def response_states(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Hidden states (B, R + 1, d): column t has read the prompt and t response tokens, so it predicts response token t."""
    mask = torch.cat([prompt_mask, response_mask], dim=1)  # (B, P + R)
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : mask.sum(1).max()]  # (B, L): what is real comes first
    ids = torch.cat([prompt_ids, response_ids], dim=1).gather(1, order)  # note: nothing sees padding on its right
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, d)
    column = torch.arange(-1, response_ids.shape[1], device=mask.device) + prompt_mask.sum(1)[:, None]  # (B, R + 1)
    return hidden.gather(1, column.clamp(max=ids.shape[1] - 1).unsqueeze(2).expand(-1, -1, hidden.shape[2]))


@forward_pass
def token_logprobs(model, prompt_ids, prompt_mask, response_ids, response_mask, action_mask, temperature):
    """Log-probs (B, R) of the response tokens where action_mask is True, 0 elsewhere.

    The output head runs there only.
    """
    states = response_states(model, prompt_ids, prompt_mask, response_ids, response_mask)[:, :-1]  # (B, R, d)
    hidden, tokens = states[action_mask], response_ids[action_mask]  # (actions, d), (actions,)
    picked = selected_logprobs(output_head(model), hidden, tokens, temperature)  # (actions,)
    return torch.zeros_like(action_mask, dtype=picked.dtype).masked_scatter(action_mask, picked)


@forward_pass
def token_values(critic, prompt_ids, prompt_mask, response_ids, response_mask):
    """Values (B, R): expected return before response token t is emitted."""
    states = response_states(critic, prompt_ids, prompt_mask, response_ids, response_mask)[:, :-1]
    return critic.score(states).squeeze(-1).float() - getattr(critic.config, "score_mean", 0.0)


@forward_pass
def sequence_scores(reward_model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Scores (B,), read at the last real token (N+ detail 12), centred so that references average 0 (N+ detail 15)."""
    states = response_states(reward_model, prompt_ids, prompt_mask, response_ids, response_mask)
    last = states[torch.arange(len(states)), response_mask.sum(1)]  # (B, d)
    return reward_model.score(last).squeeze(-1).float() - getattr(reward_model.config, "score_mean", 0.0)


def score_responses(reward, rows, batch, tokenizer, size):
    """Scores (B,): of a reward model, or of a function of rows and response texts (--reward-path FILE.py)."""
    if isinstance(reward, torch.nn.Module):
        return in_chunks(sequence_scores, reward, size, *batch, lengths=batch[1].sum(1) + batch[3].sum(1))
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in zip(*batch[2:])]
    return torch.tensor(reward(rows, texts), device=batch[0].device)


# rewards, advantages, losses
def make_rewards(kl, scores, action_mask, response_mask, kl_coef):
    """Rewards (B, R): -kl_coef * kl on every action, plus the score (B,) on the last real token."""
    rewards = -kl_coef * kl * action_mask
    rewards[torch.arange(len(scores)), response_mask.sum(1) - 1] += scores
    return rewards


def compute_gae(rewards, values, action_mask, gamma, gae_lambda):
    """Advantages and returns (B, R) over the actions, which are contiguous in each row (GAE Eq. 16, truncated)."""
    values = values * action_mask
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = (delta + gamma * gae_lambda * running) * action_mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def masked_whiten(x, mask):
    """Mean 0 and variance 1 over the True entries, 0 elsewhere (N+ detail 25)."""
    mean = (x * mask).sum() / mask.sum()
    var = ((x - mean) ** 2 * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(var + 1e-8) * mask


def policy_loss(new_logprobs, logprobs, advantages, clip_coef):
    """Clipped surrogate per token (M, R), negated for descent (PPO Eq. 7)."""
    ratio = torch.exp(new_logprobs - logprobs)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef))


def value_loss(new_values, values, returns, clip_coef):
    """Half squared error per token (M, R), with the step away from the old value clipped as in N+."""
    clipped = values + (new_values - values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)


# evaluation
def evaluate(policy, rows, ref_policy, reward, tokenizer, args, device):
    """Samples one response per row from its prompt, at the training temperature and from one fixed table of uniforms.

    -> samples (a dict a row) and their means: win rate against the reference (by rubric, else by score; a tie is half a
    win), rubric, score, KL to SFT (nats per response), length (tokens, EOS included), share that ended with EOS.
    """
    size, eos, temperature = args.micro_batch_size, torch.tensor(end_ids(tokenizer), device=device), args.temperature
    prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (B, P), mask (B, P)
    offline = pad([row["offline_ids"] for row in rows], "right", device)  # the references
    table = np.random.default_rng(args.seed).random((len(rows), args.response_length), dtype=np.float32)
    uniforms, budget = torch.from_numpy(table).to(device), torch.full((len(rows),), args.response_length, device=device)
    context, lengths = (*prompts, uniforms, budget), prompts[1].sum(1)
    rollout = partial(in_chunks, generate, policy, 4 * size, *context, lengths=lengths)
    response_ids = rollout(eos=eos, temperature=temperature)  # (B, R)
    mask, ended = mask_to_eos(response_ids, eos), torch.isin(response_ids, eos).any(1)
    batch, lengths = (*prompts, response_ids, mask), prompts[1].sum(1) + mask.sum(1)
    scores = score_responses(reward, rows, batch, tokenizer, size)
    scores = torch.where(ended, scores, args.missing_eos_score)
    logprobs, ref_logprobs = (
        in_chunks(token_logprobs, model, size, *batch, mask, lengths=lengths, temperature=temperature)
        for model in (policy, ref_policy)
    )
    texts = [tokenizer.decode(ids[keep], skip_special_tokens=True) for ids, keep in zip(response_ids, mask)]
    found = {"score": scores, "kl": (logprobs - ref_logprobs).sum(1), "length": mask.sum(1), "eos": ended}
    if "rubric" in rows[0]:
        quality = torch.tensor([rubric_score(text, row["rubric"]) for text, row in zip(texts, rows)])
        target = torch.tensor([rubric_score(row["completion"], row["rubric"]) for row in rows])
        found = {"rubric": quality} | found
    else:
        quality, target = scores, score_responses(reward, rows, (*prompts, *offline), tokenizer, size)
    found = {"win_rate": 0.5 + 0.5 * (quality - target).sign()} | found
    found = {name: value.float().cpu() for name, value in found.items()}  # each (B,)
    samples = [{"prompt": row["prompt"], "response": text} for row, text in zip(rows, texts)]
    samples = [sample | {name: x[i].item() for name, x in found.items()} for i, sample in enumerate(samples)]
    return samples, {name: x.mean().item() for name, x in found.items()}


if __name__ == "__main__":
    args = read_args(Args, may_be_0="learning_rate kl_coef vf_coef gamma gae_lambda beta")
    if args.total_episodes < args.batch_size or args.batch_size % args.minibatch_size:
        fail("--total-episodes must be at least --batch-size, and --minibatch-size must divide --batch-size")
    if not 0 <= args.beta <= 1:  # new in DR-PO: a probability
        fail(f"--beta {args.beta} is a probability, it must lie in 0..1")
    device = start_processes(args, minibatch_size=args.minibatch_size)
    run = Run(args)
    DATA, SAMPLING, MINIBATCHES, RESETS = 1, 2, 3, 4  # streams: a training draw is fixed by (seed, stream, update)

    # data
    names = (args.train_split, args.validation_split, args.eval_split)
    columns = ("prompt", "completion", args.reset_column)  # new in DR-PO: the column to reset into
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path, args.max_rows)
    build_missing(args.sft_path, args.reward_path)
    tokenizer = load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        # new in DR-PO: the response that resets go into, which need not be the reference
        encode_rows(rows, tokenizer, args, offline_ids="completion", reset_ids=args.reset_column)
    train, watched, held_out = splits[names[0]], *(splits[name][: args.eval_rows] for name in names[1:])
    epochs = range(-(-args.total_episodes // len(train)))  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # models; they come without dropout, or the ratios of the first epoch would not be 1 (N+ detail 7)
    causal, scalar = AutoModelForCausalLM, AutoModelForSequenceClassification
    policy, ref_policy = (load_model(causal, args.sft_path, tokenizer, args, device) for _ in range(2))
    rule = args.reward_path.endswith(".py")  # then the critic starts from the policy's body, with values of 0
    reward = load_reward(args.reward_path) if rule else load_model(scalar, args.reward_path, tokenizer, args, device)
    critic = load_model(scalar, args.sft_path if rule else args.reward_path, tokenizer, args, device, num_labels=1)
    if rule:
        fill(critic.score.weight, torch.zeros_like(critic.score.weight))
        critic.config.score_mean = 0.0  # the policy's config may have one, as a reward model's does
    trained = make_trainable(policy, ref_policy, args)
    make_trainable(critic, critic if rule else reward, args)  # differs from official code: LoRA freezes the head
    parameters = trainable(policy=policy, critic=critic)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)

    size, eos, temperature = args.micro_batch_size, torch.tensor(end_ids(tokenizer), device=device), args.temperature
    rollout = partial(in_chunks, generate, policy, 4 * size, eos=eos, temperature=temperature)  # more rows cost little
    frozen = {"ref_policy": ref_policy, "reward": reward, "tokenizer": tokenizer}
    measure = partial(evaluate, **frozen, args=args, device=device)
    num_updates = whole_batches(args.total_episodes, args.batch_size)

    run.open(parameters, optimizer)  # with --resume, where the last checkpoint was
    if not run.history:
        samples, point = measure(policy, watched)
        run.history.append({"episodes": 0} | point)
        run.sample(samples[:3])
    for update in run.updates(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 1 sample prompts
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        rows = [train[i] for i in picked]
        prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (B, P), mask (B, P)
        rng = np.random.default_rng([args.seed, SAMPLING, update])
        uniforms = torch.from_numpy(rng.random((args.batch_size, args.response_length), dtype=np.float32)).to(device)

        # 2 new in DR-PO: choose reset points, roll out from there; the uniforms of the prefix go unused
        offline_ids, offline_mask = pad([row["reset_ids"] for row in rows], "right", device)  # (B, L)
        rng = np.random.default_rng([args.seed, RESETS, update])  # differs from official code (drpo.py:635): seeded
        reset_len = torch.from_numpy(sample_reset_len(offline_mask.sum(1).cpu().numpy(), args.beta, rng)).to(device)
        states = [row["prompt_ids"] + row["reset_ids"][:k] for row, k in zip(rows, reset_len.tolist())]
        context = pad(states, "left", device)  # (B, up to P + L); differs from official code: read in one forward pass
        column = torch.arange(args.response_length, device=device)  # (R,)
        uniforms = uniforms.gather(1, (column + reset_len.unsqueeze(1)).clamp(max=args.response_length - 1))
        budget = args.response_length - reset_len
        generated_ids = rollout(*context, uniforms, budget, lengths=(budget, context[1].sum(1)))
        response_ids = splice_response(offline_ids, generated_ids, reset_len)
        response_mask = mask_to_eos(response_ids, eos)  # (B, R), as response_ids
        action_mask = response_mask & (column >= reset_len.unsqueeze(1))  # the policy is not taught on dataset tokens
        run.lap("rollout", tokens=action_mask.sum())

        # 3 score; log-probs and values under the models as they are before the update
        batch = (*prompts, response_ids, response_mask)
        lengths = prompts[1].sum(1) + response_mask.sum(1)  # (B,); rows of like length share a micro-batch
        scores = score_responses(reward, rows, batch, tokenizer, size)  # (B,)
        ended = torch.isin(response_ids, eos).any(1)  # differs from official code (drpo.py:803): in any column
        scores = torch.where(ended, scores, args.missing_eos_score)  # N+ detail 23
        logprobs, ref_logprobs = (
            in_chunks(token_logprobs, model, size, *batch, action_mask, lengths=lengths, temperature=temperature)
            for model in (policy, ref_policy)
        )  # each (B, R)
        values = in_chunks(token_values, critic, size, *batch, lengths=lengths)  # (B, R)
        run.check_finite(picked, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values)

        # 4 KL penalty and advantages
        kl = logprobs - ref_logprobs  # (B, R), 0 off the actions: differs from official code (drpo.py:808)
        rewards = make_rewards(kl, scores, action_mask, response_mask, args.kl_coef)
        advantages, returns = compute_gae(rewards, values, action_mask, args.gamma, args.gae_lambda)
        advantages = masked_whiten(advantages, action_mask)  # differs from official code (drpo.py:817, 830): actions
        run.lap("score")

        # 5 PPO epochs
        stats, rng = [], np.random.default_rng([args.seed, MINIBATCHES, update])
        orders = [torch.from_numpy(rng.permutation(args.batch_size)).to(device) for _ in range(args.num_ppo_epochs)]
        for minibatch in torch.cat(orders).split(args.minibatch_size):
            num_actions, sums = action_mask[minibatch].sum(), Counter()  # differs from official code (drpo.py:874)
            for micro in micro_batches(minibatch, lengths, size):
                part, mask = [tensor[micro] for tensor in batch], action_mask[micro]
                new_logprobs = token_logprobs(policy, *part, mask, temperature)
                log_ratio = new_logprobs - logprobs[micro]
                terms = {
                    "loss/policy": policy_loss(new_logprobs, logprobs[micro], advantages[micro], args.clip_coef),
                    "policy/approx_kl": log_ratio.expm1() - log_ratio,
                    "policy/clipfrac": log_ratio.expm1().abs() > args.clip_coef,
                    "policy/ratio_error": log_ratio.expm1().abs(),
                }  # each (micro, R)
                terms = {name: (term * mask).sum() / num_actions for name, term in terms.items()}
                terms["loss/policy"].backward()  # now, so that the critic's activations find its memory free
                losses = value_loss(token_values(critic, *part), values[micro], returns[micro], args.clip_coef)
                terms["loss/value"] = (losses * mask).sum() / num_actions
                (args.vf_coef * terms["loss/value"]).backward()
                sums.update({name: term.item() for name, term in terms.items()})
            sum_over_processes(sums, parameters)
            norm = gradient_norm(parameters)
            sums["grad_norm"] = norm.item()
            run.check_finite(picked[minibatch.cpu()], **sums)
            # differs from official code: the gradient is clipped, and AdamW decays no weights
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
            optimizer.step()
            optimizer.zero_grad()
            stats.append(sums)
        run.lap("optimise")

        # 6 log
        metrics = {
            "episodes": update * args.batch_size,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "objective/score": scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/reward": rewards.sum(1).mean(),
            "response/eos": ended.float().mean(),
            "response/length": response_mask.sum(1).float().mean(),
            "reset/fraction": (reset_len > 0).float().mean(),  # new in DR-PO: how many rows were reset
            "reset/length": reset_len.float().mean(),  # new in DR-PO: tokens kept, 0 where none
            "policy/entropy": -logprobs.sum() / action_mask.sum(),
            "policy/first_ratio_error": stats[0]["policy/ratio_error"],
        }
        metrics |= {name: float(np.mean([sums[name] for sums in stats])) for name in stats[0]}
        if update % args.eval_every == 0 or update == num_updates:
            samples, point = measure(policy, watched)
            run.history.append({"episodes": update * args.batch_size} | point)
            run.sample(samples[:3])
            metrics |= {f"eval/{name}": value for name, value in point.items()}
        run.log(metrics, score=metrics["objective/score"], kl=metrics["objective/kl"], eos=metrics["response/eos"])

    # 7 save, evaluate on held-out prompts, show
    save_model(args.output_dir, merge(trained), tokenizer)
    before, sft_result = measure(ref_policy, held_out)
    after, result = measure(policy, held_out)
    samples = [
        f"\n{row['prompt']}\n  reference:{row['completion']}\n  SFT:      {x['response']}\n  tuned:    {y['response']}"
        for row, x, y in list(zip(held_out, before, after))[:3]
    ]
    # new in DR-PO: from a reset, [dataset prefix] in brackets, then the policy's own tokens
    shown, rng = held_out[:3], np.random.default_rng([args.seed, RESETS])
    kept = sample_reset_len(np.array([len(row["reset_ids"]) for row in shown]), 1.0, rng)
    context = pad([row["prompt_ids"] + row["reset_ids"][:k] for row, k in zip(shown, kept)], "left", device)
    uniforms = torch.from_numpy(rng.random((len(shown), args.response_length), dtype=np.float32)).to(device)
    budget = args.response_length - torch.from_numpy(kept).to(device)
    own = rollout(*context, uniforms, budget, lengths=budget)
    for row, k, ids, mask in zip(shown, kept, own, mask_to_eos(own, eos)):
        text = tokenizer.decode(ids[mask][: args.response_length - k], skip_special_tokens=True)
        samples.append(f"\n  from a reset: [{tokenizer.decode(row['reset_ids'][:k])}]{text}")
    run.finish({"SFT": sft_result, "DR-PO": result}, f"{len(held_out)} prompts of {args.eval_split}", samples)
