"""The differences between base families, as data that every part of the service reads.

Must not know torch, diffusers or Ray: the ingress reads it on nodes that have no engine.
"""
