"""Who writes text with a language model, so that they can be measured against each other."""
