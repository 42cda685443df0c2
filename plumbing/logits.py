"""From hidden states to log-probs, in little memory."""

import torch
import torch.nn.functional as F


def output_head(model):
    """hidden (N, d) -> logits (N, V): the head, and the scale or soft cap that some models (Cohere, Granite, Gemma) add."""
    config, head = model.config, model.get_output_embeddings()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1
    scale, cap = (
        scale / (getattr(config, "logits_scaling", None) or 1),
        getattr(config, "final_logit_softcapping", None),
    )
    if cap:
        return lambda hidden: cap * torch.tanh(head(hidden) * scale / cap)
    return head if scale == 1 else lambda hidden: head(hidden) * scale


def selected_logprobs(head, hidden, tokens, temperature):
    """log_softmax(head(hidden) / temperature) at the tokens: hidden (N, d), tokens (N,) -> (N,)."""
    rows = len(tokens) if torch.is_grad_enabled() else 256  # without gradients, logits need not live on
    parts = zip(hidden.split(rows), tokens.split(rows))
    return torch.cat([TokenLogprob.apply(head(part), aim, temperature) for part, aim in parts])


class TokenLogprob(torch.autograd.Function):
    """log_softmax(logits / temperature) at the tokens: (N, V), (N,) -> (N,), and no second tensor of that size is made.

    note: the backward pass writes the gradient over the logits, some rows at a time, so it can run only once.
    """

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        ctx.save_for_backward(logits, tokens)
        ctx.temperature, ctx.rows = temperature, 1 + 2**21 // logits.shape[1]  # 8 MiB at once stay in a CPU's cache
        parts = zip(logits.split(ctx.rows), tokens.split(ctx.rows))
        return -torch.cat([F.cross_entropy(part.float() / temperature, aim, reduction="none") for part, aim in parts])

    @staticmethod
    def backward(ctx, gradient):
        all_logits, tokens = ctx.saved_tensors
        columns = (tokens.unsqueeze(-1), gradient.unsqueeze(-1) / ctx.temperature)  # each (N, 1)
        for logits, aim, upper in zip(*(tensor.split(ctx.rows) for tensor in (all_logits, *columns))):
            probs = (logits.float() / ctx.temperature).softmax(-1)
            logits.copy_(probs.mul_(-upper).scatter_add_(-1, aim, upper))
        return all_logits, None, None
