"""The report of an evaluation: what ``tokendrift evaluate`` reads, prints and writes."""

from tokendrift.evaluation.report.from_files import EvaluateConfig, evaluate_files
from tokendrift.evaluation.report.page import page
from tokendrift.evaluation.report.report import Report, as_json

__all__ = ["EvaluateConfig", "Report", "as_json", "evaluate_files", "page"]
