"""Several methods and seeds under one budget: what is run, how runs are started, and what they say."""
