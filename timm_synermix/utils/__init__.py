"""Random numbers, processes, files, signals: what any part may use; private."""
