"""Metrics in the layout of ``evaluate``: one folder each, loadable with ``evaluate.load("metrics/<name>")``."""
