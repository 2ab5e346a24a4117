"""Closeness, the nouns of a question, both indicators, and means with intervals."""
