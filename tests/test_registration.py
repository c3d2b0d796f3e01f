"""Schemas, fakes and dispatch: opcheck on every raw operator, full-graph compilation, imports."""

import subprocess
import sys

import pytest
import torch

from ptv2_fast.ops.attention import prefix_attention, prefix_attention_with_lse
from tests.inputs import Shape, make_inputs

BACKENDS = ("", "_reference", "_cpp", "_triton", "_split")


@pytest.mark.parametrize("suffix", BACKENDS)
def test_raw_operators_pass_opcheck(suffix):
    inputs = make_inputs(Shape(2, 2, 6, 6, 3, 16), torch.float32, "random", rows="both", lse=True)
    split = suffix == "_split"  # serves the plain call only
    p = 0.0 if split else 0.25
    options = (inputs.key_mask, inputs.seed, 0.25, p, p)
    rows = () if split else (inputs.context_lengths, inputs.window)
    forward = getattr(torch.ops.ptv2, "prefix_attention_forward" + suffix).default
    backward = getattr(torch.ops.ptv2, "prefix_attention_backward" + suffix).default
    torch.library.opcheck(forward, (*inputs.tensors, *options, *rows))
    out, lse = forward(*inputs.tensors, *options, *rows)
    for needs in ((True, True, True), (False, False, True)):
        arguments = (inputs.grad_out, *inputs.tensors, out, lse, *options, *needs, *rows)
        if not split:
            arguments = (*arguments, inputs.grad_lse)
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("backend", [None, "reference", "cpp", "triton", "split"])
def test_public_function_compiles_as_one_graph(backend):
    inputs = make_inputs(Shape(2, 2, 6, 6, 3, 16), torch.float32, "random", rows="both", lse=True)
    p = 0.0 if backend == "split" else 0.2
    rows = {"context_lengths": inputs.context_lengths, "window": inputs.window}
    operator = prefix_attention_with_lse
    if backend == "split":
        rows, operator = {}, lambda *tensors, **options: (prefix_attention(*tensors, **options), 0)

    def attention(*tensors):
        return operator(
            *tensors, key_mask=inputs.key_mask, dropout_p=p, seed=inputs.seed, backend=backend,
            **rows,
        )  # fmt: skip

    def weighted(out, lse):
        loss = (out * inputs.grad_out).sum()
        return loss + (lse * inputs.grad_lse).sum() if rows else loss

    # .sum() sends an expanded gradient of stride 0, which Inductor hands over as it is.
    for grad_of in (lambda out, lse: out.sum(), weighted):
        results = []
        for function in (attention, torch.compile(attention, backend="aot_eager", fullgraph=True)):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
            results.append(torch.autograd.grad(grad_of(*function(*leaves)), leaves))
        for eager, compiled in zip(*results, strict=True):
            assert torch.equal(eager, compiled)


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_neither_triton_nor_transformers():
    heavy = "{'triton', 'transformers', 'torch._dynamo', 'peft', 'datasets'}"
    assert run_python(f"import sys, ptv2_fast; print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_import_and_operator_work_without_triton_and_extension():
    code = """
import sys
sys.modules['triton'] = None
sys.modules['ptv2_fast._C'] = None
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)
import torch, ptv2_fast
query = torch.randn(2, 2, 5, 16, requires_grad=True)
prefix = torch.randn(2, 3, 16, requires_grad=True)
for p in (0.0, 0.3):
    ptv2_fast.prefix_attention(query, query, query, prefix, prefix, dropout_p=p).sum().backward()
assert prefix.grad.abs().max() > 0
print(ptv2_fast.backends()['cpu'].split(',')[0])
"""
    assert run_python(code) == "split\n"


def test_float64_is_served_by_the_reference():
    inputs = make_inputs(Shape(1, 2, 4, 4, 3, 8), torch.float64)
    assert prefix_attention(*inputs.tensors).dtype == torch.float64
