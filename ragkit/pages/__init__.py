"""What people look at: figures, the report, the sliders, the judgement of a reader, the course."""
