"""A recorded step: the kernels of one sampled token, launched together.  A small model's step is hundreds of
kernels of some microseconds, and Python takes longer to launch them than they run."""
from functools import cache

import torch


@cache
def _recording_stream(device):
    """One for all records: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def recorded(step, device):
    """step, a function without arguments, as a CUDA graph: also one, which on a CPU is step itself.  Whatever
    changes from call to call must lie in tensors that stay where they are."""
    if device.type != "cuda":
        return step
    graph, stream = torch.cuda.CUDAGraph(), _recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):     # which makes its device the current one
        graph.capture_begin()
        step()                          # recorded, not done
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay
