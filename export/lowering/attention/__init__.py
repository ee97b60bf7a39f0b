"""The forms of attention: which operator of its runtime each site becomes, and why it is no more."""
