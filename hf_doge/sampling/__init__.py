"""Which example comes next: draws from domains in given proportions, each a pure function of its number."""
