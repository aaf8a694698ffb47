"""The job of the server: what every rank runs, and what rank 0 does besides."""
