"""Metrics, their labels, and traces. Must not know what is measured."""
