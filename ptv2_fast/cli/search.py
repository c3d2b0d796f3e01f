"""ptv2-fast search."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import (
    INTERRUPTED,
    BadInput,
    add_command,
    add_run_settings,
    check_places,
    checked,
    note_unread,
    quieten,
    run_config,
)
from ptv2_fast.training.options import RunConfig
from ptv2_fast.training.search.space import Space, check_space, default_space, read_space

_EXAMPLE = """the space file names options, each with choices or a range:
  learning_rate: {low: 0.001, high: 0.1, log: true}
  num_virtual_tokens: {choices: [8, 16, 32]}
Without it: learning rate, length, reparameterisation, epochs and dropout, as far as the method has
them and they are not given as options.

The same command started again, from another shell or on another GPU, trains beside the first.

examples:
  ptv2-fast search --recipe rte-roberta-large --trials 40 --output runs/search
  ptv2-fast train --config runs/search/best.yaml --seeds 11,12,13 --output runs/best
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "search", _search, "search options by their validation score", _EXAMPLE
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--output", required=True,
        help="folder of the search; one that was begun there by the same command goes on",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="delete the search in it first")
    group.add_argument("--trials", type=int, default=20, metavar="N",
                       help="trials in the end, earlier starts included (default: 20)")  # fmt: skip
    group.add_argument("--space", help=".yaml, .json or .toml file of what is varied")
    group.add_argument("--workers", type=int, default=1, metavar="N",
                       help="processes that train at the same time (default: 1)")  # fmt: skip
    group.add_argument("--timeout", type=float, metavar="SECONDS",
                       help="begin no trial after this many seconds")  # fmt: skip
    group.add_argument("--no-prune", dest="prune", action="store_false",
                       help="do not stop trials worse than the median of the others")  # fmt: skip
    add_run_settings(parser)


def _search(options: dict[str, Any]) -> None:
    folder, space_file = Path(options.pop("output")), options.pop("space")
    overwrite = options.pop("overwrite")
    settings = {name: options.pop(name) for name in ("trials", "workers", "timeout", "prune")}
    given = set(options) - {"recipe", "config"}
    base = checked(run_config, options)
    space = checked(_space, base, given, space_file)
    note_unread(base, options, space)
    for package in ("optuna", "sqlalchemy"):
        if importlib.util.find_spec(package) is None:
            raise BadInput(f"search: needs {package}: pip install 'ptv2-fast[search]'")
    check_places(base.model, base.data)
    quieten()
    from ptv2_fast.training.search.results import (
        BEST,
        TRIALS,
        best_trial,
        trial_folder,
        trials_table,
    )
    from ptv2_fast.training.search.study import Search
    from ptv2_fast.training.search.trials import run_search

    search = checked(Search, base, space, folder, **settings)
    try:
        study, metric = checked(run_search, search, overwrite=overwrite, worker=_quiet_work)
    except RuntimeError as error:
        raise BadInput(error) from error
    best, trials = best_trial(study), trials_table(study, metric)
    failed = trials.dropna(subset="message")
    count = f"{len(failed)} of {len(trials)} trials failed"
    if best is None:
        raise BadInput(f"no trial finished, {count}: see {folder / TRIALS}")
    for one in failed[:1].itertuples():
        print(f"{count}, trial {one.trial} because: {one.message} (see {folder / TRIALS})")
    print(f"best: trial {best.number}, {metric} {best.value:.4f}")
    for name, value in best.params.items():
        print(f"  {name}: {value}")
    print(f"options in {folder / BEST}, its run in {trial_folder(folder, best.number)}")


def _space(base: RunConfig, given: set[str], space_file: str | None) -> Space:
    if space_file is None:
        space = default_space(base, given)
    else:
        space = read_space(space_file)
        both = sorted(given & set(space))
        if both:
            raise ValueError(f"{both[0]}: expected no value, since the space varies it")
    check_space(space, base)
    return space


def _quiet_work(*arguments: Any) -> None:
    """What a worker process does."""
    quieten()
    from ptv2_fast.training.search.trials import work

    try:
        work(*arguments)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
