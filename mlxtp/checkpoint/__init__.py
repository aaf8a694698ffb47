"""A checkpoint's bytes on disk: headers, tensors in pieces, cut checkpoints."""
