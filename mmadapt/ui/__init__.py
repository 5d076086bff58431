"""Views over plain results: reports and figures."""
