"""The registry of adapters, bases and replicas on the wire. Must not know the image routes."""
