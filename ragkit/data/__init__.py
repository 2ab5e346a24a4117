"""What is asked and what may be found: text, passages, questions, the embedded worlds, the hub."""
