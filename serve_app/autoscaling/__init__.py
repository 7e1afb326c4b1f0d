"""How many replicas each base should have: by itself, and among those that share the GPUs; torch is not known here."""
