"""The stages of a run on a GPU; see `python -m bench.gpu --help`."""
