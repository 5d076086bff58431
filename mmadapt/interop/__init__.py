"""Other libraries' names and files."""
