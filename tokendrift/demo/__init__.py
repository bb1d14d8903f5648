"""The main job: refine a small real model on real text and show what it does."""
