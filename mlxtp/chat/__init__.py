"""A conversation in the terminal, with a server of OpenAI's interface."""
