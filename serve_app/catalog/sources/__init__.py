"""Where adapters lie: local folders and the Hub, and the copies kept of its files. Must not know served bases."""
