"""Several runs that differ in a few options: seeds, ablations, tables."""
