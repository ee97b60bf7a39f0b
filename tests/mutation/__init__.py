"""Does a test near each rule fail when one of the rule's guards is disabled? `python -m tests.mutation --help`."""
