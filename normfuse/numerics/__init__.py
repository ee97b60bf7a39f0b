"""Running a graph: in its own dtypes, in float64, stirred, or watched."""
