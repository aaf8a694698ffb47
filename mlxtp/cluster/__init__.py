"""Hosts: their addresses and memory, and what doctor measured of them."""
