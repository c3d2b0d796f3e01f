"""Schemas, fakes and dispatch keys of the raw operators; torch only, registered at import.

`ptv2::prefix_attention_forward` and `_backward` are what the public function calls: the dispatcher
picks C++ on CPU, Triton on CUDA, ROCm and XPU, and plain torch elsewhere. Each backend also has a
pair of its own, with the backend's name as suffix, so that `backend=` forces one and still traces.
"""

import importlib.util

import torch

from ptv2_fast.ops.layout import empty_gradients, empty_token_major
from ptv2_fast.ops.reference import reference_attention, reference_gradients
from ptv2_fast.ops.split import split_backward, split_forward

try:
    import ptv2_fast._C  # registers the C++ operators for CPU  # noqa: F401

    CPP_IMPORT_ERROR = None
except ImportError as error:  # a pure-Python install: CPU is served by split and reference
    CPP_IMPORT_ERROR = str(error)

HAS_TRITON = importlib.util.find_spec("triton") is not None

BACKENDS = ("reference", "cpp", "triton", "split")
KERNEL_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "xpu": (torch.float32, torch.bfloat16, torch.float16),
}

_FORWARD_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor prefix_value, "
    "Tensor? key_mask, Tensor? seed, float scale, float dropout_p, float prefix_dropout_p, "
    "Tensor? context_lengths=None, int window=-1) -> (Tensor out, Tensor lse)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor prefix_key, "
    "Tensor prefix_value, Tensor out, Tensor lse, Tensor? key_mask, Tensor? seed, float scale, "
    "float dropout_p, float prefix_dropout_p, bool needs_query, bool needs_key_value, "
    "bool needs_prefix, Tensor? context_lengths=None, int window=-1, Tensor? grad_lse=None) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_prefix_key, "
    "Tensor grad_prefix_value)"
)


def _fake_forward(query, key, value, prefix_key, prefix_value, *_):
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    return empty_token_major(query), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _fake_backward(grad_out, query, key, value, prefix_key, prefix_value, *rest):
    return empty_gradients(query, key, prefix_key, *_needs(rest))


def _needs(rest):
    """needs_query, needs_key_value, needs_prefix out of the arguments after prefix_value."""
    return rest[7:10]


def _reference_forward(query, *arguments):
    out, lse = reference_attention(query, *arguments)
    return empty_token_major(query).copy_(out), lse


def _reference_backward(grad_out, query, key, value, prefix_key, prefix_value, *rest):
    needs_query, needs_key_value, needs_prefix = _needs(rest)
    needed = (needs_query, needs_key_value, needs_key_value, needs_prefix, needs_prefix)
    exact = reference_gradients(
        grad_out, query, key, value, prefix_key, prefix_value, *rest[:7], *rest[10:]
    )
    gradients = empty_gradients(query, key, prefix_key, needs_query, needs_key_value, needs_prefix)
    return tuple(
        gradient.copy_(result) if need else gradient
        for gradient, result, need in zip(gradients, exact, needed, strict=True)
    )


def _split_serves(query, p, prefix_p, context_lengths=None, window=-1, grad_lse=None):
    plain = context_lengths is None and window < 0 and grad_lse is None
    return plain and p == prefix_p == 0 and query.dtype != torch.float64


def _default_forward(query, key, value, prefix_key, prefix_value, key_mask, seed, scale, *options):
    """Serves devices without kernels: by torch's SDPA kernels where they can, or by definition."""
    forward = split_forward if _split_serves(query, *options) else _reference_forward
    return forward(query, key, value, prefix_key, prefix_value, key_mask, seed, scale, *options)


def _default_backward(grad_out, query, key, value, prefix_key, prefix_value, *rest):
    # rest: out, lse, key_mask, seed, scale, dropout_p, prefix_dropout_p, three needs, the optional
    serves = _split_serves(query, *rest[5:7], *rest[10:])
    backward = split_backward if serves else _reference_backward
    return backward(grad_out, query, key, value, prefix_key, prefix_value, *rest)


def triton_serves(device: torch.device) -> bool:
    """Triton compiles tensor-core code for compute capability 8.0 and later only."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _triton_forward(*arguments):
    from ptv2_kernels.forward import launch_forward

    return launch_forward(*arguments)


def _triton_backward(*arguments):
    from ptv2_kernels.backward import launch_backward

    return launch_backward(*arguments)


def _gpu_forward(query, *arguments):
    forward = _triton_forward if triton_serves(query.device) else _default_forward
    return forward(query, *arguments)


def _gpu_backward(grad_out, *arguments):
    backward = _triton_backward if triton_serves(grad_out.device) else _default_backward
    return backward(grad_out, *arguments)


_library = torch.library.Library("ptv2", "DEF")


def _register_pair(suffix: str, forward, backward) -> None:
    for name, schema, fake, kernel in (
        ("prefix_attention_forward", _FORWARD_SCHEMA, _fake_forward, forward),
        ("prefix_attention_backward", _BACKWARD_SCHEMA, _fake_backward, backward),
    ):
        _library.define(name + suffix + schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake("ptv2::" + name + suffix, fake, lib=_library)
        if kernel is not None:
            _library.impl(name + suffix, kernel, "CompositeExplicitAutograd")


_library.define("cpu_capability() -> str")
_register_pair("", _default_forward, _default_backward)
_register_pair("_reference", _reference_forward, _reference_backward)
_register_pair("_split", split_forward, split_backward)
_register_pair("_cpp", None, None)
_register_pair("_triton", _triton_forward, _triton_backward)
if HAS_TRITON:
    for dispatch_key in ("CUDA", "XPU"):
        _library.impl("prefix_attention_forward", _gpu_forward, dispatch_key)
        _library.impl("prefix_attention_backward", _gpu_backward, dispatch_key)
