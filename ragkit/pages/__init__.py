"""What people look at: figures, the report, the judgement of a reader, the course."""
