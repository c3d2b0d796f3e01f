"""Scores over seeds."""

from collections.abc import Sequence

import pandas


def over_seeds(table: pandas.DataFrame, by: Sequence[str]) -> pandas.DataFrame:
    """Mean, sample standard deviation and number of the scores, in the order of the table.

    Args:
        table: a row for each seed, with the column `score`.
        by: the columns that say what a score is of.

    Returns:
        mean (NaN where a score is), sd (NaN of one score or where one is not finite), n.
    """
    scores = table.groupby(list(by), sort=False, dropna=False)["score"]
    return pandas.DataFrame({
        "mean": scores.agg(lambda values: values.mean(skipna=False)),
        "sd": scores.agg(lambda values: values.std(skipna=False)),
        "n": scores.size(),
    })  # fmt: skip
