"""`python -m benchmarks`: our operations side by side with torch's, in one process."""
