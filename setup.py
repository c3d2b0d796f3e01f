"""Builds the C++ CPU kernels as one abi3 extension; PTV2_CPP=0 leaves them out."""

import os
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = [
    "csrc/register.cpp",
    "csrc/attention.cpp",
    "csrc/elementwise.cpp",
    "csrc/tensors.cpp",
    "csrc/micro.cpp",
    "csrc/run.cpp",
    "csrc/dispatch.cpp",
    "csrc/level_generic.cpp",
    "csrc/level_avx2.cpp",
    "csrc/level_avx512.cpp",
    "csrc/level_avx512_bf16.cpp",
    "csrc/level_emulated.cpp",
]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
TORCH_2_10 = "0x020a000000000000"  # the first torch whose stable ABI has parallel_for
COMPILE_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
PYTHON_3_10 = "0x030a0000"

# What pip's own build environment needs beside setuptools, as pyproject.toml has it. Which torch
# comes does not matter: an extension for the stable ABI runs with every torch from 2.10 on.
BUILD_REQUIREMENTS = ["torch>=2.11", "ninja>=1.11.1.2"]


def without_torch(error: ImportError) -> dict:
    """Names what pip must bring before it builds the extension, and refuses to build without it."""

    class BuildWithoutTorch(build_ext):
        def run(self):
            raise SystemExit(
                "ptv2-fast: building the C++ kernels needs torch in this environment; install "
                "torch first, or leave out --no-build-isolation so that pip brings one for the "
                f"build alone, or set PTV2_CPP=0 for a pure-Python build ({error})"
            )

    return {
        "setup_requires": BUILD_REQUIREMENTS,
        "ext_modules": [Extension("ptv2_fast._C", SOURCES, depends=HEADERS)],
        "cmdclass": {"build_ext": BuildWithoutTorch},
    }


def cpp_arguments() -> dict:
    """What setup() needs for the extension; nothing with PTV2_CPP=0."""
    if os.environ.get("PTV2_CPP", "1") == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without_torch(error)
    extension = CppExtension(
        "ptv2_fast._C",
        SOURCES,
        depends=HEADERS,
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_2_10),
            ("Py_LIMITED_API", PYTHON_3_10),
        ],
        extra_compile_args=COMPILE_FLAGS,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["ptv2_fast*"]), "ptv2_kernels"],
    package_data={
        "ptv2_fast": ["py.typed"],
        "ptv2_fast.recipes": ["*.yaml"],
        "ptv2_fast.serving": ["*.html"],
        "ptv2_fast.training.report": ["*.html"],
        "ptv2_kernels": ["measured/*.json"],
    },
    package_dir={"ptv2_kernels": "kernels/ptv2_kernels"},
    **cpp_arguments(),
)
