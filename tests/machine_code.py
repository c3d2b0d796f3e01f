"""Reads compiled kernels: registers, spills, occupancy, and what the hottest loop does.

The hottest loop is, of the innermost natural loops that hold the most matrix work, the leanest:
whole tiles, visible to every row. The longest of them masks, too. Loops are found in the
control-flow graph, not by looking for backward branches: on sm_80 they close by an unconditional
branch and leave by a predicated call of a label, on sm_100 their blocks lie anywhere.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from tests.fake_gpu import GPUS

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA_FLOP = 4096  # one HMMA.16816, or a matrix instruction's share of it
MATRIX = r"HMMA|HGMMA|UTC\w*MMA|v_mfma"
LOCAL_ACCESS = r"LDL|STL|scratch_(?:load|store)"
WIDE_LOAD = r"(?:LDG|LDGSTS)\.E\S*\.128\b|UTMALDG|(?:buffer|global)_load_dwordx4"
# Where control may go from an instruction, beside the next one.
_LABEL = r"(\.L\w+)"
_JUMP = re.compile(rf"(?:BRA|CALL)\b.*\(\s*{_LABEL}|s_c?branch\w*\s+{_LABEL}")
_NO_NEXT = re.compile(r"BRA(?:\.U)? `|EXIT|RET|BRX|s_branch|s_endpgm|s_setpc_b64")


@dataclass(frozen=True)
class Code:
    """Instructions in order, and the index that each label stands before."""

    instructions: list[str]
    labels: dict[str, int]


@dataclass
class _Block:
    first: int
    last: int
    following: list[int] = field(default_factory=list)  # first instructions of the next blocks


@dataclass(frozen=True)
class MachineCode:
    registers: int  # of one thread
    spill_bytes: int  # stack of one thread
    shared_bytes: int
    blocks_per_processor: int
    limited_by: str
    matrix_instructions: int
    wide_loads: int  # of 16 bytes, or by the tensor memory accelerator
    fusable: int  # products and sums that ptxas may fuse as it likes
    sum_orders: tuple[str, ...]  # what the order of sums of floats follows from
    # None: not read on this target, or no matrix loop.
    loops: int | None = None  # innermost ones with matrix work
    loop_instructions: int | None = None  # the hottest loop
    loop_matrix_instructions: int | None = None
    loops_local_accesses: int | None = None  # all the loops
    # Instructions per 4096 FLOP of matrix work, of the hottest and of the longest loop.
    instructions_per_mma: float | None = None
    masked_instructions_per_mma: float | None = None


def parse_sass(text: str) -> Code:
    return _parse(text, r"^(\.L\w+):", r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")


def parse_amdgcn(text: str) -> Code:
    return _parse(text, r"^(\.LBB\w+):", r"^\t([a-z]\w+.*?)\s*(?:;|//|$)")


def _parse(text: str, label: str, instruction: str) -> Code:
    code = Code([], {})
    for line in text.splitlines():
        if found := re.match(label, line):
            code.labels[found.group(1)] = len(code.instructions)
        elif found := re.match(instruction, line):
            code.instructions.append(found.group(1))
    return code


def sum_orders(ttgir: str) -> tuple[str, ...]:
    """The operands of matrix products that lie in registers, and the layouts that are reduced."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = set(re.findall(r"kWidth = \d+", ttgir))
    for reduced in re.findall(r"\}\) : \((tensor<[\dx]+xf32, [^>]*>)\) ->", ttgir):
        found.add(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), reduced))
    return tuple(sorted(found))


def count(instructions: list[str], pattern: str) -> int:
    opcode = re.compile(rf"(?:@\S+ +)?(?:{pattern})")
    return sum(opcode.match(instruction) is not None for instruction in instructions)


def matrix_flop(instruction: str) -> int:
    """Floating-point operations of one matrix instruction, for one warp or wave."""
    if found := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction):
        rows, columns, depth = map(int, found.groups())
        return 2 * rows * columns * depth // 4  # four warps share it
    if found := re.search(r"HMMA\.16(8)(8|16)\b", instruction):
        return 2 * 16 * int(found.group(1)) * int(found.group(2))
    if found := re.search(r"v_mfma_f32_(\d+)x(\d+)x(\d+)", instruction):
        rows, columns, depth = map(int, found.groups())
        return 2 * rows * columns * depth
    return 0


def _blocks(code: Code) -> dict[int, _Block]:
    """Basic blocks by their first instruction."""
    jumps: dict[int, int] = {}
    firsts = {0, *code.labels.values()}
    for index, instruction in enumerate(code.instructions):
        if found := _JUMP.search(instruction):
            target = code.labels.get(found.group(1) or found.group(2))
            if target is not None:
                jumps[index] = target
        if found or _NO_NEXT.match(instruction):
            firsts.add(index + 1)
    ordered = sorted(first for first in firsts if first < len(code.instructions))
    blocks = {}
    for first, after in zip(ordered, [*ordered[1:], len(code.instructions)], strict=True):
        block = blocks[first] = _Block(first, after - 1)
        if block.last in jumps:
            block.following.append(jumps[block.last])
        if after in firsts and not _NO_NEXT.match(code.instructions[block.last]):
            block.following.append(after)
        block.following = [next_ for next_ in block.following if next_ < len(code.instructions)]
    return blocks


def _dominators(blocks: dict[int, _Block]) -> dict[int, set[int]]:
    """The blocks that every path from the entry to a block passes, for the reachable blocks."""
    reachable, frontier = {0}, [0]
    while frontier:
        for following in blocks[frontier.pop()].following:
            if following not in reachable:
                reachable.add(following)
                frontier.append(following)
    preceding: dict[int, list[int]] = {first: [] for first in reachable}
    for first in reachable:
        for following in blocks[first].following:
            preceding[following].append(first)
    dominators = {first: set(reachable) for first in reachable}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for first in sorted(reachable - {0}):
            new = {first} | set.intersection(*(dominators[before] for before in preceding[first]))
            changed |= new != dominators[first]
            dominators[first] = new
    return dominators


def matrix_loops(code: Code) -> Iterator[list[str]]:
    """The instructions of every innermost loop that holds matrix instructions."""
    if not code.instructions:
        return
    blocks = _blocks(code)
    dominators = _dominators(blocks)
    loops: dict[int, set[int]] = {}  # header -> blocks
    for first, above in dominators.items():
        for header in blocks[first].following:
            if header in above:
                body = loops.setdefault(header, {header})
                frontier = [first]
                while frontier:
                    block = frontier.pop()
                    if block not in body:
                        body.add(block)
                        frontier += [b for b in dominators if block in blocks[b].following]
    bodies = [
        (body, [x for b in sorted(body) for x in code.instructions[b : blocks[b].last + 1]])
        for body in loops.values()
    ]
    bodies = [(body, instructions) for body, instructions in bodies if count(instructions, MATRIX)]
    for body, instructions in bodies:
        if not any(other < body for other, _ in bodies):
            yield instructions


def _nvidia_tool(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool, *options = command
        command_line = [NVIDIA_TOOLS / tool, *options, file.name]
        return subprocess.run(command_line, capture_output=True, text=True, check=True).stdout


def _occupancy(target: str, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Blocks per multiprocessor and what limits them."""
    gpu = GPUS[target]
    if target.startswith("gfx"):  # four units of 512 registers per lane, in steps of eight
        by_registers = 4 * min(8, 512 // (-(-max(registers, 1) // 8) * 8)) // warps
        by_shared = gpu.shared_total // max(shared, 1)
    else:  # four units of 16384 registers, 256 at a time; 1 KiB of every block is reserved
        by_registers = 4 * (16384 // (-(-registers * 32 // 256) * 256)) // warps
        by_shared = gpu.shared_total // (-(-(shared + 1024) // 128) * 128)
    limits = {
        "registers": by_registers,
        "shared memory": by_shared if shared <= gpu.shared_limit else 0,
        "warps": gpu.warps // warps,
        "blocks": gpu.blocks,
    }
    limited_by = min(limits, key=limits.__getitem__)
    return limits[limited_by], limited_by


def read(compiled: CompiledKernel, target: str, padding_share: float = 1.0) -> MachineCode:
    """What is known about a kernel compiled for `target`, one of GPUS.

    `padding_share`: the part of the matrix work that is not padding of head_dim.
    """
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        code = parse_amdgcn(text)
        found = (
            re.search(rf"\.{name}:\s+(\d+)", text)
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        registers, spill_bytes = (int(match.group(1)) for match in found)
    else:
        cubin = compiled.asm["cubin"]
        code = parse_sass(_nvidia_tool(cubin, "nvdisasm", "-c"))
        usage = _nvidia_tool(cubin, "cuobjdump", "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        registers, spill_bytes = int(found.group(1)), int(found.group(2))
    metadata = compiled.metadata
    blocks, limited_by = _occupancy(target, registers, metadata.shared, metadata.num_warps)
    return MachineCode(
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        blocks_per_processor=blocks,
        limited_by=limited_by,
        matrix_instructions=count(code.instructions, MATRIX),
        wide_loads=count(code.instructions, WIDE_LOAD),
        fusable=len(
            re.findall(r"\b(?:mul|add|sub)\.(?:ftz\.)?f32(?:x2)?\b", compiled.asm.get("ptx", ""))
        ),
        sum_orders=sum_orders(compiled.asm["ttgir"]),
        # tcgen05 instructions do not say how large they are.
        **({} if target == "sm_100" else _loop_metrics(code, padding_share)),
    )


def _loop_metrics(code: Code, padding_share: float) -> dict[str, float]:
    loops = list(matrix_loops(code))
    if not loops:
        return {}
    work = [sum(map(matrix_flop, loop)) for loop in loops]
    busiest = [loop for loop, flop in zip(loops, work, strict=True) if flop == max(work)]
    hottest, longest = min(busiest, key=len), max(busiest, key=len)
    per_instruction = MMA_FLOP / (max(work) * padding_share)
    return {
        "loops": len(loops),
        "loop_instructions": len(hottest),
        "loop_matrix_instructions": count(hottest, MATRIX),
        "loops_local_accesses": sum(count(loop, LOCAL_ACCESS) for loop in loops),
        "instructions_per_mma": len(hottest) * per_instruction,
        "masked_instructions_per_mma": len(longest) * per_instruction,
    }
