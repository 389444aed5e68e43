"""
One runner per library: the same task on the same files, in a process of its own, in CPU seconds and memory.

A runner needs only numpy, torch, transformers and its own library, so each can run in another environment than ours.
"""
