"""The demonstration: a small world of stories, and the whole pipeline from a corpus to an aligned model on it."""
