"""Mixtures found without DoGE: from n-gram statistics and from fixed rules."""
