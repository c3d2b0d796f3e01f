"""Task families: data in, features and metrics out, one file each."""

from typing import TYPE_CHECKING

from ptv2_fast.tasks.options import TASKS, DataOptions

if TYPE_CHECKING:
    from ptv2_fast.tasks.task import Task

__all__ = ["TASKS", "DataOptions", "make_task"]


def make_task(options: DataOptions) -> "Task":
    """The task that the options name, bound to their columns."""
    # Imported here: the command line reads the options long before it needs transformers.
    from ptv2_fast.tasks.text_classification import TextClassification
    from ptv2_fast.tasks.token_classification import TokenClassification

    families: dict[str, type[Task]] = {
        family.name: family for family in (TextClassification, TokenClassification)
    }
    assert options.task is not None  # DataOptions has checked it
    return families[options.task](options)
