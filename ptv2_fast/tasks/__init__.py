"""Task families: data in, features and metrics out, one file each."""

import importlib
from typing import TYPE_CHECKING

from ptv2_fast.tasks.options import FAMILIES, DataOptions

if TYPE_CHECKING:
    from ptv2_fast.tasks.task import Task

__all__ = ["FAMILIES", "DataOptions", "make_task"]

_CLASSES = {
    "text-classification": ("text_classification", "TextClassification"),
    "text-regression": ("text_regression", "TextRegression"),
    "text-classification by label words": ("verbalizer", "Verbalizer"),
    "token-classification": ("token_classification", "TokenClassification"),
    "semantic-role-labeling": ("semantic_roles", "SemanticRoleLabeling"),
    "multiple-choice": ("multiple_choice", "MultipleChoice"),
    "question-answering": ("question_answering", "QuestionAnswering"),
}


def make_task(options: DataOptions) -> "Task":
    """The task that the options name, bound to their columns.

    Raises:
        ValueError: for options that this task does not take.
    """
    kind = "text-regression" if options.regression else options.family
    if options.head == "lm":
        kind = "text-classification by label words"
    module, name = _CLASSES[kind]
    # Imported here: the command line reads the options long before it needs transformers.
    family = getattr(importlib.import_module(f"ptv2_fast.tasks.{module}"), name)
    return family(options)
