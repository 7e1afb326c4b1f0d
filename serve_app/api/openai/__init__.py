"""The OpenAI images shape. Must not know the other shapes."""
