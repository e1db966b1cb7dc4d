"""What a run came to: text, JSON rows and figures (`vdnn.reporting.plots`, imported only where they are drawn)."""

from vdnn.reporting.explaining import advice_table, explained, explanation
from vdnn.reporting.origin import provenance
from vdnn.reporting.perfetto import write_perfetto
from vdnn.reporting.predictions import prediction_table, predictions_table
from vdnn.reporting.rows import by_category, comparisons, difference_rows, differences, result_row, result_rows
from vdnn.reporting.sheet import as_text
from vdnn.reporting.summaries import as_rows, hardware_row, layer_shares, plan_head, plan_rows, summarise
from vdnn.reporting.text import (
    batches_table,
    hardware_table,
    plan_report,
    result_report,
    results_table,
    trace_report,
)

__all__ = [
    "advice_table",
    "as_rows",
    "as_text",
    "batches_table",
    "by_category",
    "comparisons",
    "difference_rows",
    "differences",
    "explained",
    "explanation",
    "hardware_row",
    "hardware_table",
    "layer_shares",
    "plan_head",
    "plan_report",
    "plan_rows",
    "prediction_table",
    "predictions_table",
    "provenance",
    "result_report",
    "result_row",
    "result_rows",
    "results_table",
    "summarise",
    "trace_report",
    "write_perfetto",
]
