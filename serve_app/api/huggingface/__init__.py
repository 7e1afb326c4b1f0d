"""The Hugging Face inference shape. Must not know the other shapes."""
