"""Traffic as real services see it, and sending it to a service. Must not know the simulator."""
