"""Several processes compute what one computes: `torchrun ... ppo.py` equals `python ppo.py`.

    torchrun --nproc_per_node=8 -- sft.py --model gpt2 --task tldr                      # one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-endpoint=HOST:29500 -- sft.py ...     # on each of two

Rank r takes rows r, r + world_size, ... of a batch and forwards at most --micro-batch-size of them at a time.
A loss is a sum over the terms of a part, divided by the count of the *whole* batch, so the gradients of all
parts add up.  Random numbers belong to rows.  So ranks and micro-batches change results by rounding only.

DistributedDataParallel would average gradients after one `forward` only, and the scripts call trunk, top and
head one by one.  With --shard a rank keeps its shard of each trained layer, of its gradient and of its
optimizer state.  Rank 0 writes the files and all ranks read them, so they need a common folder.
"""
import os
import re

import torch
import torch.distributed as dist

from common.errors import UserError
from model import GPT


def start(device):
    """Joins the ranks that torchrun started, if it did.  Returns the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if not all(name in os.environ for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
            raise UserError("WORLD_SIZE is set, but not by torchrun: start with torchrun, or unset it")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def my_rows(rows):
    """This rank's rows: every world_size-th one, because neighbours in a batch have similar lengths."""
    return rows[rank()::world_size()]


def gather_rows(mine):
    """The inverse of `my_rows`: the lists of all ranks, of any objects, put back into one list."""
    if world_size() == 1:
        return list(mine)
    lists = [None] * world_size()
    dist.all_gather_object(lists, list(mine))
    together = [None] * sum(map(len, lists))
    for r, rows in enumerate(lists):
        together[r::world_size()] = rows
    return together


def all_reduce(x, op="sum"):
    """The sum (or, op="max", the maximum) of a tensor over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def all_gather(x):
    """The tensors x (n_rank, ...) of all ranks, one after the other: (n, ...)."""
    return torch.cat(gather_rows([x.cpu()])).to(x.device)


def mean_over_ranks(x):
    """The mean of x (n_rank,) over all rows of all ranks, a float."""
    return all_gather(x).float().mean().item()


def sum_gradients(params):
    """Sums gradients over ranks.  The backward pass has summed those of sharded parameters already."""
    for p in params:
        if not is_sharded(p):
            all_reduce(p.grad)


# ------------------------------------------------------------------------------ layers sharded over the ranks

def shard(*models):
    """Shards the trained layers of models over the ranks by PyTorch's fully_shard (Zhao et al. 2023).  From
    then on every rank must make the same forward and backward passes."""
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh      # half a second, only where it is needed
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(models[0].device.type, (world_size(),))
    for model in models:
        for block in model.blocks[model.config.frozen:]:
            # gathered for a forward or a backward pass and freed after it, also where no backward pass comes
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
            # gradients are sums over rows, as in `sum_gradients`, not means over ranks
            block.set_gradient_divide_factor(1.)
            block.set_force_sum_reduction_for_comms(True)


def is_sharded(x):
    """Whether the tensor x is this rank's shard of a larger one: torch's DTensor, slow to import."""
    return hasattr(x, "full_tensor")


def unshard(x):
    """The full tensor of a sharded one (all ranks must call); any other tensor as it is."""
    return x.full_tensor() if is_sharded(x) else x


def shard_like(x, other):
    """This rank's shard of the tensor x, if `other` is sharded; else x."""
    if not is_sharded(other):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def full_copy(model, dtype=torch.float32):
    """The model, no weight sharded, the matrices of its layers in dtype unless it is fp32; itself if nothing
    changes."""
    weights, layer = model.state_dict(), re.compile(r"blocks\.\d+\.(attn\.(qkv|out)|mlp)\.")
    full = {k: unshard(p).to(dtype if dtype != torch.float32 and layer.match(k) else p.dtype)
            for k, p in weights.items()}
    if all(full[k] is p for k, p in weights.items()):
        return model
    with torch.device("meta"):
        twin = GPT(model.config, model.scalar)
    twin.load_state_dict(full, assign=True)
    if twin.config.tied and not twin.scalar:
        twin.head.weight = twin.embed.weight
    twin.compute_dtype = model.compute_dtype
    return twin


def param_groups(params):
    """Parameters in groups for an optimizer, because its kernels take sharded and other ones apart."""
    groups = ([p for p in params if is_sharded(p) is sharded] for sharded in (True, False))
    return [{"params": group} for group in groups if group]


def clip_grad_norm(params, max_norm):
    """Scales all gradients so that their joint norm is at most max_norm.  Returns the norm before: ()."""
    groups = [group["params"] for group in param_groups(params)]
    norms = [unshard(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in groups]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
