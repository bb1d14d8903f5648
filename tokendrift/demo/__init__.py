"""The demo: refine a small model on real English, and compare it with ordinary training at equal entropy."""

from tokendrift.demo.demonstration import DemoConfig, run_demo
from tokendrift.demo.shipped import PRETRAINED, pretrained_path

__all__ = ["PRETRAINED", "DemoConfig", "pretrained_path", "run_demo"]
