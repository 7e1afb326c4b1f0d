"""Denoisers and adapter files of public shapes with random weights. Must not know what is measured."""
