"""The front: the process that clients talk to. No MLX, no MPI."""
