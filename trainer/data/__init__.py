"""Reads finished shards and turns them into batches."""
