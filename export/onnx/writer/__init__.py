"""What a file holds beside its operators: names, sizes, function bodies, weights on disk."""
