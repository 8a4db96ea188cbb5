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
them, and DDP averages gradients behind one `forward` only.  Files are written by rank 0, and read by all:
they need a folder that all see.
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
    """This rank's rows, `micro` at a time; 0: all at once.  A list of lists, none empty."""
    own = mine(rows)
    step = micro or max(1, len(own))
    return [own[i:i + step] for i in range(0, len(own), step)]


def gather(own):
    """The inverse of `mine`: the lists of all ranks as the one list they are shares of.  Any objects."""
    if size() == 1:
        return list(own)
    shares = [None] * size()
    dist.all_gather_object(shares, list(own))
    whole = [None] * sum(map(len, shares))
    for i, share in enumerate(shares):
        whole[i::size()] = share
    return whole


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
    """Every rank's gradients become their sum: one message for all weights.  A weight without a gradient (a
    rank may have had no row) counts as zeros."""
    if size() == 1:
        return
    for p in weights:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = total(torch.cat([p.grad.flatten() for p in weights]))
    for p, g in zip(weights, flat.split([p.numel() for p in weights])):
        p.grad.copy_(g.view_as(p))
