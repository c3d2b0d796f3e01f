"""ptv2-fast multitask."""

import argparse
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import add_command, add_options, checked
from ptv2_fast.cli.sweeps import add_output
from ptv2_fast.cli.train import train_and_print
from ptv2_fast.training import run_folder
from ptv2_fast.training.multitask.config import MultiTaskConfig, flatten_tasks, read_multitask_file
from ptv2_fast.training.options import ModelOptions, TrainingOptions, with_changes

_EXAMPLE = """a configuration in YAML:
  model: bert-base-cased
  num_virtual_tokens: 32
  tasks:
    - {task: conll2003, data_dir: data/CoNLL03}
    - {task: conll2004, data_dir: data/CoNLL04}
    - {name: ours, task: token-classification, train_file: train.txt, validation_file: dev.txt}

examples:
  ptv2-fast multitask --config ner.yaml --output runs/multi
  ptv2-fast eval --run runs/multi/tasks/ours --data test.txt
  ptv2-fast train --task conll2003 --data-dir data/CoNLL03 --model bert-base-cased \\
      --num-virtual-tokens 32 --start-from runs/multi --output runs/conll2003
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "multitask",
        _multitask,
        "train one prefix on several data sets of a task family, with a head for each",
        _EXAMPLE,
    )
    run = parser.add_argument_group("run")
    add_output(run, "run")
    run.add_argument(
        "--config",
        help="options from a .json, .toml or .yaml file, with a list `tasks` of data options and "
        "names; options given here win; config.json of a run repeats it",
    )
    run.add_argument(
        "--temperature",
        type=float,
        metavar="N",
        help="batches are drawn from n examples in proportion to n ** (1 / temperature): 1 = by "
        "size, large = equally often (default: 1.0)",
    )
    run.add_argument(
        "--mixed-batches",
        action=argparse.BooleanOptionalAction,
        help="let a batch hold examples of several data sets, in the same proportions, instead of "
        "one after the other (default: no)",
    )
    add_options(parser.add_argument_group("model"), ModelOptions)
    add_options(parser.add_argument_group("training"), TrainingOptions)


def _multitask(options: dict[str, Any]) -> None:
    folder = Path(options.pop("output"))
    flags = {name: options.pop(name) for name in ("resume", "overwrite", "dry_run")}
    config = checked(_read_config, options, folder if flags["resume"] else None)
    train_and_print(config, folder, **flags)


def _read_config(options: dict[str, Any], started: Path | None) -> MultiTaskConfig:
    """The run's configuration: that of the started run, then the file's, and the options."""
    values: dict[str, Any] = {}
    if started is not None and (started / run_folder.CONFIG).is_file():
        before, _ = run_folder.read_run_config(started, MultiTaskConfig)
        values |= flatten_tasks(before.to_dict())
    config_file = options.pop("config")
    own = {name: options.pop(name) for name in ("temperature", "mixed_batches")}
    if config_file is not None:
        values = with_changes(values, read_multitask_file(config_file))
    values |= {name: value for name, value in own.items() if value is not None}
    return MultiTaskConfig.from_dict(with_changes(values, options))
