"""The fleet's state and the aliases, kept once and mirrored by each ingress replica. Must not know HTTP."""
