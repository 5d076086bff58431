"""Teaching a language model to answer."""
