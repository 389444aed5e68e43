"""Scripts that measure: each takes its data folder as an argument and ends with one line of JSON."""
