"""What crosses process boundaries, and the channels that carry it."""
