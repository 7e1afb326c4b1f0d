"""Base models: how they are loaded, set up and described. Must not know adapters, requests or queues."""
