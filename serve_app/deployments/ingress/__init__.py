"""The ingress deployment: HTTP in, a settled request to the right base, images out. Must not load torch."""
