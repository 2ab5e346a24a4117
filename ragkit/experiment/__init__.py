"""The experiment: its store, its one graph, how a notebook opens it, its tables and claims."""
