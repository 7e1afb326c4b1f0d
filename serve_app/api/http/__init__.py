"""Parts shared by all wire shapes: keys, limits, bodies, pictures, errors and streams. Must not know a single shape."""
