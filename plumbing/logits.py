"""From hidden states to log-probs, in little memory."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def output_head(model):
    """hidden (N, d) -> logits (N, V): the head, and the scale or soft cap that some models (Cohere, Granite, Gemma) add."""
    config, head = model.config, model.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    if cap := getattr(config, "final_logit_softcapping", None):
        return lambda hidden: cap * torch.tanh(head(hidden) / cap)
    return head if scale == 1 else lambda hidden: head(hidden) * scale


def selected_logprobs(head, hidden, tokens, temperature):
    """log_softmax(head(hidden) / temperature) at the tokens: hidden (N, d), tokens (N,) -> (N,).

    For the backward pass one copy of the logits is kept, as the head gives them: what is made of 256 rows is made again.
    """

    def logprobs(logits, tokens):
        return -F.cross_entropy(logits.float() / temperature, tokens, reduction="none")

    again = partial(checkpoint, logprobs, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(head(part), aim) for part, aim in zip(hidden.split(256), tokens.split(256))])
