"""``xditd doctor``: what could keep lending and jobs from working here, each with its remedy."""
