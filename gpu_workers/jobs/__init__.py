"""What a rank does with one job: its inputs and outputs, progress and cancel."""
