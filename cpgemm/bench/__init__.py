"""The benchmark: suites of products, timed beside live peers and floors, and what is made of it."""
