"""Readers of bytes that anybody may have written: documents, arrays and pictures."""
