"""Scores over seeds."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas


def over_seeds(rows: Iterable[Any], names: Sequence[str]) -> pandas.DataFrame:
    """Mean, sample standard deviation and number of the scores that are of the same.

    Args:
        rows: what a score is of, in the order of `names`, and the score; or by name and `score`.

    Returns:
        In the order of the rows, by what they are of: mean (NaN where a score is), sd (NaN of one
        score or where one is not finite), n.
    """
    table = pandas.DataFrame(rows, columns=[*names, "score"])
    scores = table.groupby(list(names), sort=False, dropna=False)["score"]
    return pandas.DataFrame({
        "mean": scores.agg(lambda values: values.mean(skipna=False)),
        "sd": scores.agg(lambda values: values.std(skipna=False)),
        "n": scores.size(),
    })  # fmt: skip
