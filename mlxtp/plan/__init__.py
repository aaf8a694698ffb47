"""`python -m mlxtp.plan`: what a model needs on some machines, and how fast it runs.

From shapes alone: no weights are read, and no MPI is needed.
"""
