"""Both papers' claims on real text, one command each: `python -m benchmarks.reproduce NAME`. See RESULTS.md here."""
