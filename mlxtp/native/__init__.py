"""What of the package is C++: compiled where it runs, and loaded."""
