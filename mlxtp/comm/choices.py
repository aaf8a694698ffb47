"""What a person chooses for the communication between ranks: names, without MLX or MPI.

So a command line can be checked where neither is to be imported.
"""

# Which collectives on arrays a job has.
TRANSPORTS = {
    "mpi": "over MPI, in MLX's graph",
    "mpi-eager": "over MPI, in Python: each evaluates what it sends",
    "ring": "over MLX's backend for TCP, in its graph",
    "jaccl": "over MLX's backend for RDMA over Thunderbolt, in its graph",
}
BACKENDS = ("ring", "jaccl")  # of MLX

# The algorithms of an allreduce; `allreduce.ALGORITHMS` has their classes.
ALGORITHMS = ("ring-one-shot", "ring-two-shot", "direct-one-shot", "direct-two-shot")
# What `allreduce.algorithms` takes: one of them, or several among which the fastest is
# taken.
ALLREDUCES = ("auto", "ring", "direct", *ALGORITHMS)

# How activations are sent: as they are, or with 8 bits.
WIRES = ("plain", "int8")

# What a rank does when another is lost: end, or raise RankLostError where it can.
ON_LOSS = ("raise", "end")

# The longest that a rank may wait in one collective, or for MPI to start. Where no
# other limit is given it is also the longest that a rank may be silent.
TIMEOUT_SECONDS = 60.0
