"""What pictures and videos say of how they were made: one JSON record, written into PNG, JPEG, WebP and MP4 files."""
