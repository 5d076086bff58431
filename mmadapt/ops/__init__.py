"""The operations adapters are made of, each defined once."""
