"""ptv2-fast card."""

from pathlib import Path
from typing import Any

from ptv2_fast.cli.parser import add_command, checked
from ptv2_fast.training.run_lookup import find_run

_EXAMPLE = """examples:
  ptv2-fast card --run runs/ner
  ptv2-fast card --run runs/ner --push-to user/ner --private
  ptv2-fast card --run runs/ner --push-to user/ner --base-model google-bert/bert-base-cased
"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "card", _card, "write a run's model card, and upload the run", _EXAMPLE
    )
    parser.add_argument(
        "--run", required=True, help="folder of the run; README.md is written there"
    )
    parser.add_argument(
        "--push-to",
        metavar="USER/NAME",
        help="upload the run to the hub, as the user of `hf auth login`",
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="of the pretrained model on the hub, where the run was given a folder",
    )
    parser.add_argument("--private", action="store_true", help="a repository that is created is")


def _card(options: dict[str, Any]) -> None:
    folder = Path(options["run"])
    checked(find_run, folder)
    from ptv2_fast.training.card import push_to_hub, write_card

    print(f"written to {checked(write_card, folder, options['base_model'])}")
    if options["push_to"] is not None:
        private = True if options["private"] else None
        address = checked(
            push_to_hub, folder, options["push_to"], private, base_model=options["base_model"]
        )
        print(f"uploaded to {address}")
