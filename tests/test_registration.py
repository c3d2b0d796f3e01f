"""Schemas, fakes and dispatch: opcheck on every raw operator, full-graph compilation, imports."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ptv2_fast.ops.attention import prefix_attention, prefix_attention_with_lse
from tests.inputs import Inputs, Shape, make_inputs

BACKENDS = ("", "_reference", "_cpp", "_triton")  # and _split, which serves the plain call only


def everything(packed: bool) -> Inputs:
    """Every option at once, padded or packed."""
    return make_inputs(
        Shape(2, 2, 6, 6, 3, 16), torch.float32, "random", rows="both", lse=True, bank=3,
        bias="shared", packed=packed,
    )  # fmt: skip


def plain() -> Inputs:
    """What the split serves."""
    return make_inputs(Shape(2, 2, 6, 6, 3, 16), torch.float32, "random")


@pytest.mark.parametrize(
    ("suffix", "packed"), [*itertools.product(BACKENDS, (False, True)), ("_split", False)]
)
def test_raw_operators_pass_opcheck(suffix, packed):
    split = suffix == "_split"
    inputs = plain() if split else everything(packed)
    options = inputs.raw_options(*(0.0, 0.0) if split else (0.25, 0.25))
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


@pytest.mark.parametrize(
    ("backend", "packed"),
    [*itertools.product((None, "reference", "cpp", "triton"), (False, True)), ("split", False)],
)
def test_public_function_compiles_as_one_graph(backend, packed):
    torch._dynamo.reset()  # every case compiles the same code object
    split = backend == "split"
    inputs = plain() if split else everything(packed)

    def attention(*tensors):
        options = {**inputs.options, "backend": backend}
        if split:
            return prefix_attention(*tensors, **options), None
        return prefix_attention_with_lse(*tensors, **options, dropout_p=0.2)

    def weighted(out, lse):
        loss = (out * inputs.grad_out).sum()
        return loss if lse is None else loss + (lse * inputs.grad_lse).sum()

    # .sum() sends an expanded gradient of stride 0, which Inductor hands over as it is.
    for grad_of in (lambda out, lse: out.sum(), weighted):
        results = []
        for function in (attention, torch.compile(attention, backend="aot_eager", fullgraph=True)):
            leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs.tensors]
            results.append(torch.autograd.grad(grad_of(*function(*leaves)), leaves))
        for eager, compiled in zip(*results, strict=True):
            assert torch.equal(eager, compiled)


class _Attention(torch.nn.Module):
    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.prefix = torch.nn.Parameter(inputs.prefix_key)
        self.static = {"max_seqlen": inputs.max_seqlen, "window": inputs.window}

    def forward(self, query, key, value, options):
        return prefix_attention(
            query, key, value, self.prefix, self.prefix, **options, **self.static, dropout_p=0.1
        )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_public_function_exports(packed):
    inputs = everything(packed)
    model = _Attention(inputs)
    options = {name: x for name, x in inputs.options.items() if name not in model.static}
    arguments = (*inputs.tensors[:3], options)
    exported = torch.export.export(model, arguments)
    assert torch.equal(exported.module()(*arguments), model(*arguments))


def test_fake_tensors_pass_with_packed_and_bank_inputs():
    inputs = everything(packed=True)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs.tensors]
        options = {
            name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for name, x in inputs.options.items()
        }
        leaves = [tensor.detach().requires_grad_() for tensor in fake]
        out = prefix_attention(*leaves, **options)
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == inputs.query.shape
    for gradient, tensor in zip(gradients, inputs.tensors, strict=True):
        assert gradient.shape == tensor.shape


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
