"""One language model on several machines: tensor parallelism for MLX over MPI."""

from importlib.metadata import version

from mlxtp.comm.communicator import Communicator
from mlxtp.generation.stream import stream_generate
from mlxtp.loading import load

__all__ = ["Communicator", "__version__", "load", "stream_generate"]

__version__ = version("mlxtp")
