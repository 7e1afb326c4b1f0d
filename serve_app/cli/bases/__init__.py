"""The bases of a running service: what they do, and one more or one less; must not know how a base is served."""
