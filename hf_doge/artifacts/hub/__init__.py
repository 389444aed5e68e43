"""Artifacts on the Hub: pushed in one commit or not at all, fetched with what went wrong in plain words."""
