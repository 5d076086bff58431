"""Ready tasks: from data to a table of results."""
