"""From names to answers: aliases, access, shared look-ups, and which adapters go together. Must not know HTTP."""
