"""Where adapters lie: folders, object stores and the Hub, with copies of their files. Must not know served bases."""
