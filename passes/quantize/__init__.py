"""What `ShiftQuantize` is made of: sites, statistics, migration, codes, measurements, widths and timing."""
