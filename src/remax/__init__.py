"""remax: align language models with ReMax."""
