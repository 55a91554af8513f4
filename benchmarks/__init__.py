"""What benchmark.py measures, one subject a file; each has a Config, a run and a report. May import
everything but programs."""
