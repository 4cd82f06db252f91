"""Who goes next on the workers, and what becomes of each job."""
