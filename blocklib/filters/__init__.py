"""Filters: nodes that stand between others, let content through unchanged, and do something about the requests."""
