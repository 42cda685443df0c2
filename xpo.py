"""XPO, Exploratory Preference Optimization (arXiv:2405.21046): online_dpo.py plus one term, which makes it explore.

Added to the loss is alpha times the log-prob of a second sample: what was said already loses probability.
Every round the policy answers new prompts n times, the reward picks the best and the worst answer to each, and DPO goes
on with the pairs of all rounds so far. The reference stays the supervised policy (pi_0) throughout.

    python xpo.py                                         # embedded task; trains models/sft, models/reward if missing
    python xpo.py --alpha 0                                                         # online_dpo.py, number for number
    python xpo.py --samples-per-prompt 2 --second-reference --second-temperature 1 --alpha-rounds 1000  # Algorithm 1

GSHF = arXiv:2312.11456, recipe = arXiv:2405.07863v3, DPO = arXiv:2305.18290, N+ = arXiv:2403.17031. "Official code" is
RLHFlow/Online-RLHF at 3a00ed8, in the functions of ppo.py Cornell-RL/drpo. All rounds share one AdamW and one decay.
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
from plumbing.processes import gradient_norm, in_chunks, in_parts, micro_batches, start_processes, sum_over_processes
from plumbing.rewards import load_reward
from plumbing.rows import load_rows
from plumbing.runs import Run
from plumbing.sharding import forward_pass, forward_passes
from plumbing.tokens import encode_rows, end_ids, pad, trim


@dataclass
class Args:
    """the algorithm, its data and its models; everything else is in plumbing/flags.py"""

    seed: int = 1
    """seed of every random draw: data order, sampling, order of the pairs"""
    dataset: str = "data/tldr_mini/reference"
    """hub name, folder or .jsonl/.parquet file with `prompt` and `completion` (and `rubric`, if quality can be computed)"""
    preference_dataset: str = ""
    """pairs to begin with (D_off), with `prompt`, `chosen`, `rejected`; empty: none, all pairs are sampled"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    eval_split: str = "test"
    """split for the final table; the picture uses `validation`"""
    eval_every: int = 16
    """updates between two evaluations on the validation split"""
    eval_rows: int = 400
    """most rows of a split to evaluate on"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT): start and KL anchor; the default is trained if missing"""
    reward_path: str = "models/reward"
    """reward model: folder or hub name, by default trained if missing; or FILE.py with score(prompt, response, row)"""
    output_dir: str = "models/xpo"
    """folder for the final model; a folder already there is kept under a numbered name"""
    total_episodes: int = 5120
    """responses to sample in the whole run"""
    prompts_per_round: int = 128
    """prompts of every round (m); 20,000 in the recipe, which has 3 rounds"""
    samples_per_prompt: int = 8
    """responses to every prompt (n), of which the best and the worst become a pair; 8 in the recipe"""
    updates_per_round: int = 16
    """optimizer steps of every round; as many as two passes over the pairs in the recipe"""
    batch_size: int = 64
    """pairs per optimizer step"""
    learning_rate: float = 3e-4
    """initial AdamW step size (eta), decays linearly to 0; 5e-7 in the recipe, whose models are pretrained"""
    beta: float = 2.0
    """KL strength (beta in DPO, eta in GSHF); 0.1 in the recipe, whose reward model is not so soon over-optimised"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    temperature: float = 1.0
    """sampling temperature of the first half of the responses (rounded up), and of the evaluation; DPO's log-probs are at 1"""
    second_temperature: float = 0.7
    """sampling temperature of the other half"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""
    missing_eos_score: float = -1.0
    """score of a response without EOS; references average 0"""
    alpha: float = 1e-5  # new in XPO: how strongly to explore, and away from whom
    """weight of the exploration term in the first round (alpha); 0 is online DPO"""
    alpha_rounds: int = 2
    """rounds in which the weight falls to 0 in equal steps; 2, as in the paper: 1e-5, 5e-6, 0, 0, ..."""
    second_reference: bool = False
    """pi_SFT samples the other half of the responses, as in Algorithm 1; in the paper's experiments the policy does"""


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


def sequence_logprobs(model, prompt_ids, prompt_mask, pair_ids, pair_mask):
    """Log-probs (B, 2) of the whole chosen and the whole rejected response (B, 2, R), EOS included, at temperature 1."""
    prompts = prompt_ids.repeat_interleave(2, 0), prompt_mask.repeat_interleave(2, 0)
    ids, mask = pair_ids.flatten(0, 1), pair_mask.flatten(0, 1)  # (2 B, R)
    return token_logprobs(model, *prompts, ids, mask, mask, 1.0).sum(1).unflatten(0, (-1, 2))


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


# pairs, loss
def best_and_worst(scores, answers):
    """Numbers [(i, j), ...] of the best and the worst answer to each prompt, of equals the first (recipe, section 3.3).

    Row k of scores (n, m) has the k-th answers to all m prompts, as the list of n m answers. Two alike are no pair.
    """
    m, flat, extremes = scores.shape[1], scores.flatten(), zip(scores.argmax(0).tolist(), scores.argmin(0).tolist())
    pairs = [(best * m + prompt, worst * m + prompt) for prompt, (best, worst) in enumerate(extremes)]
    return [(i, j) for i, j in pairs if flat[i] > flat[j] and answers[i] != answers[j]]


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta):
    """Bradley-Terry negative log-likelihood per pair (B,) of the implicit rewards (DPO Eq. 7)."""
    return -F.logsigmoid(beta * ((chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)))


def pair_terms(logprobs, ref_logprobs, beta):
    """Log-probs (B, 2) -> the loss of every pair and what is logged about it, each (B,)."""
    chosen_rewards, rejected_rewards = (beta * (logprobs - ref_logprobs)).unbind(1)  # implicit (DPO Eq. 5)
    margins = chosen_rewards - rejected_rewards
    terms = {"loss": dpo_loss(*logprobs.unbind(1), *ref_logprobs.unbind(1), beta)}
    terms |= {"accuracy": 0.5 + 0.5 * margins.sign(), "margin": margins}  # a tie counts half
    terms |= {"rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards}
    return terms | {"logprobs/chosen": logprobs[:, 0], "logprobs/rejected": logprobs[:, 1]}


def xpo_loss(dpo_losses, second_logprobs, alpha):  # new in XPO: the term
    """Losses (B,), to be minimised, so the sign is plus: the second sample gets less likely (XPO Algorithm 1)."""
    return dpo_losses + alpha * second_logprobs


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
    args = read_args(Args, may_be_0="learning_rate total_episodes alpha")
    m, n, first_round = args.prompts_per_round, args.samples_per_prompt, 0 if args.preference_dataset else 1
    if n < 2 or (args.total_episodes < m * n and (first_round == 1 or args.total_episodes > 0)):
        fail("--samples-per-prompt must be at least 2, --total-episodes at least that times --prompts-per-round")
    device = start_processes(args, batch_size=args.batch_size)
    run = Run(args)
    DATA, SAMPLING, PAIRS = 1, 2, 3  # streams: a training draw is fixed by (seed, stream, round)

    # data
    names, columns = (args.train_split, args.validation_split, args.eval_split), ("prompt", "completion")
    splits, offline = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path, args.max_rows), []
    if args.preference_dataset:
        source, columns = args.preference_dataset, ("prompt", "chosen", "rejected")
        config = args.dataset_config if source == args.dataset else ""
        [offline] = load_rows(source, config, names[:1], columns, args.sft_path, args.max_rows).values()
    build_missing(args.sft_path, args.reward_path)
    tokenizer = load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        encode_rows(rows, tokenizer, args, offline_ids="completion")
    if offline:
        encode_rows(offline, tokenizer, args, chosen_ids="chosen", rejected_ids="rejected")
    train, watched, held_out = splits[names[0]], *(splits[name][: args.eval_rows] for name in names[1:])
    rounds = whole_batches(args.total_episodes, m * n) if args.total_episodes else 0  # round 0 samples nothing
    epochs = range(1 + rounds * m // len(train))  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # models; they come without dropout, or the policy would not start equal to the reference
    policy, ref_policy = (load_model(AutoModelForCausalLM, args.sft_path, tokenizer, args, device) for _ in range(2))
    rule, scalar = args.reward_path.endswith(".py"), AutoModelForSequenceClassification
    reward = load_reward(args.reward_path) if rule else load_model(scalar, args.reward_path, tokenizer, args, device)
    trained = make_trainable(policy, ref_policy, args)
    parameters = trainable(policy=policy)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    size, eos = args.micro_batch_size, torch.tensor(end_ids(tokenizer), device=device)
    measure = partial(evaluate, ref_policy=ref_policy, reward=reward, tokenizer=tokenizer, args=args, device=device)
    num_updates = (1 + rounds - first_round) * args.updates_per_round

    def tensors_of(rows):
        """Prompt ids, mask (B, P) and ids, mask (B, 2, R) of chosen and rejected, padded to the longest."""
        pairs = pad([row[name] for row in rows for name in ("chosen_ids", "rejected_ids")], "right", device)
        return *pad([row["prompt_ids"] for row in rows], "left", device), *(x.unflatten(0, (-1, 2)) for x in pairs)

    def with_reference(rows):
        """What is kept of pairs: ids, and log-probs under pi_0; differs from official code (run_loop.sh): not renewed."""
        names, batch = ("prompt_ids", "chosen_ids", "rejected_ids"), tensors_of(rows)
        found = in_chunks(sequence_logprobs, ref_policy, size, *batch, lengths=batch[1].sum(1))
        return [{name: row[name] for name in names} | {"ref_logprobs": x} for row, x in zip(rows, found.tolist())]

    run.open(parameters, optimizer)  # with --resume, where the last checkpoint was
    if not run.history:
        samples, point = measure(policy, watched)
        run.history.append({"update": 0} | point)
        run.sample(samples[:3])
        run.state |= {"pairs": in_parts(with_reference, offline, size, "reference") if offline else [], "round": {}}
    pairs = run.state["pairs"]  # differs from official code (run_loop.sh): of all rounds, as in the recipe
    d_opt = run.state.setdefault("d_opt", [])  # new in XPO: of all rounds, as the pairs are
    for update in run.updates(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)
        round, step = first_round + (update - 1) // args.updates_per_round, (update - 1) % args.updates_per_round
        alpha = args.alpha * max(0, 1 - (round - 1) / args.alpha_rounds) * (round > 0)  # new in XPO: of this round
        if step == 0 and round > 0:
            # 1 a new round: sample prompts
            picked = np.tile(order[(round - 1) * m : round * m], n)
            rows = [train[i] for i in picked]  # (n m): all prompts, n times over
            prompts = pad([row["prompt_ids"] for row in rows], "left", device)  # ids (n m, P), mask (n m, P)
            rng = np.random.default_rng([args.seed, SAMPLING, round])
            uniforms = torch.from_numpy(rng.random((n * m, args.response_length), dtype=np.float32)).to(device)

            # 2 rollout; differs from official code (run_loop.sh): half of it at another temperature, as in the recipe
            budget = torch.full((n * m,), args.response_length, device=device)
            parts = zip(*(x.split((n + 1) // 2 * m) for x in (*prompts, uniforms, budget)))
            halves, second_model = [], ref_policy if args.second_reference else policy  # new in XPO: whose half it is
            for x, (model, temp) in zip(parts, ((policy, args.temperature), (second_model, args.second_temperature))):
                halves += [in_chunks(generate, model, 4 * size, *x, lengths=x[1].sum(1), eos=eos, temperature=temp)]
            response_ids = torch.cat(halves)  # (n m, R)
            response_mask = mask_to_eos(response_ids, eos)  # (n m, R)
            run.lap("rollout", tokens=response_mask.sum())

            # 3 score
            scores = score_responses(reward, rows, (*prompts, response_ids, response_mask), tokenizer, size)  # (n m,)
            ended = torch.isin(response_ids, eos).any(1)
            scores = torch.where(ended, scores, args.missing_eos_score)  # N+ detail 23
            run.check_finite(picked, scores=scores)

            # 4 the best and the worst answer to a prompt are a pair
            ids = [row[mask].tolist() for row, mask in zip(response_ids, response_mask)]
            d_opt += [(row["prompt_ids"], own) for row, own in zip(rows[-m:], ids[-m:])]  # new in XPO: all
            best = best_and_worst(scores.view(n, m), ids)
            new = [rows[i] | {"chosen_ids": ids[i], "rejected_ids": ids[j]} for i, j in best]
            pairs += with_reference(new) if new else []
            if not pairs:  # a pair without gradient takes their place, so that the next round comes
                print(f"note: round {round}: the reward does not tell the answers to any of {m} prompts apart")
                run.state["blank"] = with_reference([rows[0] | {"chosen_ids": ids[0], "rejected_ids": ids[0]}])
            found = {"objective/score": scores, "response/eos": ended, "response/length": response_mask.sum(1)}
            run.state["round"] = {name: x.float().mean().item() for name, x in found.items()}
            run.lap("score")

        # 5 DPO loss on a batch of all pairs so far, which every pass over them shuffles anew
        usable = pairs or run.state["blank"]
        passes = range(-(-args.updates_per_round * args.batch_size // len(usable)))
        shuffles = [np.random.default_rng([args.seed, PAIRS, round, p]).permutation(len(usable)) for p in passes]
        rows = [usable[i] for i in np.concatenate(shuffles)[step * args.batch_size : (step + 1) * args.batch_size]]
        batch = (*tensors_of(rows), torch.tensor([row["ref_logprobs"] for row in rows], device=device))
        if alpha:  # new in XPO: a batch of D_opt; differs from paper: means of both batches, not sums
            drawn = np.random.default_rng([args.seed, SAMPLING, round, update]).integers(len(d_opt), size=len(rows))
            contexts, answers = zip(*(d_opt[k] for k in drawn))
            second = (*pad(contexts, "left", device), *pad(answers, "right", device))
        numbers, sums = torch.arange(len(rows), device=device), Counter()
        for micro in micro_batches(numbers, batch[1].sum(1), size):  # prompts of like length
            *part, part_ref_logprobs = (tensor[micro] for tensor in batch)
            terms = pair_terms(sequence_logprobs(policy, *part), part_ref_logprobs, args.beta)
            terms["loss"] = terms["loss"] * bool(pairs)  # rounding would leave the blank a gradient
            if alpha:  # new in XPO: the term, at temperature 1 as all log-probs in the loss
                said = token_logprobs(policy, *(x[micro] for x in second), second[3][micro], 1.0).sum(1)
                terms |= {"loss": xpo_loss(terms["loss"], said, alpha), "logprobs/second": said}
            terms = {name: term.sum() / len(rows) for name, term in terms.items()}
            terms["loss"].backward()
            sums.update({name: term.item() for name, term in terms.items()})

        # 6 step
        sum_over_processes(sums, parameters)
        norm = gradient_norm(parameters)
        sums["grad_norm"] = norm.item()
        run.check_finite(torch.empty(0), **sums)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("optimise")

        # 7 log
        metrics = {"round": round, "episodes": round * m * n, "learning_rate": optimizer.param_groups[0]["lr"]}
        metrics |= {"pairs": len(pairs), "dropped": round * m + len(offline) - len(pairs)} | run.state["round"] | sums
        if update % args.eval_every == 0 or update == num_updates:
            samples, point = measure(policy, watched)
            run.history.append({"update": update} | point)
            run.sample(samples[:3])
            metrics |= {f"eval/{name}": value for name, value in point.items()}
        run.log(metrics, round=round, loss=sums["loss"], score=run.history[-1]["score"])

    # 8 save, evaluate on held-out prompts, show
    save_model(args.output_dir, merge(trained), tokenizer)
    before, sft_result = measure(ref_policy, held_out)
    after, result = measure(policy, held_out)
    samples = [
        f"\n{row['prompt']}\n  reference:{row['completion']}\n  SFT:      {x['response']}\n  tuned:    {y['response']}"
        for row, x, y in list(zip(held_out, before, after))[:3]
    ]
    run.finish({"SFT": sft_result, "XPO": result}, f"{len(held_out)} prompts of {args.eval_split}", samples)
