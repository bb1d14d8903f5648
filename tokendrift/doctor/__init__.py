"""Is a checkpoint what it says it is? Behind the command ``tokendrift doctor``."""

from tokendrift.doctor.examine import diagnose
from tokendrift.doctor.findings import CheckResult, Diagnosis

__all__ = ["CheckResult", "Diagnosis", "diagnose"]
