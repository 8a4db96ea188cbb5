"""A recorded step: the kernels of one sampled token, launched together, because Python is slower than they
are."""
from functools import cache

import torch


@cache
def _recording_stream(device):
    """One for all records: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def recorded(step, device):
    """step, a function without arguments, as a CUDA graph: its kernels are recorded once and launched
    together. Returns a function without arguments; on a CPU it is step itself.

    A small model's step is hundreds of kernels of some microseconds, and launching them one by one takes
    longer than they do.  Whatever changes from call to call must lie in tensors that stay where they are."""
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
