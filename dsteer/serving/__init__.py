"""A steered model behind an endpoint that clients of OpenAI's API can talk to."""
