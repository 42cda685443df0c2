"""LN-DPO (arXiv:2407.15229): length-normalised DPO, which is dpo.py on log-probs divided by the length of the response.

A reward is then beta times the mean log-ratio of a token, and a long response is no longer worth more for its length.
What is lost: the loss of DPO has the optimum of KL-penalised RL on the reward model of the pairs, this one has not.

    python dpo_ln.py                                       # embedded task; trains models/sft if missing
    python dpo_ln.py --sft-path my_sft --dataset trl-lib/tldr-preference --learning-rate 3e-6 \
        --prompt-length 512 --response-length 169

DPO = arXiv:2305.18290, DR-PO = arXiv:2404.08495v3. "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr:
 1. reference log-probs are computed once, by the policy before its first step; the official code keeps a second model.
 2. linear learning-rate decay (the paper's; the official code decays by a cosine), no weight decay, clipped gradient
    norm; all randomness comes from --seed; full fine-tuning by default.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

# reading, checking, saving, resuming, processes, memory: nothing in plumbing/ decides a number of the algorithm, and
# plumbing/plain.py says in a few lines what each of these names stands for
from plumbing.flags import read_args, whole_batches
from plumbing.logits import output_head, selected_logprobs
from plumbing.models import build_missing, can_share, load, load_model, make_trainable, merge, save_model, trainable
from plumbing.processes import gradient_norm, in_chunks, in_parts, micro_batches, start_processes, sum_over_processes
from plumbing.rows import load_rows
from plumbing.runs import Run
from plumbing.sharding import forward_pass
from plumbing.tokens import encode_rows, pad, trim


@dataclass
class Args:
    """the algorithm, its data and its models; everything else is in plumbing/flags.py"""

    seed: int = 1
    """seed of every random draw: data order"""
    dataset: str = "data/tldr_mini/preference"
    """hub name, folder or .jsonl/.parquet file with `prompt`, `chosen` and `rejected`"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT): start and KL anchor; the default is trained if missing"""
    output_dir: str = "models/dpo_ln"
    """folder for the final model; a folder already there is kept under a numbered name"""
    eval_every: int = 5
    """updates between two evaluations on the validation split"""
    eval_rows: int = 400
    """most rows of a split to evaluate on"""
    beta: float = 1.0
    """KL strength (beta in LN-DPO): about DPO's times the length of a response; 5 in Tulu 3"""
    num_epochs: int = 1
    """passes over the train split; 1 in DR-PO's paper"""
    batch_size: int = 64
    """pairs per optimizer step"""
    learning_rate: float = 3e-4
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in DR-PO's paper, whose models are pretrained"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""


# log-probs
def response_states(model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Hidden states (B, R + 1, d): column t has read the prompt and t response tokens, so it predicts response token t."""
    mask = torch.cat([prompt_mask, response_mask], dim=1)  # (B, P + R)
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : mask.sum(1).max()]  # (B, L): what is real comes first
    ids = torch.cat([prompt_ids, response_ids], dim=1).gather(1, order)  # note: nothing sees padding on its right
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, d)
    column = torch.arange(-1, response_ids.shape[1], device=mask.device) + prompt_mask.sum(1)[:, None]  # (B, R + 1)
    return hidden.gather(1, column.clamp(max=ids.shape[1] - 1).unsqueeze(2).expand(-1, -1, hidden.shape[2]))


def pair_states(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share):
    """As response_states, for two responses (B, 2, R) to every prompt: (2 B, R + 1, d).

    With `share` the prompt is read once and both go on from its cache, which recomputed layers (share off) cannot do.
    """
    response_ids, response_mask = pair_ids.flatten(0, 1), pair_mask.flatten(0, 1)  # (2 B, R)
    if not share:
        prompts = prompt_ids.repeat_interleave(2, 0), prompt_mask.repeat_interleave(2, 0)
        return response_states(model, *prompts, response_ids, response_mask)
    prompt_ids, prompt_mask = trim(prompt_ids, prompt_mask)
    cache = DynamicCache(config=model.config)
    read = partial(model.base_model, past_key_values=cache, use_cache=True)
    positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
    first = read(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions).last_hidden_state[:, -1:]
    cache.batch_repeat_interleave(2)
    mask = torch.cat([prompt_mask.repeat_interleave(2, 0), response_mask], dim=1)  # (2 B, P + R)
    positions = (mask.cumsum(1) - 1)[:, prompt_ids.shape[1] :]
    rest = read(input_ids=response_ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return torch.cat([first.repeat_interleave(2, 0), rest], dim=1)


@forward_pass
def pair_mean_logprobs(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share):
    """Log-probs (B, 2) per token of the chosen and of the rejected response: means, EOS included, at temperature 1."""
    states = pair_states(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share)[:, :-1].unflatten(0, (-1, 2))
    hidden, tokens = states[pair_mask], pair_ids[pair_mask]  # (tokens, d), (tokens,)
    picked = selected_logprobs(output_head(model), hidden, tokens, temperature=1.0)
    sums = torch.zeros_like(pair_mask, dtype=picked.dtype).masked_scatter(pair_mask, picked).sum(2)
    return sums / pair_mask.sum(2)  # new in LN-DPO: over |y|; so are the reference's, hence the log-ratios


# loss
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


if __name__ == "__main__":
    args = read_args(Args, may_be_0="learning_rate")
    device = start_processes(args, batch_size=args.batch_size)
    run = Run(args)
    DATA = 1  # stream: a draw is fixed by seed, stream and epoch

    # data
    names, columns = (args.train_split, args.validation_split), ("prompt", "chosen", "rejected")
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path, args.max_rows)
    splits[args.validation_split] = splits[args.validation_split][: args.eval_rows]
    train, validation = (splits[name] for name in names)
    build_missing(args.sft_path)
    tokenizer = load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        encode_rows(rows, tokenizer, args, chosen_ids="chosen", rejected_ids="rejected")
    num_updates = whole_batches(args.num_epochs * len(train), args.batch_size)
    epochs = range(args.num_epochs)  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # model; it comes without dropout, or the policy would not start equal to the reference
    policy = load_model(AutoModelForCausalLM, args.sft_path, tokenizer, args, device)
    trained = make_trainable(policy, policy, args)
    parameters = trainable(policy=policy)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    size, logprobs_of = args.micro_batch_size, partial(pair_mean_logprobs, share=can_share(policy, args))

    def tensors_of(rows):
        """Prompt ids, mask (B, P) and ids, mask (B, 2, R) of chosen and rejected, padded to the longest."""
        pairs = pad([row[name] for row in rows for name in ("chosen_ids", "rejected_ids")], "right", device)
        return *pad([row["prompt_ids"] for row in rows], "left", device), *(x.unflatten(0, (-1, 2)) for x in pairs)

    def measured(rows):
        """Log-probs (rows, 2) of the policy as it is."""
        batch = tensors_of(rows)
        return in_chunks(logprobs_of, policy, size, *batch, lengths=batch[1].sum(1) + batch[3].sum((1, 2)))

    # 1 reference log-probs of every pair, once: the policy before its first step is the reference
    # differs from official code (dpo.py): no second model in memory, no second forward pass per batch
    run.open(parameters, optimizer)  # with --resume, where the last checkpoint was
    if not run.history:
        for name, rows in splits.items():
            run.state[name] = in_parts(measured, rows, size, f"reference log-probs, {name}")  # (rows, 2)
        terms = pair_terms(run.state[args.validation_split], run.state[args.validation_split], args.beta)
        run.history.append({"epoch": 0.0} | {name: term.mean().item() for name, term in terms.items()})
    ref_logprobs, ref_validation = (run.state[name].to(device) for name in names)

    def validation_means():
        terms = pair_terms(measured(validation), ref_validation, args.beta)
        return {name: term.mean().item() for name, term in terms.items()}

    for update in run.updates(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 2 loss on a batch of pairs
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        batch = (*tensors_of([train[i] for i in picked]), ref_logprobs[picked])
        rows, sums = torch.arange(len(picked), device=device), Counter()
        for micro in micro_batches(rows, batch[1].sum(1), size):  # prompts of like length
            *part, part_ref_logprobs = (tensor[micro] for tensor in batch)
            terms = pair_terms(logprobs_of(policy, *part), part_ref_logprobs, args.beta)
            terms = {name: term.sum() / len(picked) for name, term in terms.items()}
            terms["loss"].backward()
            sums.update({name: term.item() for name, term in terms.items()})

        # 3 step
        sum_over_processes(sums, parameters)
        norm = gradient_norm(parameters)
        sums["grad_norm"] = norm.item()
        run.check_finite(picked, **sums)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("update")

        # 4 log; every few updates the same means on the validation split
        epoch = update * args.batch_size / len(train)
        metrics = {"epoch": epoch, **sums, "learning_rate": optimizer.param_groups[0]["lr"]}
        if update % args.eval_every == 0 or update == num_updates:
            point = validation_means()
            run.history.append({"epoch": epoch} | point)
            metrics |= {f"eval/{name}": value for name, value in point.items()}
        run.log(metrics, loss=sums["loss"], validation=run.history[-1]["loss"])

    # 5 save, compare the validation split before and after
    save_model(args.output_dir, merge(trained), tokenizer)
    after = {"epoch": run.history[-1]["epoch"]} | validation_means()  # of what was saved
    run.finish({"before": run.history[0], "after": after}, f"{len(validation)} pairs of {args.validation_split}")
