"""How well a GPU is used: what the matrices of an update need, and what the GPU could do in that time."""

import time

import torch


def training_flops(policy, critic, tokens, actions):
    """FLOPs of the matrices in a forward and a backward pass over `tokens`, of which the policy's head sees `actions`.

    Attention scores and recomputation do not count, as usual.
    """
    parts = [*policy.base_model.modules(), *critic.modules()]
    body = [p for part in parts if not isinstance(part, torch.nn.Embedding) for p in part.parameters(recurse=False)]
    weights = [(p, tokens) for p in body] + [(p, actions) for p in policy.get_output_embeddings().parameters()]
    return sum(p.numel() * (6 if p.requires_grad else 4) * int(count) for p, count in weights if p.ndim == 2)


def matmul_rate(device, dtype, size=8192):
    """FLOP/s of one large matrix product here: `time/mfu` is a share of it."""
    x, seconds = torch.randn(size, size, device=device, dtype=getattr(torch, dtype)), []
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
