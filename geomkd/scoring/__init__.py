"""A model's layers, their scores, a ranking with its uncertainty, a choice."""
