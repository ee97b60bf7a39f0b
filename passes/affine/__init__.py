"""The algebra of y = s x + t: where an affine comes from and what absorbs it."""
