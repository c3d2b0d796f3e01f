"""One prefix for several data sets of a task family, and a head for each."""
