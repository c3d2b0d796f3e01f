"""ptv2-fast tasks."""

from typing import Any

from ptv2_fast.cli.parser import add_command
from ptv2_fast.recipes import recipes
from ptv2_fast.tasks.benchmarks import BENCHMARKS


def add(commands: Any) -> None:
    """Add the command."""
    add_command(commands, "tasks", _tasks, "list the published data sets and the recipes")


def _tasks(options: dict[str, Any]) -> None:
    for benchmark in BENCHMARKS.values():
        print(f"{benchmark.name:<16} {benchmark.suite:<10} {benchmark.title}")
    for name in recipes():
        print(f"ptv2-fast train --recipe {name} --output runs/{name}")
