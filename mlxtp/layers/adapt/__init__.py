"""What of a forward pass has to change, in a file named after the pattern.

Each function is given a module whose parameters and sizes are the rank's already, what
is whose in it, and the ranks. `table.ADAPTERS` binds it to the name that blocks use.
"""
