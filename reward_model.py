r"""Reward model: a scalar head on the SFT model, trained on preference pairs with the Bradley-Terry loss.

The score of a prompt with a response is read at the response's last token, its EOS. After training the scores are
centred so that reference responses average 0; the constant is stored in the config as `score_mean`.

    python reward_model.py                                 # embedded task, about a minute on two cores
    python reward_model.py --sft-path my_sft --dataset trl-lib/tldr-preference --reference-dataset trl-lib/tldr \
        --eval-split validation --learning-rate 3e-6 --num-epochs 1 --prompt-length 512 --response-length 169

DR-PO = arXiv:2404.08495v3, N+ = arXiv:2403.17031. "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr:
 1. references are scored at their real EOS; the official centring (rm.py:587) reads a padding position.
 2. linear learning-rate decay (the paper's; the official code decays by a cosine).
 3. a small penalty on each pair's mean score (--center-coef) and two epochs: the tiny model needs both, docs/ says why.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DynamicCache

from data.tldr_mini.rubric import rubric_score

# reading, checking, saving, resuming, processes, memory: nothing in plumbing/ decides a number of the algorithm, and
# plumbing/plain.py says in a few lines what each of these names stands for
from plumbing.flags import read_args, whole_batches
from plumbing.models import build_missing, can_share, load, load_model, make_trainable, merge, save_model, trainable
from plumbing.processes import gradient_norm, in_chunks, micro_batches, start_processes, sum_over_processes
from plumbing.rows import load_rows
from plumbing.runs import Run
from plumbing.sharding import fill, forward_pass
from plumbing.tokens import encode_rows, pad, trim


@dataclass
class Args:
    """the algorithm, its data and its models; everything else is in plumbing/flags.py"""

    seed: int = 1
    """seed of every random draw: data order, initial weights of the head"""
    dataset: str = "data/tldr_mini/preference"
    """hub name, folder or .jsonl/.parquet file with `prompt`, `chosen` and `rejected` (and `rubric`, for the table by margin)"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    reference_dataset: str = ""
    """dataset whose completions score 0 on average; empty: the chosen answers, or the embedded task's references"""
    sft_path: str = "models/sft"
    """folder or hub name of the supervised policy (pi_SFT) to start from; the default is trained if missing"""
    output_dir: str = "models/reward"
    """folder for the final model; a folder already there is kept under a numbered name"""
    eval_split: str = "test"
    """split for the final table"""
    eval_rows: int = 400
    """most rows of a split to evaluate on"""
    num_epochs: int = 2
    """passes over the train split; 1 in the paper, whose models are pretrained"""
    batch_size: int = 16
    """pairs per optimizer step"""
    learning_rate: float = 1e-3
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
    center_coef: float = 0.05
    """weight of the squared sum of a pair's scores, which pulls every prompt's mean score to 0; 0 in the paper"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    prompt_length: int = 128
    """most prompt tokens; longer prompts are cut from the left"""
    response_length: int = 32
    """most response tokens, EOS included"""


# scores
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
def sequence_scores(reward_model, prompt_ids, prompt_mask, response_ids, response_mask):
    """Scores (B,), read at the last real token (N+ detail 12), centred so that references average 0 (N+ detail 15)."""
    states = response_states(reward_model, prompt_ids, prompt_mask, response_ids, response_mask)
    last = states[torch.arange(len(states)), response_mask.sum(1)]  # (B, d)
    return reward_model.score(last).squeeze(-1).float() - getattr(reward_model.config, "score_mean", 0.0)


@forward_pass
def pair_scores(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share):
    """Scores (B, 2) of the chosen and the rejected response."""
    states = pair_states(model, prompt_ids, prompt_mask, pair_ids, pair_mask, share)
    last = states[torch.arange(len(states)), pair_mask.flatten(0, 1).sum(1)]  # (2 B, d)
    return (model.score(last).float() - getattr(model.config, "score_mean", 0.0)).view(-1, 2)


# loss
def preference_loss(chosen_scores, rejected_scores):
    """Bradley-Terry negative log-likelihood per pair (B,) (DR-PO Eq. 1)."""
    return -F.logsigmoid(chosen_scores - rejected_scores)


def accuracy_by_margin(correct, margins):
    """Table of the accuracy on all pairs (n,) and by rubric margin, next to the best that these noisy labels allow."""
    best = 0.5 + 0.5 * np.sign(margins)  # who ranks by the rubric itself
    table = {}
    for low, high in ((0, 9), (0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 9)):
        inside = (np.abs(margins) >= low) & (np.abs(margins) < high)
        name = "all" if (low, high) == (0, 9) else f"rubric margin {low} " + ("up" if high == 9 else f"to {high}")
        if inside.any():
            means = {"accuracy": float(correct[inside].mean()), "best": float(best[inside].mean())}
            table[name] = {"pairs": int(inside.sum())} | means
    return table


if __name__ == "__main__":
    args = read_args(Args, may_be_0="learning_rate center_coef")
    device = start_processes(args, batch_size=args.batch_size)
    run = Run(args)
    DATA = 1  # stream: a draw is fixed by seed, stream and epoch

    # data
    names, columns = (args.train_split, args.validation_split, args.eval_split), ("prompt", "chosen", "rejected")
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.sft_path, args.max_rows)
    own = "data/tldr_mini/reference" if args.dataset == Args.dataset else args.dataset
    source, columns = args.reference_dataset or own, ("prompt", "completion")  # of pairs, the chosen answers
    config = args.dataset_config if source == args.dataset else ""
    references = load_rows(source, config, names[:1], columns, args.sft_path, 1000)[args.train_split]
    build_missing(args.sft_path)
    tokenizer = load(AutoTokenizer, args.sft_path)
    for rows in splits.values():
        encode_rows(rows, tokenizer, args, chosen_ids="chosen", rejected_ids="rejected")
    encode_rows(references, tokenizer, args, response_ids="completion")
    train, validation, held_out = splits[names[0]], *(splits[name][: args.eval_rows] for name in names[1:])
    num_updates = whole_batches(args.num_epochs * len(train), args.batch_size)
    epochs = range(args.num_epochs)  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # model; it comes without dropout, here as in the RL scripts
    model = load_model(AutoModelForSequenceClassification, args.sft_path, tokenizer, args, device, num_labels=1)
    model.config.score_mean = 0.0  # not that of an earlier reward model, if it starts from one
    torch.manual_seed(args.seed)
    std = 1 / np.sqrt(model.score.in_features + 1)  # N+ detail 11
    fill(model.score.weight, torch.nn.init.normal_(torch.empty(model.score.weight.shape), std=std))
    trained = make_trainable(model, model, args)
    parameters = trainable(reward_model=model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    size, scores_of = args.micro_batch_size, partial(pair_scores, share=can_share(model, args))
    eval_every = max(1, len(train) // args.batch_size)

    def tensors_of(rows):
        """Prompt ids, mask (B, P) and ids, mask (B, 2, R) of chosen and rejected, padded to the longest."""
        pairs = pad([row[name] for row in rows for name in ("chosen_ids", "rejected_ids")], "right", device)
        return *pad([row["prompt_ids"] for row in rows], "left", device), *(x.unflatten(0, (-1, 2)) for x in pairs)

    def measured(rows):
        """Scores (rows, 2) of chosen and rejected; which pairs are right (rows,), half where they tie."""
        batch = tensors_of(rows)
        scores = in_chunks(scores_of, model, size, *batch, lengths=batch[1].sum(1) + batch[3].sum((1, 2)))
        return scores, 0.5 + 0.5 * (scores[:, 0] - scores[:, 1]).sign()

    def validation_means():
        scores, correct = measured(validation)
        return {"loss": preference_loss(*scores.unbind(1)).mean().item(), "accuracy": correct.mean().item()}

    run.open(parameters, optimizer)  # with --resume, where the last checkpoint was
    run.history = run.history or [{"epoch": 0.0} | validation_means()]
    for update in run.updates(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 1 loss on a batch of pairs
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        batch = tensors_of([train[i] for i in picked])
        rows, sums = torch.arange(len(picked), device=device), Counter()
        for micro in micro_batches(rows, batch[1].sum(1), size):  # prompts of like length
            chosen_scores, rejected_scores = scores_of(model, *(tensor[micro] for tensor in batch)).unbind(1)
            losses = preference_loss(chosen_scores, rejected_scores)
            # differs from paper: pairs leave each prompt's mean score free, as noise for PPO; this pulls it to 0
            losses = losses + args.center_coef * (chosen_scores + rejected_scores) ** 2
            loss = losses.sum() / len(picked)
            loss.backward()
            correct = (0.5 + 0.5 * (chosen_scores - rejected_scores).sign()).sum() / len(picked)  # a tie counts half
            sums.update({"loss": loss.item(), "accuracy": correct.item()})

        # 2 step
        sum_over_processes(sums, parameters)
        norm = gradient_norm(parameters)
        sums["grad_norm"] = norm.item()
        run.check_finite(picked, **sums)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("update")

        # 3 log; once an epoch loss and accuracy on the validation split, without the penalty
        epoch = update * args.batch_size / len(train)
        metrics = {"epoch": epoch, **sums, "learning_rate": optimizer.param_groups[0]["lr"]}
        if update == num_updates or update % eval_every == 0:
            point = validation_means()
            run.history.append({"epoch": epoch} | point)
            metrics |= {f"eval/{name}": value for name, value in point.items()}
        run.log(metrics, loss=sums["loss"], accuracy=sums["accuracy"], validation=run.history[-1]["accuracy"])

    # 4 centre the scores of what is saved so that the references average 0 (N+ detail 15)
    # differs from official code (rm.py:587): read at the real EOS, not at a padding position
    prompts = pad([row["prompt_ids"] for row in references], "left", device)
    responses = pad([row["response_ids"] for row in references], "right", device)
    lengths, trained = prompts[1].sum(1) + responses[1].sum(1), merge(trained)
    reference_scores = in_chunks(sequence_scores, model, size, *prompts, *responses, lengths=lengths)
    model.config.score_mean = reference_scores.mean().item()
    save_model(args.output_dir, trained, tokenizer)

    # 5 accuracy on held-out pairs
    correct = measured(held_out)[1].cpu().numpy()
    result = {"all": {"pairs": len(held_out), "accuracy": float(correct.mean())}}
    if "rubric" in held_out[0]:
        quality = [[rubric_score(row[name], row["rubric"]) for row in held_out] for name in ("chosen", "rejected")]
        result = accuracy_by_margin(correct, np.subtract(*quality))
    for row in result.values():
        row["stderr"] = (row["accuracy"] * (1 - row["accuracy"]) / row["pairs"]) ** 0.5  # of the accuracy
    shift, std = model.config.score_mean, reference_scores.std()
    scores = f"mean 0 (shifted by {shift:.3f}), std {std:.3f}: {len(references)} answers of {source}"
    run.finish(result, f"{args.eval_split} pairs", [f"\nreference scores: {scores}"])
