"""A server of OpenAI's and Anthropic's interfaces on all ranks of a job."""
