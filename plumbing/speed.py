"""How well a GPU is used: what the matrices of an update need, and what the GPU could do in that time."""

import time

import torch


def training_flops(policy, critic, tokens, actions):
    """FLOPs of the matrices in a forward and a backward pass over `tokens`, of which the policy's head sees `actions`.

    Attention scores and recomputation do not count, as usual.
    """
    parts = [*policy.base_model.modules(), *critic.modules()]
    body = [p for part in parts if not isinstance(part, torch.nn.Embedding) for p in part.parameters(recurse=False)]
    head = policy.get_output_embeddings().parameters()
    return flops_per_token(body) * int(tokens) + flops_per_token(head) * int(actions)


def flops_per_token(weights):
    return sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in weights if weight.ndim == 2)


def matmul_rate(device, dtype, size=8192):
    """FLOP/s of one large matrix product here: `time/mfu` is a share of it."""
    x, seconds = torch.randn(size, size, device=device, dtype=getattr(torch, dtype)), []
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
