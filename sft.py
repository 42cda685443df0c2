r"""Supervised fine-tuning (SFT): the policy that ppo.py, drpo.py and dpo.py start from and stay near.

Next-token loss on the dataset's responses, and on the prompts too, as in the official code. The embedded task starts from
a small pretrained model; a base model folder without weights (data/tiny_pythia) is initialised from its config.

    python sft.py                                          # embedded task, half a minute on two cores
    python sft.py --base-model EleutherAI/pythia-1b-deduped --dataset trl-lib/tldr --learning-rate 3e-6 --num-epochs 1 \
        --batch-size 64 --prompt-length 512 --response-length 53

N+ = arXiv:2403.17031. "Official code" is Cornell-RL/drpo at bd825df, folder src/tldr. What differs from it:
 1. responses are padded by mask and end in a real EOS target; nothing is learned on padding.
 2. linear learning-rate decay (the paper's; the official code decays by a cosine), beta2 0.95, no dropout, LoRA by flag.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

# reading, checking, saving, resuming, processes, memory: nothing in plumbing/ decides a number of the algorithm, and
# plumbing/plain.py says in a few lines what each of these names stands for
from plumbing.flags import read_args, whole_batches
from plumbing.logits import output_head, selected_logprobs
from plumbing.models import load, load_model, make_trainable, merge, save_model, trainable
from plumbing.processes import gradient_norm, in_chunks, micro_batches, start_processes, sum_over_processes
from plumbing.rows import load_rows
from plumbing.runs import Run
from plumbing.sharding import forward_pass, forward_passes
from plumbing.tokens import encode_rows, end_ids, pad, trim


@dataclass
class Args:
    """the algorithm, its data and its models; everything else is in plumbing/flags.py"""

    seed: int = 1
    """seed of every random draw: data order, sampling, initial weights"""
    dataset: str = "data/tldr_mini/reference"
    """hub name, folder or .jsonl/.parquet file with `prompt` and `completion`"""
    train_split: str = "train"
    """split to train on"""
    validation_split: str = "validation"
    """split to watch in training"""
    eval_rows: int = 400
    """most rows of a split to evaluate on"""
    base_model: str = "data/tldr_mini/base"
    """folder or hub name of the model to start from; a folder without weights is initialised from its config"""
    output_dir: str = "models/sft"
    """folder for the final model; a folder already there is kept under a numbered name"""
    num_epochs: int = 1
    """passes over the train split; 1 in the paper, whose models are pretrained"""
    batch_size: int = 16
    """rows per optimizer step"""
    learning_rate: float = 1e-3
    """initial AdamW step size (eta), decays linearly to 0; 3e-6 in the paper, whose models are pretrained"""
    max_grad_norm: float = 1.0
    """the gradient is scaled down to this norm"""
    train_on_prompt: bool = True
    """also learn to predict the prompt (as the official code does), not the response alone"""
    temperature: float = 1.0
    """sampling temperature of the samples shown at the end"""
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


@forward_pass
def token_logprobs(model, prompt_ids, prompt_mask, response_ids, response_mask, action_mask, temperature):
    """Log-probs (B, R) of the response tokens where action_mask is True, 0 elsewhere.

    The output head runs there only.
    """
    states = response_states(model, prompt_ids, prompt_mask, response_ids, response_mask)[:, :-1]  # (B, R, d)
    hidden, tokens = states[action_mask], response_ids[action_mask]  # (actions, d), (actions,)
    picked = selected_logprobs(output_head(model), hidden, tokens, temperature)  # (actions,)
    return torch.zeros_like(action_mask, dtype=picked.dtype).masked_scatter(action_mask, picked)


# samples, shown at the end
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


if __name__ == "__main__":
    args = read_args(Args, may_be_0="learning_rate")
    device = start_processes(args, batch_size=args.batch_size)
    run = Run(args)
    DATA, SAMPLING = 1, 2  # streams: a draw is fixed by seed, stream and epoch

    # data
    names, columns = (args.train_split, args.validation_split), ("prompt", "completion")
    splits = load_rows(args.dataset, args.dataset_config, names, columns, args.base_model, args.max_rows)
    tokenizer = load(AutoTokenizer, args.base_model)
    for rows in splits.values():
        encode_rows(rows, tokenizer, args, response_ids="completion")
    train, validation = splits[names[0]], splits[names[1]][: args.eval_rows]
    num_updates = whole_batches(args.num_epochs * len(train), args.batch_size)
    epochs = range(args.num_epochs)  # each a new shuffle of the train split
    order = np.concatenate([np.random.default_rng([args.seed, DATA, e]).permutation(len(train)) for e in epochs])

    # model; it comes without dropout, here as in the RL scripts
    policy = load_model(AutoModelForCausalLM, args.base_model, tokenizer, args, device, may_be_empty=True)
    trained = make_trainable(policy, policy, args)
    parameters = trainable(policy=policy)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True
    )
    size, eval_every = args.micro_batch_size, max(1, len(train) // args.batch_size)

    def tensors_of(rows, train_on_prompt):
        """Prompt ids, mask (B, P) and target ids, mask (B, R) of some rows, padded to the longest; lengths (B,)."""
        pairs = [(row["prompt_ids"], row["response_ids"]) for row in rows]
        if train_on_prompt:  # everything after the first token becomes the response
            pairs = [(prompt[:1], prompt[1:] + response) for prompt, response in pairs]
        prompts, responses = (pad(ids, side, device) for ids, side in zip(zip(*pairs), ("left", "right")))
        return (*prompts, *responses), prompts[1].sum(1) + responses[1].sum(1)

    def validation_loss():
        batch, lengths = tensors_of(validation, train_on_prompt=False)
        logprobs = in_chunks(token_logprobs, policy, size, *batch, batch[-1], lengths=lengths, temperature=1.0)
        return (-logprobs.sum() / batch[-1].sum()).item()

    run.open(parameters, optimizer)  # with --resume, where the last checkpoint was
    run.history = run.history or [{"epoch": 0.0, "loss": validation_loss()}]
    for update in run.updates(num_updates):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (update - 1) / num_updates)

        # 1 next-token loss on a batch
        picked = order[(update - 1) * args.batch_size : update * args.batch_size]
        batch, lengths = tensors_of([train[i] for i in picked], args.train_on_prompt)
        num_tokens, sums = batch[-1].sum(), Counter()
        for micro in micro_batches(torch.arange(len(picked), device=device), lengths, size):
            part = [tensor[micro] for tensor in batch]
            loss = -token_logprobs(policy, *part, part[-1], temperature=1.0).sum() / num_tokens
            loss.backward()
            sums["loss"] += loss.item()

        # 2 step
        sum_over_processes(sums, parameters)
        norm = gradient_norm(parameters)
        sums["grad_norm"] = norm.item()
        run.check_finite(picked, **sums)
        torch.nn.utils.clip_grads_with_norm_(parameters.values(), args.max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        run.lap("update")

        # 3 log; once an epoch the loss per response token on the validation split
        epoch = update * args.batch_size / len(train)
        metrics = {"epoch": epoch, **sums, "learning_rate": optimizer.param_groups[0]["lr"]}
        if update == num_updates or update % eval_every == 0:
            metrics["eval/loss"] = validation_loss()
            run.history.append({"epoch": epoch, "loss": metrics["eval/loss"]})
        run.log(metrics, loss=sums["loss"], validation=run.history[-1]["loss"])

    # 4 save, show the loss and samples of what was saved
    save_model(args.output_dir, merge(trained), tokenizer)
    prompts = pad([row["prompt_ids"] for row in validation], "left", device)  # ids (B, P), mask (B, P)
    eos = torch.tensor(end_ids(tokenizer), device=device)  # (E,)
    rng = np.random.default_rng([args.seed, SAMPLING])
    uniforms = torch.from_numpy(rng.random((len(validation), args.response_length), dtype=np.float32)).to(device)
    budget = torch.full((len(validation),), args.response_length, device=device)
    context, lengths = (*prompts, uniforms, budget), prompts[1].sum(1)
    sampled = in_chunks(
        generate, policy, 4 * size, *context, lengths=lengths, eos=eos, temperature=args.temperature
    )  # (B, R)
    masks, ended = mask_to_eos(sampled, eos), torch.isin(sampled, eos).any(1)
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in zip(sampled[:3], masks)]
    samples = [
        f"\n{row['prompt']}\n  reference:{row['completion']}\n  SFT:      {text}"
        for row, text in zip(validation, texts)
    ]
    result = {"loss": validation_loss(), "eos": ended.float().mean().item()}
    run.finish({"SFT": result}, f"{len(validation)} of {args.validation_split}", samples)
