"""The order of work on one device: the device thread, its queue, memory and health. Knows all other rooms."""
