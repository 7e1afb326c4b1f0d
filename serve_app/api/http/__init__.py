"""What all wire shapes share: keys, limits, bodies, pictures, errors and streams. Must not know a single shape."""
