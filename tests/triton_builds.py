"""Compiles the shipped kernels ahead of time, without a GPU, and reads the machine code.

    python -m tests.triton_builds --targets sm_80 gfx942 --head-dims 64 --dtypes bf16

Run without TRITON_INTERPRET; prints one JSON object per kernel.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ptv2_kernels import backward, backward_prefix, forward
from ptv2_kernels.configs import shipped_config

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Shared memory a block may use, bytes.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
MATRIX_INSTRUCTION = {"cuda": r"\b(HMMA|HGMMA|UTC\w*MMA)", "hip": r"\bv_mfma"}
LOCAL_ACCESS = r"\b(?:LDL|STL|scratch_(?:load|store))"
WIDE_LOAD = r"LDG\.E\.128|LDGSTS\.E\.\S*128|buffer_load_dwordx4|global_load_dwordx4"


def target_of(name: str) -> GPUTarget:
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)


def record_launches(
    dtype: torch.dtype, head_dim: int, dropout_p: float, prefix_dropout_p: float, rows: bool
):
    """The arguments of every kernel of a forward and backward pass, caught before the launch.

    `rows`: grouped heads, context lengths, a window and a gradient of lse too.
    """
    heads = 6 if rows else 3
    query = torch.empty(2, 200, heads, head_dim, dtype=dtype).transpose(1, 2)
    key = torch.empty(2, 200, 3, head_dim, dtype=dtype).transpose(1, 2)
    prefix = torch.empty(3, 100, head_dim, dtype=dtype)
    visibility = (torch.zeros(2, dtype=torch.int32), 50) if rows else (None, -1)
    mask, seed = torch.ones(2, 200, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
    launches = []
    modules = {
        (forward, "_prefix_attention_forward_kernel"): "forward",
        (backward, "_delta_kernel"): None,
        (backward, "_grad_query_kernel"): "query",
        (backward, "_grad_key_value_kernel"): "key_value",
        (backward_prefix, "_grad_prefix_kernel"): "prefix",
        (backward_prefix, "_sum_partials_kernel"): None,
    }

    class Recorder:
        def __init__(self, kernel, config_name):
            self.kernel, self.config_name = kernel, config_name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(
                (self.kernel, self.config_name, args, kwargs)
            )

    saved = {key: getattr(*key) for key in modules}
    try:
        for (module, name), config_name in modules.items():
            setattr(module, name, Recorder(saved[module, name], config_name))
        options = (mask, seed, head_dim**-0.5, dropout_p, prefix_dropout_p)
        out, lse = forward.launch_forward(query, key, key, prefix, prefix, *options, *visibility)
        backward.launch_backward(
            torch.empty(query.shape, dtype=dtype), query, key, key, prefix, prefix, out, lse,
            *options, True, True, True, *visibility, lse if rows else None,
        )  # fmt: skip
    finally:
        for (module, name), kernel in saved.items():
            setattr(module, name, kernel)
    return launches


def compile_launch(kernel, target: GPUTarget, args: tuple, kwargs: dict):
    """Compiles for `target` exactly what kernel[grid](*args, **kwargs) would compile."""
    if hasattr(kernel, "values"):  # triton.heuristics
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        flags = {name: heuristic(named) for name, heuristic in kernel.values.items()}
        kernel, kwargs = kernel.fn, {**kwargs, **flags}
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


@dataclass(frozen=True)
class MachineCode:
    text: str
    registers: int
    spill_bytes: int  # stack of one thread

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text))


def _nvidia_tool(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool, *options = command
        command_line = [NVIDIA_TOOLS / tool, *options, file.name]
        return subprocess.run(command_line, capture_output=True, text=True, check=True).stdout


def machine_code(compiled, target: GPUTarget) -> MachineCode:
    if target.backend == "cuda":
        cubin = compiled.asm["cubin"]
        text = _nvidia_tool(cubin, "nvdisasm", "-c")
        usage = _nvidia_tool(cubin, "cuobjdump", "--dump-resource-usage")
        registers, spill_bytes = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    else:
        text = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", text).group(1)
        spill_bytes = re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1)
    return MachineCode(text, int(registers), int(spill_bytes))


def build(
    target_name: str,
    dtype_name: str,
    head_dim: int,
    dropout_p: float,
    prefix_dropout_p: float,
    rows: bool,
) -> Iterator[dict[str, object]]:
    """Compiles all kernels of one case; yields what is known about each."""
    target = target_of(target_name)
    dtype = DTYPES[dtype_name]
    for kernel, config_name, args, kwargs in record_launches(
        dtype, head_dim, dropout_p, prefix_dropout_p, rows
    ):
        if config_name is not None:
            amd = target.backend == "hip"
            kwargs.pop("maxnreg", None)  # chosen for the machine this runs on
            kwargs |= shipped_config(config_name, head_dim, dtype.itemsize, amd).options()
            if amd:
                kwargs["INPUT_PRECISION"] = "ieee"
        compiled = compile_launch(kernel, target, args, kwargs)
        code = machine_code(compiled, target)
        yield {
            "target": target_name,
            "dtype": dtype_name,
            "head_dim": head_dim,
            "dropout": dropout_p,
            "prefix_dropout": prefix_dropout_p,
            "rows": rows,
            "kernel": config_name or kernel.fn.__name__,
            "registers": code.registers,
            "spill_bytes": code.spill_bytes,
            "shared_bytes": compiled.metadata.shared,
            "shared_limit": SHARED_LIMIT[target_name],
            "local_accesses": code.count(LOCAL_ACCESS),
            "matrix_instructions": code.count(MATRIX_INSTRUCTION[target.backend]),
            "wide_loads": code.count(WIDE_LOAD),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0])
    parser.add_argument("--prefix-dropout", type=float, default=0.0)
    parser.add_argument("--rows", action="store_true", help="grouped, causal, windowed")
    arguments = parser.parse_args()
    for target in arguments.targets:
        for dtype in arguments.dtypes:
            for head_dim in arguments.head_dims:
                for dropout_p in arguments.dropout:
                    options = (dropout_p, arguments.prefix_dropout, arguments.rows)
                    for row in build(target, dtype, head_dim, *options):
                        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
