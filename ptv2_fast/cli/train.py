"""ptv2-fast train."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptv2_fast.cli.parser import (
    BadInput,
    add_command,
    add_run_settings,
    check_places,
    checked,
    note_unread,
    quieten,
    run_config,
)
from ptv2_fast.cli.sweeps import (
    add_output,
    list_of_integers,
    refuse_given,
    rest_of,
    run_and_print,
    sweep_before,
)
from ptv2_fast.tasks.option_table import GIVEN
from ptv2_fast.training import run_folder
from ptv2_fast.training.options import INSIDE, RunConfig
from ptv2_fast.training.sweeps.plan import SWEEP, seeds_sweep

if TYPE_CHECKING:
    from ptv2_fast.training.prepared_run import RunPart

_EXAMPLE = """examples:
  ptv2-fast train --task token-classification --model bert-base-cased --output runs/ner \\
      --train-file train.txt --validation-file valid.txt
  ptv2-fast train --task token-classification --method p-tuning-v2 --num-virtual-tokens 100 ...
  ptv2-fast train --recipe rte-roberta-large --output runs/rte
  ptv2-fast train --recipe rte-roberta-large --seeds 11,12,13 --output runs/rte-seeds
  ptv2-fast eval --run runs/ner --data test.txt
  ptv2-fast predict --run runs/ner --text "Angela Merkel visited Paris."
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "train", _train, "train a method on a task", _EXAMPLE)
    parser.description = (
        "Train a method on a task. Without --method, --recipe and --config it starts from the "
        "preset for the task and the encoder's width: a prefix, biases, norms and low-rank updates."
    )
    run = parser.add_argument_group("run")
    add_output(run, "run")
    run.add_argument(
        "--seeds",
        type=list_of_integers,
        metavar="N,N,...",
        help="one run for each seed in folders in --output, and mean and standard deviation; "
        "with --resume the seeds may become more",
    )
    add_run_settings(parser)


def _train(options: dict[str, Any]) -> None:
    folder = Path(options.pop("output"))
    flags = {name: options.pop(name) for name in ("resume", "overwrite", "dry_run")}
    seeds, resume = options.pop("seeds"), flags["resume"]
    if seeds is not None or (resume and (folder / SWEEP).is_file()):
        _train_sweep(options, folder, seeds, flags)
        return
    before = checked(_before, folder) if resume else {}
    config = checked(run_config, options, before or checked(_preset, options))
    note_unread(config, options)
    train_and_print(config, folder, **flags)


def _train_sweep(
    options: dict[str, Any], folder: Path, seeds: list[int] | None, flags: dict[str, bool]
) -> None:
    """A run for each seed, or the rest of the sweep in the folder."""
    before = checked(sweep_before, folder) if flags["resume"] else None
    if before is not None:
        sweep = rest_of(before, options, seeds)
    else:
        refuse_given(options, {"seed"})
        config = checked(run_config, options, checked(_preset, options))
        note_unread(config, options)
        sweep = checked(seeds_sweep, config, seeds)
    run_and_print(sweep, folder, **flags)


def _before(folder: Path) -> dict[str, Any]:
    """The options of the run in the folder, flat; none when it has not begun."""
    if not (folder / run_folder.CONFIG).is_file():
        return {}
    config, _ = run_folder.read_run_config(folder)
    return config.options()


def _preset(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the preset for the task and the encoder; none where the user names a method,
    a recipe or a file."""
    if options["recipe"] is not None or options["config"] is not None or "method" in options:
        return {}
    given = {name: value for name, value in options.items() if name not in ("recipe", "config")}
    # What is wrong is said before the heavy imports. Every preset trains more than a prefix, which
    # may then be empty.
    config = RunConfig.from_dict(INSIDE | given | {GIVEN: [*given]})
    check_places(config.model, config.data)
    quieten(config.training.progress)
    from ptv2_fast.recipes.default import default_recipe

    name, values = default_recipe(config)
    print(f"recipe: {name}, as no method is named (--recipe none for none)", file=sys.stderr)
    return values


def train_and_print(
    config: run_folder.Config, folder: Path, resume: bool, overwrite: bool, dry_run: bool
) -> None:
    """Train and print the scores, unless the run in the folder has been finished.

    A dry run prints what would be done instead.

    Raises:
        BadInput: for a folder that cannot be used, the run of other options and other bad input;
            when the loss is no number any more, and when another process has taken the folder since
            it was checked.
    """
    # Before the heavy imports.
    checked(run_folder.check_run, folder, config, resume=resume, overwrite=overwrite)
    if resume and (folder / run_folder.REPORT).is_file():
        checked(run_folder.read_report, folder)
        print(f"{folder} is complete: see {folder / run_folder.REPORT}", file=sys.stderr)
        return
    check_places(config.model, *(part.data for part in config.parts().values()))
    quieten(config.training.progress)
    from ptv2_fast.encoders import print_trainable_parameters
    from ptv2_fast.training.callbacks import DivergedError
    from ptv2_fast.training.dry_run import describe_run
    from ptv2_fast.training.output import OutputTakenError, is_first
    from ptv2_fast.training.prepare import prepare
    from ptv2_fast.training.run import train

    run = checked(prepare, config, folder, resume=resume, overwrite=overwrite)
    for (name, part), batches in zip(run.parts.items(), run.batches, strict=True):
        _print_part(part, f"{name}/" if name else "")
        if name:
            print(f"{name}: {batches} batches an epoch", file=sys.stderr)
    print_trainable_parameters(run.model)
    if dry_run:
        print(json.dumps(describe_run(run), indent=2, ensure_ascii=False))
        return
    try:
        report = train(run)
    except (DivergedError, OutputTakenError) as error:
        raise BadInput(error) from error
    if is_first():
        _print_scores(report)
        print(f"written to {folder}")


def _print_part(part: "RunPart", prefix: str) -> None:
    """How many examples each split has, how many were cut, what was odd in its source, and what
    the metric means."""
    for split, features in part.features.items():
        cut = features.truncated
        note = f", {cut} cut to {part.max_length} tokens" if cut else ""
        total = features.examples.drawn_from
        drawn = f" of {total}, drawn by the seed" if total else ""
        print(f"{prefix}{split}: {len(features.examples)} examples{drawn}{note}", file=sys.stderr)
        for remark, value in features.examples.remarks.items():
            print(f"{prefix}{split}: {remark}: {value}", file=sys.stderr)
    metric, titles = part.task.metric, part.task.titles(part.labels)
    print(f"{prefix}metric: {metric} = {titles[metric]}", file=sys.stderr)


def _print_scores(report: dict[str, Any]) -> None:
    for name, scores in report["metrics"].items():
        total = report["drawn_from"].get(name)
        part = f" ({report['examples'][name]} of {total} examples)" if total else ""
        figures = ", ".join(f"{key} {value:.4f}" for key, value in scores.items())
        print(f"{name}{part}: {figures}")
