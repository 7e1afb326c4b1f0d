"""What several deployments need: logs, the watchdog process, and adapter files shared between nodes."""
