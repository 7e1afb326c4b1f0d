"""Reads cards, headers and listings for the facts of an adapter. Must not know where repositories lie."""
