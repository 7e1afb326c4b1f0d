"""A service in simulated time, through production's own decisions. Must not know a machine."""
