"""Schemas, fakes and whole graphs of the attention operators, on any device."""

import torch

from ptv2_fast.ops.attention import prefix_attention, prefix_attention_with_lse
from tests.devices import CPU, device_of
from tests.inputs import Inputs, Shape, make_inputs

NAMES = ("query", "key", "value", "prefix_key", "prefix_value", "prefix_gate")


def everything(packed: bool, device: torch.device = CPU) -> Inputs:
    """Every option at once, padded or packed."""
    return make_inputs(
        Shape(2, 2, 6, 6, 3, 16), torch.float32, "random", rows="both", lse=True, bank=3,
        bias="shared", packed=packed, device=device, gate="closed",
    )  # fmt: skip


def plain() -> Inputs:
    """What the split serves."""
    return make_inputs(Shape(2, 2, 6, 6, 3, 16), torch.float32, "random", gate="closed")


def inputs_of(backend: str | None, packed: bool, device: torch.device | None) -> Inputs:
    if backend == "split":
        return plain()
    return everything(packed, device_of(backend) if device is None else device)


def check_raw_operators_pass_opcheck(
    backend: str | None, packed: bool, device: torch.device | None = None
) -> None:
    """`backend`: None for the operators that the dispatcher serves."""
    inputs = inputs_of(backend, packed, device)
    suffix = "" if backend is None else f"_{backend}"
    options = inputs.raw_options(*(0.0, 0.0) if backend == "split" else (0.25, 0.25))
    forward = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix).default
    backward = getattr(torch.ops.ptv2, "prefix_attention_backward" + suffix).default
    torch.library.opcheck(forward, (*inputs.raw_tensors, *options))
    results = forward(*inputs.raw_tensors, *options)
    arguments = (inputs.grad_out, *inputs.raw_tensors, *results, inputs.grad_lse)
    for needs in (
        (True, True, True, False),
        (False, False, True, False),
        (True, True, True, True),
    ):
        torch.library.opcheck(backward, (*arguments, *needs, *options))


def check_compiles_as_one_graph(
    backend: str | None,
    packed: bool,
    device: torch.device | None = None,
    compiler: str = "aot_eager",
) -> None:
    """The public function and its gradients, compiled, to the bit."""
    torch._dynamo.reset()  # every case compiles the same code object
    inputs = inputs_of(backend, packed, device)

    trained = (*inputs.tensors, inputs.prefix_gate)

    def attention(*tensors_and_gate):
        *tensors, gate = tensors_and_gate
        options = {**inputs.options, "prefix_gate": gate, "backend": backend}
        if backend == "split":
            return prefix_attention(*tensors, **options), None
        return prefix_attention_with_lse(*tensors, **options, dropout_p=0.2)

    def weighted(out, lse):
        loss = (out * inputs.grad_out).sum()
        return loss if lse is None else loss + (lse * inputs.grad_lse).sum()

    # .sum() sends an expanded gradient of stride 0, which Inductor hands over as it is.
    for grad_of in (lambda out, lse: out.sum(), weighted):
        results = []
        for function in (attention, torch.compile(attention, backend=compiler, fullgraph=True)):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in trained]
            results.append(torch.autograd.grad(grad_of(*function(*leaves)), leaves))
        for name, eager, compiled in zip(NAMES, *results, strict=True):
            assert torch.equal(eager, compiled), f"gradient of {name}"
