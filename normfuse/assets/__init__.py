"""Trained weights and held-out images of the demo; written by examples/train_demo_models.py."""
