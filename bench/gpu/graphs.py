"""CUDA graphs: one launch for all the kernels of a call, so that short kernels can be timed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP_CALLS = 3  # compile, tune and allocate before the capture


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """What replays the kernels of a call; its tensors stay those of the capture.

    Args:
        call: launches kernels and reads nothing back; gradients it makes with
            torch.autograd.grad, not by accumulating into `.grad`.
        device: of its tensors.

    Returns:
        None on a CPU, and where the call cannot be captured (it copies to the CPU, say).
    """
    if device.type != "cuda":
        return None
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    generator = torch.cuda.default_generators[device.index or 0]
    # A capture that fails leaves the generator in a state that refuses to draw.
    before = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            call()
    except RuntimeError:
        torch.cuda.synchronize(device)
        generator.graphsafe_set_state(before)
        return None
    return _Replay(graph, call)


@dataclass(frozen=True)
class _Replay:
    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]  # its tensors live as long

    def __call__(self) -> None:
        self.graph.replay()
