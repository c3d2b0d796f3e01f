"""Builds kernel_runner.cpp with any compiler and flags, and runs cases of the operator through it.
row_runner.cpp, for the elementwise operators, makes its own.

The file of cases holds the plain data of csrc/problem.h; its layout is that of the structures in
kernel_runner.cpp.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.closeness import assert_close_to_oracle
from tests.inputs import Inputs
from tests.oracle import Results, concatenate_and_expand, magnitudes, oracle

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "kernel_runner"
PROGRAMS = ("kernel_runner", "row_runner")
KERNEL_SOURCES = ["csrc/run.cpp", "csrc/dispatch.cpp"]
COMMON_FLAGS = (
    "-std=c++17", "-ffp-contract=fast", "-fno-wrapv", "-Wall", "-Wno-psabi", "-pthread", "-Icsrc",
)  # fmt: skip


@dataclass(frozen=True)
class Build:
    name: str
    flags: tuple[str, ...]
    compiler: str = "g++"
    launcher: tuple[str, ...] = ()

    def missing_tool(self) -> str | None:
        tools = (self.compiler, *self.launcher)
        return next((tool for tool in tools if shutil.which(tool) is None), None)


PLAIN = Build("plain", ("-O1",))  # the quickest to compile
OPTIMISED = Build("optimised", ("-O3",))
# Below -O2 GCC fuses multiplications and additions with -fexpensive-optimizations only, whatever
# -ffp-contract says; without it the kernels would round otherwise than those of a release.
SANITIZED = ("-O1", "-g", "-fexpensive-optimizations", "-fno-sanitize-recover=all")
ADDRESS = Build("address", (*SANITIZED, "-fsanitize=address,undefined"))
THREAD = Build("thread", (*SANITIZED, "-fsanitize=thread"))
ARM64 = Build("arm64", ("-O2", "-static"), "aarch64-linux-gnu-g++", ("qemu-aarch64",))


def build_runner(build: Build, name: str = "kernel_runner") -> Path:
    """The path of the runner of a name; both are compiled when a source or a flag has changed."""
    levels = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/level_*.cpp"))
    programs = [f"tests/{program}.cpp" for program in PROGRAMS]
    sources = [*KERNEL_SOURCES, *levels, *programs]
    digest = hashlib.sha256(repr((build, COMMON_FLAGS)).encode())
    for path in [*sources, "tests/runner_memory.h", *sorted(ROOT.glob("csrc/*.h"))]:
        digest.update((ROOT / path).read_bytes())
    folder = CACHE / f"{build.name}-{digest.hexdigest()[:16]}"
    if (folder / name).exists():
        return folder / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [build.compiler, *COMMON_FLAGS, *build.flags]
    objects = [folder / f"{Path(source).stem}.{os.getpid()}.o" for source in sources]
    compiling = [
        subprocess.Popen(
            [*command, "-c", source, "-o", str(file)],
            cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for source, file in zip(sources, objects, strict=True)
    ]  # fmt: skip
    errors = [process.communicate()[1] for process in compiling]
    if any(process.returncode for process in compiling):
        raise RuntimeError("\n".join(errors))
    kernels, mains = objects[: -len(PROGRAMS)], objects[-len(PROGRAMS) :]
    for program, main in zip(PROGRAMS, mains, strict=True):
        linked = folder / f"{program}.{os.getpid()}"
        subprocess.run([*command, *map(str, (*kernels, main)), "-o", str(linked)], cwd=ROOT,
                       check=True)  # fmt: skip
        linked.rename(folder / program)
    for file in objects:
        file.unlink()
    return folder / name


@dataclass(frozen=True)
class Case:
    inputs: Inputs
    p: float = 0.0
    prefix_p: float = 0.0
    needs: tuple[bool, bool, bool] = (True, True, True)  # query, key and value, prefix
    joint: bool = False
    gaps: bool = False  # between the rows of the outputs

    @property
    def packed(self) -> bool:
        return self.inputs.cu_seqlens is not None


# Names of the tensors in the order of the runner's TensorName.
INPUTS = (
    "query", "key", "value", "prefix_key", "prefix_value", "grad_out", "grad_lse", "bias",
    "key_mask", "cu_seqlens", "prefix_index", "prefix_lengths", "context_lengths",
    "position_key", "position_query", "position_slots", "prefix_gate",
)  # fmt: skip
OUTPUTS = Results._fields
NO_TENSOR = (-1, 0, 0, 0, 0, 0)


def poisoned_memory(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, margin: int = 0
) -> Tensor:
    """Memory from a view's first element to its last one, and margins; every bit set: NaN or -1."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = 2 * margin + (0 if 0 in shape else last + 1)
    return torch.full((count * dtype.itemsize,), 255, dtype=torch.uint8).view(dtype)


class CaseFile:
    """The bytes of one case, and where its outputs lie in what the runner writes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.buffers: list[tuple[bool, Tensor]] = []
        self.records: dict[str, tuple[int, ...]] = {}
        self.views: dict[str, tuple[int, Tensor]] = {}  # of the outputs
        for name in INPUTS:
            tensor = getattr(case.inputs, name)
            if tensor is not None:
                self._add_input(name, tensor)
        self._add_outputs()

    def _add_input(self, name: str, tensor: Tensor) -> None:
        shared = tensor.dim() == 1 if name == "prefix_gate" else tensor.dim() == 3
        if name.startswith("prefix_") and shared:
            tensor = tensor[None]
        if 0 in tensor.stride() or (tensor.dim() > 2 and tensor.stride(-1) != 1):
            tensor = tensor.contiguous()  # as the operator does with an expanded grad_out
        flat = poisoned_memory(tensor.shape, tensor.stride(), tensor.dtype)
        view = flat.as_strided(tensor.shape, tensor.stride())
        view.copy_(tensor)
        self._add_record(name, self._add_buffer(flat, is_output=False), view)

    def _add_buffer(self, flat: Tensor, is_output: bool) -> int:
        self.buffers.append((is_output, flat))
        return len(self.buffers) - 1

    def _add_record(self, name: str, buffer: int, view: Tensor) -> None:
        strides = list(view.stride())
        if name == "bias":
            strides[0] *= view.shape[0] > 1
        elif self.case.packed and not name.startswith(("prefix_", "position_")):
            strides = [strides[0], *strides[1:2], strides[0]]  # starts are rows
        strides = [*strides, 0, 0][:3]
        first_byte = view.storage_offset() * view.element_size()
        self.records[name] = (buffer, first_byte, view.element_size(), *strides)

    def _add_output(self, parts: dict[str, int], like: Tensor) -> None:
        """[B, heads, rows, D] or [N, heads, D], laid out as by attention.cpp, part after part."""
        heads = sum(parts.values())
        row = like.shape[-1] + 8 * self.case.gaps
        if self.case.packed:
            shape = (like.shape[0], heads, like.shape[2])
            strides = (heads * row, row, 1)
        else:
            shape = (like.shape[0], heads, *like.shape[2:])
            strides = (like.shape[2] * heads * row, row, heads * row, 1)
        flat = poisoned_memory(shape, strides, like.dtype)
        buffer = self._add_buffer(flat, is_output=True)
        whole = flat.as_strided(shape, strides)
        for (name, _), view in zip(
            parts.items(), whole.split(list(parts.values()), 1), strict=True
        ):
            self._add_record(name, buffer, view)
            self.views[name] = buffer, view

    def _add_contiguous_output(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        strides = torch.empty(shape, device="meta").stride()
        flat = poisoned_memory(shape, strides, dtype)
        view = flat.as_strided(shape, strides)
        buffer = self._add_buffer(flat, is_output=True)
        self._add_record(name, buffer, view)
        self.views[name] = buffer, view

    def _add_outputs(self) -> None:
        inputs = self.case.inputs
        query, key = inputs.query, inputs.key
        heads, kv_heads = query.shape[1], key.shape[1]
        self._add_output({"out": heads}, query)
        self._add_contiguous_output("lse", tuple(query.shape[:-1]), torch.float32)
        needs_query, needs_key_value, needs_prefix = self.case.needs
        if self.case.joint:
            self._add_output(
                {"grad_query": heads, "grad_key": kv_heads, "grad_value": kv_heads}, query
            )
        else:
            if needs_query:
                self._add_output({"grad_query": heads}, query)
            if needs_key_value:
                self._add_output({"grad_key": kv_heads}, key)
                self._add_output({"grad_value": kv_heads}, key)
        if needs_prefix:
            shape = tuple(inputs.raw_tensors[3].shape)
            for name in ("grad_prefix_key", "grad_prefix_value"):
                self._add_contiguous_output(name, shape, query.dtype)
            if inputs.prefix_gate is not None:
                shape = (shape[0], heads)
                self._add_contiguous_output("grad_prefix_gate", shape, torch.float32)

    def header(self) -> bytes:
        case, inputs = self.case, self.case.inputs
        query, key, _, prefix_key, _ = inputs.raw_tensors
        if case.packed:
            batch, queries, tokens = (
                len(inputs.cu_seqlens) - 1,
                inputs.max_seqlen,
                inputs.max_seqlen,
            )
        else:
            batch, queries, tokens = query.shape[0], query.shape[2], key.shape[2]
        window = -1 if inputs.window is None else inputs.window
        return struct.pack(
            "<16qQ3d",
            query.dtype == torch.bfloat16, batch, query.shape[1], query.shape[-1], queries, tokens,
            query.shape[1] // key.shape[1], prefix_key.shape[0], prefix_key.shape[2], window,
            0 if inputs.position_slots is None else len(inputs.position_slots) // 2,
            *case.needs, round(65536 * case.p), round(65536 * case.prefix_p),
            inputs.seed.item() % 2**64,
            inputs.scale, 1 / (1 - case.p), 1 / (1 - case.prefix_p),
        )  # fmt: skip

    def to_bytes(self) -> bytes:
        records = (self.records.get(name, NO_TENSOR) for name in (*INPUTS, *OUTPUTS))
        parts = [self.header(), *(struct.pack("<6q", *record) for record in records)]
        parts.append(struct.pack("<q", len(self.buffers)))
        for is_output, flat in self.buffers:
            data = _bytes_of(flat)
            parts.append(struct.pack("<2q", is_output, len(data)) + data)
        return b"".join(parts)

    def read(self, data: memoryview) -> tuple[dict[str, Tensor], int]:
        """The outputs of this case at the front of `data`, and how many bytes they take."""
        position, filled = 0, {}
        for index, (is_output, before) in enumerate(self.buffers):
            if is_output:
                count = before.numel() * before.element_size()
                flat = torch.empty(count, dtype=torch.uint8)
                if count:
                    flat.copy_(
                        torch.frombuffer(data[position : position + count], dtype=flat.dtype)
                    )
                filled[index] = flat.view(before.dtype)
                position += count
        untouched = {
            index: torch.ones(len(flat), dtype=torch.bool) for index, flat in filled.items()
        }
        results = {}
        for name, (index, view) in self.views.items():
            where = view.shape, view.stride(), view.storage_offset()
            results[name] = filled[index].as_strided(*where)
            untouched[index].as_strided(*where).fill_(False)
        for index, gap in untouched.items():
            bits = filled[index].view(torch.int16)[
                gap.repeat_interleave(filled[index].itemsize // 2)
            ]
            assert (bits == -1).all(), "written between the rows of an output"
        results["lse"].masked_fill_(results["lse"].isinf(), 0.0)
        for name in ("grad_prefix_key", "grad_prefix_value", "grad_prefix_gate"):
            if name in results and self.case.inputs.prefix_key.dim() == 3:
                results[name] = results[name][0]
        return results, position


def _bytes_of(flat: Tensor) -> bytes:
    return flat.view(torch.uint8).numpy().tobytes()


def run_runner(
    build: Build, cases: list[Case | CaseFile], folder: Path, level: str
) -> tuple[subprocess.CompletedProcess, list[dict[str, Tensor]]]:
    """Results of every case by name; none when the runner fails."""
    files = [case if isinstance(case, CaseFile) else CaseFile(case) for case in cases]
    cases_path, results_path = folder / "cases", folder / "results"
    cases_path.write_bytes(struct.pack("<q", len(files)) + b"".join(f.to_bytes() for f in files))
    process = subprocess.run(
        [*build.launcher, str(build_runner(build)), str(cases_path), str(results_path)],
        env={**os.environ, "PTV2_CPU_LEVEL": level}, capture_output=True, text=True,
    )  # fmt: skip
    if process.returncode != 0:
        return process, []
    data, results = memoryview(bytearray(results_path.read_bytes())), []
    for file in files:
        of_case, used = file.read(data)
        results.append(of_case)
        data = data[used:]
    assert not len(data)
    return process, results


def run_rows(build: Build, level: str, missing: int = 0) -> subprocess.CompletedProcess:
    """The elementwise kernels; `missing`: by how many elements their results are too short."""
    return subprocess.run(
        [*build.launcher, str(build_runner(build, "row_runner")), str(missing)],
        env={**os.environ, "PTV2_CPU_LEVEL": level}, capture_output=True, text=True,
    )  # fmt: skip


class Expected:
    """What the results of a case are held against; computed once for all levels and builds."""

    def __init__(self, case: Case) -> None:
        self.case = case
        arguments = (case.inputs, case.p, case.prefix_p)
        self.exact, self.plain, self.sizes = (
            function(*arguments) for function in (oracle, concatenate_and_expand, magnitudes)
        )

    def check(self, actual: dict[str, Tensor], name: str) -> None:
        """By the numerics rule, those gradients that were asked for."""
        for field, result in actual.items():
            others = (getattr(results, field) for results in (self.exact, self.plain, self.sizes))
            assert_close_to_oracle(result, *others, name=f"{name} {field}")


def with_padded(case: Case) -> Case:
    """The padded call of a packed one."""
    return dataclasses.replace(case, inputs=case.inputs.padded)
