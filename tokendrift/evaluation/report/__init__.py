"""The report of an evaluation: what ``tokendrift evaluate`` reads, prints and writes."""

from tokendrift.evaluation.report.evaluation_report import EvaluationReport, as_json
from tokendrift.evaluation.report.from_files import EvaluateConfig, evaluate_files
from tokendrift.evaluation.report.html_page import page

__all__ = ["EvaluateConfig", "EvaluationReport", "as_json", "evaluate_files", "page"]
