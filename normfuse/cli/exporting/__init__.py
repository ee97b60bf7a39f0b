"""What `normfuse export` does once it was understood: files, engines, server folders, and whether they pay."""
