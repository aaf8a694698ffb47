"""The layers that communicate, and a model changed to compute a rank's part."""
