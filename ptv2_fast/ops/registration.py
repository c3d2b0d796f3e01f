"""Schemas, fakes and dispatch keys of the raw operators; torch only, registered at import.

`ptv2::prefix_attention_forward` and `_backward` are what the public function calls: the dispatcher
picks C++ on CPU, Triton on CUDA, ROCm and XPU, and plain torch elsewhere. Each backend also has a
pair of its own, with the backend's name as suffix, so that `backend=` forces one and still traces.
"""

import importlib.util

import torch

from ptv2_fast.ops.layout import empty_gradients, empty_lse, empty_token_major, split_joint
from ptv2_fast.ops.options import AttentionOptions, schema_of_options
from ptv2_fast.ops.reference import reference_attention, reference_gradients
from ptv2_fast.ops.split import split_backward, split_forward, split_serves
from ptv2_fast.ops.triton_calls import with_fallback

try:
    import ptv2_fast._C  # registers the C++ operators for CPU  # noqa: F401

    CPP_IMPORT_ERROR = None
except ImportError as error:  # a pure-Python install: CPU is served by split and reference
    CPP_IMPORT_ERROR = str(error)

HAS_TRITON = importlib.util.find_spec("triton") is not None

BACKENDS = ("reference", "cpp", "triton", "split")
# Those that serve disentangled attention.
POSITION_BACKENDS: tuple[str, ...] = ("reference", "cpp", "triton")
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "xpu": (torch.float32, torch.bfloat16, torch.float16),
}


_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value"
_OPTIONS = schema_of_options()
_FORWARD_SCHEMA = f"({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, {_TENSORS}, Tensor out, Tensor lse, Tensor? grad_lse, bool needs_query, "
    f"bool needs_key_value, bool needs_prefix, bool joint, {_OPTIONS}) -> (Tensor grad_query, "
    "Tensor grad_key, Tensor grad_value, Tensor grad_prefix_key, Tensor grad_prefix_value, "
    "Tensor grad_prefix_gate)"
)


def _fake_forward(query, *_):
    return empty_token_major(query), empty_lse(query)


def _fake_backward(
    grad_out, query, key, value, prefix_key, prefix_value, out, lse, grad_lse, *rest
):
    return empty_gradients(
        query, key, prefix_key, *rest[:4], AttentionOptions(*rest[4:]).prefix_gate
    )


def _reference_forward(query, key, value, prefix_key, prefix_value, *options):
    tensors = (query, key, value, prefix_key, prefix_value)
    out, lse = reference_attention(*tensors, AttentionOptions(*options))
    return empty_token_major(query).copy_(out), empty_lse(query).copy_(lse)


def _reference_backward(
    grad_out, query, key, value, prefix_key, prefix_value, out, lse, grad_lse,
    needs_query, needs_key_value, needs_prefix, joint, *options,
):  # fmt: skip
    tensors = (query, key, value, prefix_key, prefix_value)
    chosen = AttentionOptions(*options)
    exact = reference_gradients(grad_out, *tensors, out, lse, grad_lse, chosen)
    needs = (needs_query, needs_key_value, needs_prefix)
    gradients = empty_gradients(query, key, prefix_key, *needs, joint, chosen.prefix_gate)
    targets = gradients
    if joint:
        targets = (*split_joint(gradients[0], key.shape[1]), *gradients[3:])
    needed = (needs_query, *[needs_key_value] * 2, *[needs_prefix] * 3)
    for target, result, need in zip(targets, exact, needed, strict=True):
        if need:
            target.copy_(result)
    return gradients


def _split_forward(query, key, value, prefix_key, prefix_value, *options):
    return split_forward(query, key, value, prefix_key, prefix_value, AttentionOptions(*options))


def _split_backward(
    grad_out, query, key, value, prefix_key, prefix_value, out, lse, grad_lse,
    needs_query, needs_key_value, needs_prefix, joint, *options,
):  # fmt: skip
    tensors = (query, key, value, prefix_key, prefix_value)
    needs = (needs_query, needs_key_value, needs_prefix, joint)
    return split_backward(
        grad_out, *tensors, out, lse, grad_lse, AttentionOptions(*options), *needs
    )


def _default_forward(query, key, value, prefix_key, prefix_value, *options):
    """Serves devices without kernels: by torch's SDPA kernels where they can, or by definition."""
    forward = (
        _split_forward if split_serves(query, AttentionOptions(*options)) else _reference_forward
    )
    return forward(query, key, value, prefix_key, prefix_value, *options)


def _default_backward(grad_out, *arguments):
    query, grad_lse, options = arguments[0], arguments[7], AttentionOptions(*arguments[12:])
    serves = split_serves(query, options, grad_lse)
    return (_split_backward if serves else _reference_backward)(grad_out, *arguments)


def _triton_forward(*arguments):
    from ptv2_kernels.forward import launch_forward

    return launch_forward(*arguments)


def _triton_backward(*arguments):
    from ptv2_kernels.backward import launch_backward

    return launch_backward(*arguments)


library = torch.library.Library("ptv2", "DEF")


def _register_pair(suffix: str, forward, backward) -> None:
    for name, schema, fake, kernel in (
        ("prefix_attention_forward", _FORWARD_SCHEMA, _fake_forward, forward),
        ("prefix_attention_backward", _BACKWARD_SCHEMA, _fake_backward, backward),
    ):
        library.define(name + suffix + schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake("ptv2::" + name + suffix, fake, lib=library)
        if kernel is not None:
            library.impl(name + suffix, kernel, "CompositeExplicitAutograd")


library.define("cpu_capability() -> str")
# Single steps of the C++ kernels, for tests and benchmarks.
library.define("micro_exp(Tensor input) -> Tensor")
library.define("micro_dropout(Tensor input, Tensor seed, float p, int stream) -> Tensor")
library.define("micro_pack(Tensor key) -> Tensor")
_register_pair("", _default_forward, _default_backward)
_register_pair("_reference", _reference_forward, _reference_backward)
_register_pair("_split", _split_forward, _split_backward)
_register_pair("_cpp", None, None)
_register_pair("_triton", _triton_forward, _triton_backward)
if HAS_TRITON:
    for name, launch, fallback in (
        ("prefix_attention_forward", _triton_forward, _default_forward),
        ("prefix_attention_backward", _triton_backward, _default_backward),
    ):
        for dispatch_key in ("CUDA", "XPU"):
            library.impl(name, with_fallback(name, launch, fallback), dispatch_key)
