"""Adapters applied to a base's live weights, exactly, and taken off again. Must not know requests or queues."""
