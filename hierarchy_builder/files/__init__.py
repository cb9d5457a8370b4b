"""Files: on disks and at URLs, written whole or not at all, by one writer, and read with distrust."""
