"""What a run says of itself: as objects, text, JSON and HTML."""
