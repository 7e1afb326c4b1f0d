"""Parts shared by the deployments: logs, the watchdog process, and files of adapters and bases between nodes."""
