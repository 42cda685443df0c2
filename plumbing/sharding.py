"""--shard: parameters, gradients and AdamW's numbers split over the processes by torch's fully_shard (FSDP2).

A layer is gathered while it computes, and for a rollout the whole model, once. Checkpoints and final models are whole, the
same files as without --shard, so a run may go on with more processes, fewer, or one. Where nothing is sharded, the
decorators below do nothing.
"""

from functools import partial, wraps
from types import MethodType

import torch

from plumbing.processes import rank


def shard(model):
    """Splits every parameter over the processes, layer by layer; -> the model, on their devices."""
    from torch.distributed.fsdp import fully_shard  # here, because it takes a second
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer)  # every decoder layer is one
    fully_shard(model)
    kind = type(model)  # made by torch; by name and module transformers finds what weights are called in files
    kind.__name__, kind.__module__ = kind.__bases__[-1].__name__, kind.__bases__[-1].__module__
    for part in sharded_parts(model):
        part.set_gradient_divide_factor(1.0)  # gradients are added up, as everywhere here
        part.set_force_sum_reduction_for_comms(True)  # the one that gloo has
    return model


def is_sharded(model):
    return hasattr(model, "reshard")


def sharded_parts(model):
    return [module for module in model.modules() if is_sharded(module)]


def forward_pass(function, many=False):
    """function(model, ...), one forward pass: while it runs, sharded weights that belong to no layer are whole.

    With `many` passes in a row the whole model is gathered once, not once per layer and token.
    """

    @wraps(function)
    def call(model, *args, **kwargs):
        if not is_sharded(model):
            return function(model, *args, **kwargs)
        from torch.distributed.fsdp import register_fsdp_forward_method

        name = f"sharded_{function.__name__}"
        if not hasattr(model, name):
            setattr(model, name, MethodType(function, model))
            register_fsdp_forward_method(model, name)
        for part in sharded_parts(model) if many else ():
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        result = getattr(model, name)(*args, **kwargs)
        for part in sharded_parts(model) if many else ():
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()
        return result

    return call


forward_passes = partial(forward_pass, many=True)


def whole(tensor):
    """A tensor as it is; a sharded one, for which every process must ask, put together on the CPU of rank 0, else None."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if rank() == 0 else None


def split_like(tensor, parameter):
    """A whole tensor as `parameter` is: split in the same way if that is sharded and of the same shape."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def fill(parameter, tensor):
    """Writes a whole tensor into a parameter, sharded or not."""
    parameter.copy_(split_like(tensor, parameter))
