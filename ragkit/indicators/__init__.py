"""Closeness, the nouns of a question, both indicators, and measures with intervals."""
