"""Data as people have it, as what a model takes: folders of images, texts, data sets on disk, arrays; with labels or without."""
