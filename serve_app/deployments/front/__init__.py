"""The layers before Serve's HTTP proxy. Must not know models, adapters or deployments."""
