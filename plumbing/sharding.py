"""--shard: parameters, gradients and AdamW's numbers split over the processes by torch's fully_shard (FSDP2).

A layer is gathered while it computes, in a rollout once for all tokens. Checkpoints and final models are whole, the same
files as without --shard, so a run may go on with more processes, fewer, or one.
"""

from functools import partial, wraps
from types import MethodType

import torch

from plumbing.processes import rank


def decoder_layers(model):
    from transformers.modeling_layers import GradientCheckpointingLayer  # here, because it takes a second

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def shard(model):
    """Splits every parameter over the processes, layer by layer; -> the model, on their devices."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method  # here, because it takes a second

    for part in (*decoder_layers(model), model):
        fully_shard(part)
        part.set_gradient_divide_factor(1.0)  # gradients are added up, as everywhere here
        part.set_force_sum_reduction_for_comms(True)  # the one that gloo has
    kind = type(model)  # made by torch; by name and module transformers finds what weights are called in files
    kind.__name__, kind.__module__ = kind.__bases__[-1].__name__, kind.__bases__[-1].__module__
    model.call = MethodType(lambda model, function, *args, **kwargs: function(model, *args, **kwargs), model)
    register_fsdp_forward_method(model, "call")
    return model


def is_sharded(model):
    return hasattr(model, "reshard")


def forward_pass(function, many=False):
    """function(model, ...): while it runs, sharded weights that belong to no layer are whole; of `many` passes, all are."""

    @wraps(function)
    def call(model, *args, **kwargs):
        if not is_sharded(model):
            return function(model, *args, **kwargs)
        parts = [module for module in model.modules() if is_sharded(module)]
        for part in parts:
            part.set_reshard_after_forward(part is not model and not many, recurse=False)
        result = model.call(function, *args, **kwargs)
        for part in parts if many else ():
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
