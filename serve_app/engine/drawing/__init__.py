"""Requests in, pixels out, through one diffusers pipeline. Must not know queues or how adapters are applied."""
