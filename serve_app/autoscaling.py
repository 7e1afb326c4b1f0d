"""How many replicas a base should have: decided from the work that waits."""
