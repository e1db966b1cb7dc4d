"""One file for each question that the device is asked; each part takes a `Check` and returns what goes into JSON."""

from experiments.gpu.parts import cases, compared, gradients, history, limits, link, streams

PARTS = {  # in the order of what they tell
    "link": link.measure,
    "streams": streams.check,
    "gradients": gradients.check,
    "limits": limits.check,
    "compared": compared.measure,
    "history": history.record,
    "cases": cases.run,
}

__all__ = ["PARTS"]
