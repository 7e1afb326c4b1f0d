"""Benchmarks of one machine: swap, start, pipeline and admission. Must not know traffic."""
