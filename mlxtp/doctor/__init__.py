"""Whether the machines of a cluster are fit for a job: `python -m mlxtp.doctor`."""
