"""The comparison of a result with the module as it was given, and taking back what fails it."""
