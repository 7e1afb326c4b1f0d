"""Tiny pipelines with random weights of the families that people bring, a builder for each; no downloads."""
