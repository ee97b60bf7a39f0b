"""What stands around the passes: partial runs, saved results, figures for the report."""
