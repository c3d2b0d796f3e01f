"""Search for the options that score best on the validation split, with optuna."""
