"""What is shipped, and which part may import which."""

import ast
import itertools
import os
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ptv2_fast": ROOT / "ptv2_fast", "ptv2_kernels": ROOT / "kernels" / "ptv2_kernels"}

# Each part may import the parts after it, and nothing else of ours.
ALLOWED = {
    "ptv2_fast.cli": {
        "cli",
        "serving",
        "recipes",
        "training",
        "tasks",
        "adapters",
        "encoders",
        "ops",
        "files",
    },
    "ptv2_fast.serving": {"serving", "training", "tasks", "encoders", "adapters"},
    "ptv2_fast.recipes": {"recipes", "training", "tasks"},
    "ptv2_fast.training": {"training", "tasks", "encoders", "adapters", "prefix", "ops", "files"},
    "ptv2_fast.tasks": {"tasks", "files"},
    "ptv2_fast.adapters": {"adapters", "encoders", "files", "prefix"},
    "ptv2_fast.encoders": {"encoders", "frozen", "prefix", "ops", "files"},
    "ptv2_fast.files": set(),
    "ptv2_fast.frozen": {"frozen", "prefix", "ops"},
    "ptv2_fast.prefix": set(),
    "ptv2_fast.ops": {"ops", "_C"},
}
TORCH_ONLY = ("ptv2_fast.ops", "ptv2_fast.frozen", "ptv2_fast.prefix", "ptv2_kernels")
# What an extra brings may be imported here only; elsewhere, what is always installed.
EXTRAS = {
    "bench.": "bench",
    "docs.": "docs",
    "examples.": "dev",
    "ptv2_fast.cli.completion": "completion",
    "ptv2_fast.serving": "serve",
    "setup": "dev",
    "tests.": "dev",
    "ptv2_fast.training.baselines": "baselines",
    "ptv2_fast.training.demo": "demo",
    "ptv2_fast.training.report": "report",
    "ptv2_fast.training.search": "search",
}
# Measured beside ours where it is installed; no release of it has wheels.
PEERS = {"flash_attn"}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
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


def declared(extra: str = "") -> dict[str, Requirement]:
    """What pyproject.toml asks for by name: always, or with an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {}
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            for other in requirement.extras:
                found.update(declared(other))
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def test_imports_are_declared():
    distributions = packages_distributions()
    extras = {part: {**declared(), **declared(extra)} for part, extra in EXTRAS.items()}
    paths = {**modules(), "setup": ROOT / "setup.py"}
    for folder in ("bench", "docs", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            paths[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    known = {*PACKAGES, "bench", "tests", "tiny", *PEERS, *sys.stdlib_module_names}
    for module, path in paths.items():
        allowed = next((extras[part] for part in extras if module.startswith(part)), declared())
        for name in {name.split(".")[0] for name in imports_of(path)} - known:
            brings = set(map(canonicalize_name, distributions.get(name, [name])))
            assert brings & set(allowed), f"{module} imports {name}"


def pinned(file: str, python: str) -> dict[str, str]:
    """Versions by name; a name that is pinned twice for one Python is an error."""
    pins = {}
    for line in (ROOT / file).read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                ((_, version),) = ((part.operator, part.version) for part in pin.specifier)
                assert pins.setdefault(canonicalize_name(pin.name), version) == version
    return pins


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned(python):
    """No upper caps for users; development and its oldest environment know their versions."""
    newest, oldest = pinned("constraints.txt", python), pinned("constraints-oldest.txt", python)
    extras = [declared(extra).items() for extra in ("", "dev", "demo", "docs")]
    for name, requirement in dict(itertools.chain(*extras)).items():
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        ((operator, lowest),) = ((part.operator, part.version) for part in requirement.specifier)
        if operator == ">=":
            assert Version(newest[name]) >= Version(oldest[name]) == Version(lowest), name
        else:
            assert operator == "==", name
    assert {name for name in oldest if name not in newest} == set()


@pytest.fixture
def source(tmp_path):
    """The files that git knows or would take, in a folder of their own."""
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
    return source


def test_setup_names_a_way_out(tmp_path):
    command = [ROOT / ".ci" / "setup", tmp_path / "new", "constraints.txt"]
    cases = [
        ({"CXX": "no-such-compiler"}, "PTV2_CPP=0 make setup"),
        ({"PYTHON": "no-such-python"}, "make PYTHON=python3.12 setup"),
    ]
    for changed, advice in cases:
        environment = {**os.environ, "PYTHON": sys.executable, "PTV2_CPP": "1", **changed}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and advice in done.stderr
        assert not (tmp_path / "new").exists()


def test_isolated_build_brings_torch(source, tmp_path):
    """Asked for it first, as pip does; a build without isolation that has none says what to do."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": str(stub), "PTV2_CPP": "1"}

    def hook(call: str) -> subprocess.CompletedProcess:
        code = f"from setuptools import build_meta; print(build_meta.{call})"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)

    asked = ast.literal_eval(hook("get_requires_for_build_wheel()").stdout.splitlines()[-1])
    assert asked == [str(declared()["torch"]), str(declared("dev")["ninja"])]
    refused = hook("build_wheel('.')")
    assert refused.returncode != 0 and "PTV2_CPP=0" in refused.stderr
    environment["PTV2_CPP"] = "0"
    assert hook("get_requires_for_build_wheel()").stdout.splitlines()[-1] == "[]"


def test_encoders_import_without_training_packages():
    """From the source tree alone: a machine that only runs the operators has less."""
    code = """
import sys
for name in ("accelerate", "datasets", "seqeval", "optuna", "peft"):
    sys.modules[name] = None
import ptv2_fast, ptv2_fast.adapters, ptv2_fast.encoders, ptv2_fast.frozen, ptv2_kernels
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=ROOT.parent)


# A compiler that links what it is told to, and compiles nothing.
EMPTY_OBJECTS = """#!/bin/sh
output= compiles= previous=
for word in "$@"; do
    [ "$previous" = -o ] && output=$word
    [ "$word" = -c ] && compiles=yes
    previous=$word
done
[ "$compiles" ] || exec {compiler} "$@"
exec {compiler} -x c++ -fPIC -c /dev/null -o "$output"
"""


@pytest.mark.parametrize("with_cpp", ["0", "1"])
def test_wheel_holds_both_packages(source, tmp_path, with_cpp):
    """Of empty objects: what the compiler makes of the sources, setup shows, and half a minute."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q"]
    compiler = tmp_path / "compiler"
    compiler.write_text(EMPTY_OBJECTS.format(compiler=os.environ.get("CXX", "c++")))
    compiler.chmod(0o755)
    environment = {**os.environ, "PTV2_CPP": with_cpp, "CXX": str(compiler)}
    subprocess.run([*command, "-w", tmp_path, source], check=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"ptv2_fast/__init__.py", "ptv2_fast/py.typed", "ptv2_kernels/forward.py"} <= held
    others = ("bench/", "docs/", "examples/", "kernels/", "tests/")
    assert not any(name.startswith(others) for name in held)
    tables = {f"ptv2_fast/recipes/{p.name}" for p in (ROOT / "ptv2_fast/recipes").glob("*.yaml")}
    assert {"ptv2_fast/serving/server.py", "ptv2_fast/serving/page.html"} <= held
    assert tables <= held and "ptv2_fast/recipes/rte-roberta-large.yaml" in tables
    extension = [name for name in held if name.startswith("ptv2_fast/_C")]
    assert len(extension) == int(with_cpp)
    assert ("-cp310-abi3-" if with_cpp == "1" else "-py3-none-any") in wheel.name
