"""Many processes as one: `torchrun --nproc_per_node=2 ppo.py ...` computes what `python ppo.py ...` computes.

    torchrun --nproc_per_node=8 -- sft.py --model gpt2 --task tldr       # one node
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-endpoint=HOST:29500 -- sft.py ...      # each of two nodes

One idea serves several GPUs and small ones.  A step's batch is a list of rows, the same on every rank.  Each
rank takes every size-th row, `--micro` of them at a time.  A loss is a sum over a part's terms divided by the
count of the *whole* batch, so that gradients of parts add up to the batch's, whether the parts are
micro-batches, ranks or both; and random numbers belong to rows, not to ranks.  So the number of ranks and the
size of micro-batches change memory and time, and results only by rounding (1e-5 of a loss in fp32).

Every rank holds the whole model and takes the same optimiser step: plain data parallelism.  It is written
out, in place of DistributedDataParallel, because the scripts run trunk, top and head of a model as they need
them, and DDP averages gradients behind one `forward` only.  With --shard (`shard`) a rank keeps only its
share of each trained layer, of its gradient and of its optimiser state, and layers are put together as they
compute; frozen layers, embeddings and the copy that samples stay whole.  Files are written by rank 0, and
read by all: they need a folder that all see.
"""
import os

import torch
import torch.distributed as dist


def start(device):
    """Joins the ranks that torchrun started, if it did.  Returns the device of this rank."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
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


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(rows):
    """This rank's rows: every size-th, for neighbours in a batch are of like length."""
    return rows[rank()::size()]


def parts(rows, micro):
    """This rank's rows, `micro` at a time (0: all at once): a list of (rows, weight), as of `passes`."""
    return passes(mine(rows), -(-len(rows) // size()), micro, rows[:1])


def passes(own, most, micro, spare):
    """Slices of `own` of at most `micro` (0: any number): a list of (slice, 1), as long on every rank as the
    one with the `most` rows needs.  A rank that has run out gets (spare, 0) instead: it has to take part when
    the others put a layer together, and its gradients of it count nothing."""
    step = micro or max(1, most)
    found = [own[i:i + step] for i in range(0, most, step)]
    return [(part, 1) if len(part) else (spare, 0) for part in found]


def gather(own):
    """The inverse of `mine`: the lists of all ranks as the one list they are shares of.  Any objects."""
    if size() == 1:
        return list(own)
    shares = [None] * size()
    dist.all_gather_object(shares, list(own))
    together = [None] * sum(map(len, shares))
    for i, share in enumerate(shares):
        together[i::size()] = share
    return together


def total(x, op="sum"):
    """Sum (or, op="max", the largest) over ranks of a tensor."""
    if size() > 1:
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x


def everyone(x):
    """The tensors x (n_rank, ...) of all ranks, one behind the other: (n, ...)."""
    if size() == 1:
        return x
    found = [None] * size()
    dist.all_gather_object(found, x.cpu())
    return torch.cat(found).to(x.device)


def add_gradients(weights):
    """Every rank's gradients become their sum: one message for all weights that are not sharded; the others
    were summed in the backward pass."""
    weights = [p for p in weights if not is_share(p)]
    if size() == 1 or not weights:
        return
    flat = total(torch.cat([p.grad.flatten() for p in weights]))
    for p, g in zip(weights, flat.split([p.numel() for p in weights])):
        p.grad.copy_(g.view_as(p))


# ------------------------------------------------------------------------------- layers spread over the ranks

def shard(*models):
    """Spreads the layers of models that are not frozen over the ranks: PyTorch's fully_shard (Zhao et al.
    2023), a layer at a time.  From then on every rank must make the same forward and backward passes."""
    if size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh      # half a second, for those who need it
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(models[0].embed.weight.device.type, (size(),))
    for model in models:
        for block in model.blocks[model.config.frozen:]:
            fully_shard(block, mesh=mesh)
            # gradients are sums over rows, here as in `add_gradients`, not means over ranks
            block.set_gradient_divide_factor(1.)
            block.set_force_sum_reduction_for_comms(True)


def is_share(x):
    """Whether the tensor x is this rank's share of one (torch's DTensor, which is slow to import)."""
    return hasattr(x, "full_tensor")


def whole(x):
    """The tensor of which x is a share (all ranks must ask); any other tensor as it is."""
    return x.full_tensor() if is_share(x) else x


def share_like(x, other):
    """This rank's share of the tensor x, if `other` is one; else x."""
    if not is_share(other):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def by_kind(weights):
    """Weights in groups for an optimiser, whose kernels take sharded and other ones apart."""
    groups = [[p for p in weights if is_share(p) == sharded] for sharded in (True, False)]
    return [{"params": group} for group in groups if group]


def clip_gradients(weights, most):
    """Scales all gradients so that their joint norm is at most `most`.  Returns the norm before: ()."""
    groups = [group["params"] for group in by_kind(weights)]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in groups]
    norm = torch.stack(norms).norm() if len(norms) > 1 else norms[0]
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, most, norm)
    return norm
