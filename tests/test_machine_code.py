"""The reader of machine code finds the loops that compilers really write."""

import pytest

from tests.machine_code import (
    LOCAL_ACCESS,
    MATRIX,
    WIDE_LOAD,
    count,
    matrix_flop,
    matrix_loops,
    parse_amdgcn,
    parse_sass,
)

# Closed by an unconditional branch and left by a predicated call of a label, as for sm_80; the
# slow path of the loop lies behind the exit, as for sm_100; one loop without matrix work.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], [R4.64] ;
        /*0040*/               @P1 BRA `(.L_x_3) ;
.L_x_4:
        /*0050*/                   HMMA.16816.F32.BF16 R8, R12, R16, R8 ;
        /*0060*/               @P2 CALL.REL.NOINC `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/              @!P3 EXIT ;
        /*0090*/                   STL [R1], R2 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   LDL R2, [R1] ;
        /*00c0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
"""
AMDGCN = """
kernel:
	s_mov_b32 s0, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_loop_of_sass_holds_its_slow_path_and_nothing_else():
    code = parse_sass(SASS)
    assert len(code.instructions) == 14
    (loop,) = matrix_loops(code)
    assert len(loop) == 7
    assert count(loop, MATRIX) == 1
    assert count(loop, LOCAL_ACCESS) == 1
    assert count(loop, WIDE_LOAD) == 1


def test_loop_of_amdgcn():
    (loop,) = matrix_loops(parse_amdgcn(AMDGCN))
    assert len(loop) == 3
    assert count(loop, WIDE_LOAD) == 1


def test_code_without_loops_has_none():
    assert list(matrix_loops(parse_sass("        /*0000*/   EXIT ;"))) == []
    assert list(matrix_loops(parse_sass(""))) == []


@pytest.mark.parametrize(
    ("instruction", "flop"),
    [
        ("HMMA.16816.F32.BF16 R8, R12, R16, R8", 4096),
        ("@P0 HMMA.1688.F32.TF32 R8, R12, R16, R8", 2048),
        ("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", 16384),
        ("v_mfma_f32_16x16x16_bf16_1k v[0:3], v[4:5], v[6:7], v[0:3]", 8192),
        ("FFMA R1, R2, R3, R4", 0),
    ],
)
def test_flop_of_one_warp(instruction, flop):
    assert matrix_flop(instruction) == flop


def test_narrow_loads_are_not_wide():
    narrow = ["LDG.E.64 R2, [R4.64]", "LDGSTS.E.LTC128B.64 [R3], [R4.64]", "LDG.E R2, [R4.64]"]
    assert count(narrow, WIDE_LOAD) == 0
