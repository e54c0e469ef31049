"""What a run folder says, as records, as a table for the terminal, and as one HTML page."""

from fedray.report.compare import comparison
from fedray.report.page import write_report
from fedray.report.read import RunRecord, read_metrics, read_run, scalars

__all__ = ["RunRecord", "comparison", "read_metrics", "read_run", "scalars", "write_report"]
