"""What a run came to: the recovery table, the plots, and one self-contained HTML page."""
