"""The worker group: its processes, its states, its deadlines, and the messages of its ranks."""
