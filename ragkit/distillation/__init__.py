"""A reader's look at the passages, the targets made from it, Step 2, and the log of a training."""
