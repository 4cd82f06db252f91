"""Worker groups: their processes, their states, and what their ranks are asked and answer."""
