"""Hooks into the training loops of others; imported by name, each with its own package."""
