"""Where files lie: paths and URLs as users give them, object stores, and one writer for a folder."""
