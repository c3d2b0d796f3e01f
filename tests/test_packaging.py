"""What is shipped, and which part may import which."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ptv2_fast": ROOT / "ptv2_fast", "ptv2_kernels": ROOT / "kernels" / "ptv2_kernels"}

# Each part may import the parts after it, and nothing else of ours.
ALLOWED = {
    "ptv2_fast.cli": {"cli", "recipes", "training", "tasks", "encoders", "ops"},
    "ptv2_fast.recipes": {"training"},
    "ptv2_fast.training": {"training", "tasks", "encoders", "adapters", "prefix", "ops"},
    "ptv2_fast.tasks": {"tasks"},
    "ptv2_fast.adapters": {"encoders", "prefix"},
    "ptv2_fast.encoders": {"encoders", "frozen", "prefix", "ops"},
    "ptv2_fast.frozen": {"frozen", "ops"},
    "ptv2_fast.prefix": set(),
    "ptv2_fast.ops": {"ops", "_C"},
}
TORCH_ONLY = ("ptv2_fast.ops", "ptv2_fast.frozen", "ptv2_fast.prefix", "ptv2_kernels")
HEAVY = ("transformers", "datasets", "accelerate", "peft", "sklearn", "seqeval")


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def modules() -> dict[str, Path]:
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)): path
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }


def test_imports_point_one_way():
    for module, path in modules().items():
        part = ".".join(module.split(".")[:2])
        for name in imports_of(path):
            if name.startswith("ptv2_fast.") and part in ALLOWED:
                assert name.split(".")[1] in {*ALLOWED[part], "__version__"}, f"{module}: {name}"
            if module.startswith(TORCH_ONLY):
                assert name.split(".")[0] not in HEAVY, f"{module} imports {name}"
            if module.startswith("ptv2_kernels"):
                assert not name.startswith("ptv2_fast"), f"{module} imports {name}"


def test_kernels_folder_is_no_package():
    """With it, `import kernels` from the root would shadow the PyPI package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("with_cpp", ["0", "1"])
def test_wheel_holds_both_packages(tmp_path, with_cpp):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "PTV2_CPP": with_cpp}
    subprocess.run([*command, "-w", tmp_path, source], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"ptv2_fast/__init__.py", "ptv2_kernels/forward.py"} <= held
    assert not any(name.startswith(("tests/", "bench/", "kernels/")) for name in held)
    tables = {f"ptv2_fast/recipes/{p.name}" for p in (ROOT / "ptv2_fast/recipes").glob("*.yaml")}
    assert tables <= held and "ptv2_fast/recipes/rte-roberta-large.yaml" in tables
    extension = [name for name in held if name.startswith("ptv2_fast/_C")]
    assert len(extension) == int(with_cpp)
    assert ("-cp310-abi3-" if with_cpp == "1" else "-py3-none-any") in wheel.name
