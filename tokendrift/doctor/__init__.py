"""Checks of a checkpoint: what the command ``tokendrift doctor`` does."""

from tokendrift.doctor.examine import diagnose
from tokendrift.doctor.findings import CheckResult, Diagnosis

__all__ = ["CheckResult", "Diagnosis", "diagnose"]
