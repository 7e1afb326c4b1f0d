"""The processes in which files that nobody vouches for are parsed and checked. Must not know live weights."""
