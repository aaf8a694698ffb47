"""The slice table: which slice of which parameter is whose."""
