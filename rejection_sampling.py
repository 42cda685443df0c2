"""Rejection sampling: DPO on pairs of samples of the policy that is aimed at, pi_0 exp(r / eta), in steps towards it.

Candidates of the SFT policy pi_0, accepted with probability exp((r - r_max) / eta), are samples of it; few are, where
eta is small. So eta falls in N steps: the policy fitted to one target proposes, exp((1/eta_i - 1/eta_{i-1}) (r - r_max))
accepts, DPO on pairs of the accepted fits the next. No policy has more reward minus eta KL than the last target.

    python rejection_sampling.py                    # embedded task; trains models/sft, models/reward if missing
    python rejection_sampling.py --num-steps 1 --prompts-per-step 639 --updates-per-step 120  # RSO, of as many responses

GSHF = arXiv:2312.11456 (the steps), RSO = arXiv:2309.06657 (one step), DPO = arXiv:2305.18290, N+ = arXiv:2403.17031.
 1. the fit of step i has the reference pi_0 and beta = eta_i: DPO finds pi_0 exp(r / beta), of whatever policy the
    pairs are, if labels are Bradley-Terry's (RSO section 3.1). So both labels of a pair count, weighted by their
    probabilities. RSO has one label, and in its loss another number (gamma = 0.05) than in its target (beta = 0.5).
 2. all pairs of the accepted count (RSO: n/2 of n). GSHF's steps are not known here: 1/eta_i grows by equal amounts.
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
from plumbing.flags import read_args
from plumbing.logits import output_head, selected_logprobs
from plumbing.models import build_missing, load, load_model, make_trainable, merge, save_model, trainable
from plumbing.processes import gradient_norm, in_chunks, micro_batches, start_processes, sum_over_processes
from plumbing.rewards import load_reward
from plumbing.rows import load_rows
from plumbing.runs import Run
from plumbing.sharding import forward_pass, forward_passes
from plumbing.tokens import encode_rows, end_ids, pad, trim


@dataclass
class Args:
    """the algorithm, its data and its models; everything else is in plumbing/flags.py"""

    seed: int = 1
    """seed of every random draw: data order, sampling, acceptance, order of the pairs"""
    dataset: str = "data/tldr_mini/reference"
    """hub name, folder or .jsonl/.parquet file with `prompt` and `completion` (and `rubric`, if quality can be computed)"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    eval_split: str = "test"
    """split for the final table; the picture uses `validation`"""
    eval_every: int = 20
    """updates between two evaluations on the validation split"""
    eval_rows: int = 400
    """most rows of a split to evaluate on"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT): start and KL anchor; the default is trained if missing"""
    reward_path: str = "models/reward"
    """reward model: folder or hub name, by default trained if missing; or FILE.py with score(prompt, response, row)"""
    output_dir: str = "models/rejection_sampling"
    """folder for the final model; a folder already there is kept under a numbered name"""
    samples_per_prompt: int = 8
    """responses to every prompt of a step (n), the candidates; 64 in RSO"""
    prompts_per_step: int = 213
    """prompts of every step (m)"""
    num_steps: int = 3
    """steps to the target (N), each with new prompts; 1 is RSO"""
    eta: float = 0.05
    """KL strength (eta) of the target; 0.5 in RSO, where it is beta"""
    updates_per_step: int = 40
    """optimizer steps of every fit"""
    batch_size: int = 64
    """pairs per optimizer step"""
    learning_rate: float = 3e-4
    """initial AdamW step size, decays linearly to 0; 1e-5 in RSO, whose models are pretrained"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    temperature: float = 1.0
    """sampling temperature, also applied to every log-prob"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""
    missing_eos_score: float = -1.0
    """score of a response without EOS; references average 0"""


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


# log-probs, scores
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


# acceptance, pairs, loss
def acceptance(scores, coef):
    """Chances (m, n) to accept n candidates for each of m prompts (RSO Eq. 14); coef is 1/eta_i - 1/eta_{i-1}."""
    return torch.exp(coef * (scores - scores.amax(1, keepdim=True)))  # target over proposal, the largest set to 1


def accepted_pairs(accepted, scores, response_ids):
    """All pairs (k, 2) of accepted (m, n), numbered 0 to m n - 1; and which (k,) differ in text and, if any do, in score."""
    first, second = torch.triu_indices(*accepted.shape[1:] * 2, 1, device=accepted.device)  # of n candidates
    numbers = torch.arange(accepted.numel(), device=accepted.device).view_as(accepted)  # (m, n)
    pairs = torch.stack([numbers[:, first], numbers[:, second]], 2)[accepted[:, first] & accepted[:, second]]
    texts = response_ids.unique(dim=0, return_inverse=True)[1]  # (m n,), a number for each text
    (score, other_score), (text, other_text) = (x[pairs].unbind(1) for x in (scores.flatten(), texts))
    useful = (text != other_text) & (score != other_score)
    return pairs, useful if useful.any() else text != other_text


def fit_terms(logprobs, ref_logprobs, scores, beta):
    """Of pairs (B, 2): DPO's loss (Eq. 7), expected over Bradley-Terry labels by the scores, and margins, each (B,)."""
    margins, gaps = (x[:, 0] - x[:, 1] for x in (beta * (logprobs - ref_logprobs), scores))  # equal at the target
    losses = F.binary_cross_entropy_with_logits(margins, gaps.sigmoid(), reduction="none")
    margins = margins * gaps.sign()
    return {"loss": losses, "accuracy": 0.5 + 0.5 * margins.sign(), "margin": margins, "gap": gaps.abs()}


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
    args = read_args(Args, may_be_0="learning_rate")
    m, n = args.prompts_per_step, args.samples_per_prompt
    if n < 2:
        fail("--samples-per-prompt must be at least 2")
    device = start_processes(args, batch_size=args.batch_size)
    run = Run(args)
    DATA, SAMPLING, ACCEPTANCE, PAIRS = 1, 2, 3, 4  # streams: a training draw is fixed by (seed, stream, step)

    # data
    names, columns = (args.train_split, args.validation_split, args.eval_split), ("prompt", "completion")
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path, args.max_rows)
    build_missing(args.sft_path, args.reward_path)
    tokenizer = load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        encode_rows(rows, tokenizer, args, offline_ids="completion")
    train, watched, held_out = splits[names[0]], *(splits[name][: args.eval_rows] for name in names[1:])
    epochs = range(-(-args.num_steps * m // len(train)))  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # models; they come without dropout, or the policy would not start equal to the reference
    policy, ref_policy = (load_model(AutoModelForCausalLM, args.sft_path, tokenizer, args, device) for _ in range(2))
    rule, scalar = args.reward_path.endswith(".py"), AutoModelForSequenceClassification
    reward = load_reward(args.reward_path) if rule else load_model(scalar, args.reward_path, tokenizer, args, device)
    trained = make_trainable(policy, ref_policy, args)
    parameters = trainable(policy=policy)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    size, eos, temperature = args.micro_batch_size, torch.tensor(end_ids(tokenizer), device=device), args.temperature
    measure = partial(evaluate, ref_policy=ref_policy, reward=reward, tokenizer=tokenizer, args=args, device=device)
    inverse_etas = [i / (args.num_steps * args.eta) for i in range(args.num_steps + 1)]  # 0 first
    num_updates = args.num_steps * args.updates_per_step

    run.open(parameters, optimizer)  # with --resume, where the last checkpoint was
    if not run.history:
        run.history.append({"update": 0} | measure(policy, watched)[1])
    for update in run.updates(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)
        step, place = 1 + (update - 1) // args.updates_per_step, (update - 1) % args.updates_per_step
        picked = order[(step - 1) * m : step * m].repeat(n)  # (m n,)
        if place == 0:
            # 1 a new step: n candidates for each of m prompts, from pi_0 or what the last step fitted, and their scores
            rows = [train[i] for i in picked]
            prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (m n, P), mask (m n, P)
            rng = np.random.default_rng([args.seed, SAMPLING, step])
            uniforms = torch.from_numpy(rng.random((m * n, args.response_length), dtype=np.float32)).to(device)
            budget = torch.full((m * n,), args.response_length, device=device)
            rollout = partial(in_chunks, generate, policy, 4 * size, eos=eos, temperature=temperature)
            response_ids = rollout(*prompts, uniforms, budget, lengths=prompts[1].sum(1))  # (m n, R)
            response_mask = mask_to_eos(response_ids, eos)  # (m n, R)
            run.lap("rollout", tokens=response_mask.sum())
            batch, lengths = (*prompts, response_ids, response_mask), prompts[1].sum(1) + response_mask.sum(1)
            scores = score_responses(reward, rows, batch, tokenizer, size)  # (m n,)
            scores = torch.where(torch.isin(response_ids, eos).any(1), scores, args.missing_eos_score)  # N+ detail 23
            reference = partial(in_chunks, token_logprobs, ref_policy, size, *batch, response_mask, lengths=lengths)
            ref_logprobs = reference(temperature=temperature).sum(1)  # (m n,)
            run.check_finite(picked, scores=scores, ref_logprobs=ref_logprobs)

            # 2 accept; a control beside it: as many candidates of every prompt, whatever their score
            by_prompt, rng = scores.view(m, n), np.random.default_rng([args.seed, ACCEPTANCE, step])
            weights = acceptance(by_prompt, inverse_etas[step] - inverse_etas[step - 1])  # (m, n)
            accepted = torch.from_numpy(rng.random((m, n))).to(device) < weights
            control = torch.arange(n, device=device) < accepted.sum(1, keepdim=True)  # candidates are in no order
            pairs, counts = accepted_pairs(accepted, by_prompt, response_ids)
            if not counts.any():
                fail(f"step {step}: no prompt has two different accepted candidates; raise --eta or --num-steps")
            found = {"accept/rate": accepted, "accept/effective": weights.sum(1) ** 2 / (weights**2).sum(1)}
            found |= {"accept/score": by_prompt[accepted], "accept/control": by_prompt[control]}
            found |= {"objective/score": scores, "pairs/dropped": ~counts, "pairs/used": counts.sum()}
            run.state["step"] = {name: x.float().mean().item() for name, x in found.items()}
            run.state["batch"] = (*batch, ref_logprobs, scores, pairs[counts])
            run.lap("score")

        # 3 fit: a DPO update on a batch of the step's pairs, shuffled anew in every pass over them
        *batch, ref_logprobs, scores, pairs = (x.to(device) for x in run.state["batch"])
        rng = np.random.default_rng([args.seed, PAIRS, step])
        passes = range(-(-args.updates_per_step * args.batch_size // len(pairs)))
        shuffled = np.concatenate([rng.permutation(len(pairs)) for _ in passes])
        pairs = pairs[shuffled[place * args.batch_size : (place + 1) * args.batch_size]]  # (B, 2)
        numbers, sums = torch.arange(len(pairs), device=device), Counter()
        for micro in micro_batches(numbers, batch[1].sum(1)[pairs[:, 0]], size):  # prompts of like length
            part, both = [tensor[pairs[micro].flatten()] for tensor in batch], pairs[micro]
            logprobs = token_logprobs(policy, *part, part[3], temperature).sum(1).unflatten(0, (-1, 2))  # (micro, 2)
            terms = fit_terms(logprobs, ref_logprobs[both], scores[both], 1 / inverse_etas[step])
            terms = {name: term.sum() / len(pairs) for name, term in terms.items()}
            terms["loss"].backward()
            sums.update({name: term.item() for name, term in terms.items()})
        sum_over_processes(sums, parameters)
        norm = gradient_norm(parameters)
        sums["grad_norm"] = norm.item()
        run.check_finite(picked[pairs[:, 0].cpu()], **sums)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("optimise")

        # 4 log
        metrics = {"episodes": step * m * n, "learning_rate": optimizer.param_groups[0]["lr"], "step": step}
        metrics |= {"eta": 1 / inverse_etas[step]} | run.state["step"] | sums
        if update % args.eval_every == 0 or update == num_updates:
            samples, point = measure(policy, watched)
            run.history.append({"update": update} | point)
            run.sample(samples[:3])
            metrics |= {f"eval/{name}": value for name, value in point.items()}
        run.log(metrics, step=step, loss=sums["loss"], score=run.history[-1]["score"])

    # 5 save, evaluate on held-out prompts
    save_model(args.output_dir, merge(trained), tokenizer)
    results = {name: measure(model, held_out)[1] for name, model in {"SFT": ref_policy, "RS": policy}.items()}
    run.finish(results, f"{len(held_out)} prompts of {args.eval_split}")
