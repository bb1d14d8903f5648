"""The report of an evaluation: what ``tokendrift evaluate`` reads, prints and writes."""

from tokendrift.evaluation.report.page import page
from tokendrift.evaluation.report.report import Report, as_json
from tokendrift.evaluation.report.run import EvaluateConfig, evaluate_files

__all__ = ["EvaluateConfig", "Report", "as_json", "evaluate_files", "page"]
