"""A base's deployment: an engine on a device and the adapters it holds. Must not know HTTP."""
