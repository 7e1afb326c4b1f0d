"""Pictures on the wire: formats, and the process that decodes what callers send. Must not know the routes."""
