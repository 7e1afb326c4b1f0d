"""What a card, a header and a repository say about an adapter. Must not know where repositories lie."""
