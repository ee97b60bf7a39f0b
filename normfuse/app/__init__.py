"""What the command line works with: sources of models, example inputs, engines, the demo."""
