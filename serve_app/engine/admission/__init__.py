"""The processes in which untrusted files are parsed and checked. Must not know live weights."""
