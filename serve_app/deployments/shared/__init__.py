"""Parts shared by the deployments: logs, the watchdog process, and adapter files shared between nodes."""
