"""What a machine lacks of a checkpoint: from the hub, or from other ranks."""
