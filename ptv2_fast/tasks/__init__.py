"""Task families: data in, features and metrics out, one file each."""

import importlib
from typing import TYPE_CHECKING

from ptv2_fast.tasks.options import FAMILIES, DataOptions

if TYPE_CHECKING:
    from ptv2_fast.tasks.task import Task

__all__ = ["FAMILIES", "DataOptions", "make_task"]

_CLASSES = {
    "text-classification": ("text_classification", "TextClassification"),
    "token-classification": ("token_classification", "TokenClassification"),
    "semantic-role-labeling": ("semantic_roles", "SemanticRoleLabeling"),
    "question-answering": ("question_answering", "QuestionAnswering"),
}


def make_task(options: DataOptions) -> "Task":
    """The task that the options name, bound to their columns."""
    # Imported here: the command line reads the options long before it needs transformers.
    module, name = _CLASSES[options.family]
    family = getattr(importlib.import_module(f"ptv2_fast.tasks.{module}"), name)
    return family(options.with_benchmark_defaults())
