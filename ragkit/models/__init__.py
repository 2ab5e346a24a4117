"""What computes: device and processes, the retriever, the index, the readers, Step 1."""
