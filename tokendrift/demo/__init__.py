"""The demo: refine a small model on real text and show the effect."""
