"""Schemas, fakes and dispatch: opcheck on every raw operator, full-graph compilation, imports."""

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ptv2_fast.ops import options as options_module
from ptv2_fast.ops.attention import prefix_attention
from ptv2_fast.ops.options import AttentionOptions
from ptv2_fast.ops.registration import BACKENDS
from ptv2_kernels.arguments import describe_call
from tests.inputs import Inputs, Shape, make_inputs
from tests.tracing_checks import (
    check_compiles_as_one_graph,
    check_raw_operators_pass_opcheck,
    everything,
)

CASES = [
    *itertools.product((None, "reference", "cpp", "triton"), (False, True)),
    ("split", False),  # it serves the plain call only
]


@pytest.mark.parametrize(("backend", "packed"), CASES)
def test_raw_operators_pass_opcheck(backend, packed):
    check_raw_operators_pass_opcheck(backend, packed)


@pytest.mark.parametrize(("backend", "packed"), CASES)
def test_public_function_compiles_as_one_graph(backend, packed):
    check_compiles_as_one_graph(backend, packed)


def fields_in_cpp() -> list[str]:
    """The members of the C++ struct of the options, in their order."""
    header = (Path(__file__).parent.parent / "csrc" / "attention.h").read_text()
    (members,) = re.findall(r"struct AttentionOptions \{\n(.*?)\n\};", header, re.DOTALL)
    return re.findall(r"(\w+)[,;]", members)


def test_options_are_the_same_in_schemas_cpp_and_triton():
    fields = [*AttentionOptions._fields]
    assert fields_in_cpp() == fields
    launched = [*inspect.signature(describe_call).parameters.values()][3:]
    assert [each.name for each in launched] == fields
    defaults = {each.name: each.default for each in launched if each.default is not each.empty}
    assert defaults == AttentionOptions._field_defaults
    suffixes = ("", *("_" + name for name in BACKENDS))
    for way, suffix in itertools.product(("forward", "backward"), suffixes):
        operator = getattr(torch.ops.ptv2, f"prefix_attention_{way}{suffix}").default
        arguments = operator._schema.arguments[-len(fields) :]
        assert [each.name for each in arguments] == fields
        given = {each.name: each.default_value for each in arguments if each.has_default_value()}
        assert given == defaults


def test_the_former_name_of_the_options_warns():
    with pytest.warns(DeprecationWarning, match="AttentionOptions"):
        assert options_module.Options is AttentionOptions


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


def test_import_loads_no_torch_and_the_operator_neither_triton_nor_transformers():
    """Beside torch the import registers the operators, which saved programs need."""
    code = """
import sys, ptv2_fast
print('torch' in sys.modules)
import torch
sys.modules.pop('ptv2_fast')
import ptv2_fast
print(hasattr(torch.ops.ptv2, 'prefix_attention_forward'))
print(sorted({'triton', 'transformers', 'torch._dynamo', 'peft', 'datasets'} & set(sys.modules)))
"""
    assert run_python(code) == "False\nTrue\n[]\n"


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
